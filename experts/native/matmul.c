/* Products with matrices that are packed once, at load.
 *
 * A packed matrix is a row of panels, each of 16 outputs: [num_words of the input][16 lanes], so that one load brings
 * a word for every output of the panel and memory is read from front to back. Two panels are multiplied with up to
 * MAX_ROWS rows at once; few rows read the weights at the speed of memory, many reuse them from cache.
 */

#include "magnitudes.h"
#include "team.h"

#define TEMPLATE "matmul.inc.h"
#include "each_element.h"
