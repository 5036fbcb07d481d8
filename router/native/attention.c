/* Paged attention that reads keys and values where they lie.
 *
 * A tile is a run of tokens of one sequence; with one KV head it is a task. The query heads of that KV head and the
 * tile's tokens are the rows of one matrix. Positions come in chunks of a fixed size, counted from the tile's origin;
 * a chunk is brought into the multiplying loop's layout once for all rows of the tile, scores become weights, and sums
 * under way are brought to the new maximum. So a row's sums are made of the same parts whatever goes with it.
 */

#include "team.h"

#define CHUNK_POSITIONS 64
#define MAX_TILE_ROWS 64
#define MAX_HEAD_DIM 1024

/* One layer's keys and values: [blocks, num_heads, block_size, head_dim] each. */
typedef struct {
  const void *keys, *values;
  int64_t num_heads, block_size, head_dim;
} Cache;

/* Tokens first_token.. of the step. The first sees num_visible positions from the origin, each next one more; table is
 * where the blocks from the origin on begin in the tables. */
typedef struct {
  int64_t first_token, num_tokens, num_visible, table;
} Tile;

#define TEMPLATE "attention.inc.h"
#include "each_element.h"
