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

/* A 16 x 16 matrix of words, turned around its diagonal: corners change places in ever smaller squares. */
#define TURN(rows, distance)                                                                                \
  do {                                                                                                      \
    words low, high;                                                                                        \
    for (int lane = 0; lane < LANES; lane++) {                                                              \
      const int odd = lane / distance % 2;                                                                  \
      low[lane] = (uint32_t)(odd ? LANES + lane - distance : lane);                                         \
      high[lane] = (uint32_t)(odd ? LANES + lane : lane + distance);                                        \
    }                                                                                                       \
    for (int row = 0; row < LANES; row++)                                                                   \
      if (row / distance % 2 == 0) {                                                                        \
        const words a = rows[row], b = rows[row + distance];                                                \
        rows[row] = __builtin_shuffle(a, b, low);                                                           \
        rows[row + distance] = __builtin_shuffle(a, b, high);                                               \
      }                                                                                                     \
  } while (0)

INLINE void turn(words *rows) {
  TURN(rows, 8);
  TURN(rows, 4);
  TURN(rows, 2);
  TURN(rows, 1);
}

#define TYPED(name) name##_float
#define ELEMENT float
#define WORD_ELEMENTS 1
#include "attention.inc.h"
#undef TYPED
#undef ELEMENT
#undef WORD_ELEMENTS

#define TYPED(name) name##_bfloat16
#define ELEMENT uint16_t
#define WORD_ELEMENTS 2
#include "attention.inc.h"
