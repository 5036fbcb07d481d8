/* Products with matrices that are packed once, at load.
 *
 * A packed matrix is a row of panels, each of 16 outputs: [num_words of the input][16 lanes], so that one load brings
 * a word for every output of the panel and memory is read from front to back. Two panels are multiplied with up to
 * MAX_ROWS rows at once; few rows read the weights at the speed of memory, many reuse them from cache.
 */

#include "team.h"

#define TYPED(name) name##_float
#define ELEMENT float
#define WORD_ELEMENTS 1
#include "matmul.inc.h"
#undef TYPED
#undef ELEMENT
#undef WORD_ELEMENTS

#define TYPED(name) name##_bfloat16
#define ELEMENT uint16_t
#define WORD_ELEMENTS 2
#include "matmul.inc.h"
