/* Packed matrices, plain products and gated MLPs, for one element type; see matmul.c. */

#include "elements.h"
#include "multiply.h"

/* Words of a panel that are multiplied with all rows of a chunk before the next ones: two panels stay in cache. */
#define BLOCK_WORDS 2048

void TYPED(pack)(const ELEMENT *weight, int64_t num_out, int64_t num_in, uint32_t *packed, int num_threads) {
  const int64_t num_panels = divide_up(num_out, LANES), num_words = divide_up(num_in, WORD_ELEMENTS);
  Counter counter = {0};
#pragma omp parallel if (num_threads > 1) num_threads(num_threads)
  FOR_EACH_TASK(panel, counter, num_panels) {
    uint32_t *to = packed + panel * num_words * LANES;
    const ELEMENT *from = weight + panel * LANES * num_in;
    const int64_t present = smaller(LANES, num_out - panel * LANES);
    for (int64_t first = 0; first < num_words; first += LANES, to += LANES * LANES) {
      words block[LANES] = {{0}};
      const int64_t column = first * WORD_ELEMENTS, count = smaller(LANES * WORD_ELEMENTS, num_in - column);
      if (count == LANES * WORD_ELEMENTS && present == LANES)
        for (int lane = 0; lane < LANES; lane++) block[lane] = load_words(from + lane * num_in + column);
      else
        for (int64_t lane = 0; lane < present; lane++)
          memcpy(&block[lane], from + lane * num_in + column, (size_t)count * sizeof(ELEMENT));
      turn(block);
      memcpy(to, block, (size_t)smaller(LANES, num_words - first) * sizeof *block);
    }
  }
}

/* Inputs in the order in which they are read: group by group [num_words][rows]. */
INLINE void TYPED(pack_group)(const ELEMENT *x, int64_t num_in, Rows rows, int64_t group, uint32_t *packed) {
  const int64_t first = first_row(rows, group), count = rows_in(rows, group);
  packed += first * divide_up(num_in, WORD_ELEMENTS);
  for (int64_t m = 0; m < count; m++) TYPED(pack_row)(x + (first + m) * num_in, num_in, count, packed + m);
}

INLINE const void *TYPED(panel_of)(const void *weight, int64_t panel, int64_t num_words) {
  return (const uint32_t *)weight + panel * num_words * LANES;
}

/* Sums of two panels for a chunk of groups: c[row - first row of the chunk][2 * LANES]. */
static void TYPED(multiply_chunk)(const uint32_t *packed_x, Rows rows, int64_t chunk, const void *left_panel,
                                  const void *right_panel, int64_t num_words, float *c) {
  const uint32_t *left = left_panel, *right = right_panel;
  const int64_t from = chunk * rows.chunk_groups, to = smaller(from + rows.chunk_groups, rows.num_groups);
  const int64_t base = first_row(rows, from);
  const int64_t block = to - from > 1 ? BLOCK_WORDS : num_words;
  for (int64_t k = 0; k < num_words || k == 0; k += at_least_one(block))
    for (int64_t group = from; group < to; group++) {
      const int64_t first = first_row(rows, group);
      const int count = rows_in(rows, group);
      TYPED(multiply_packed)(count, packed_x + first * num_words + k * count, left + k * LANES, right + k * LANES,
                             smaller(block, num_words - k), c + (first - base) * 2 * LANES, 2 * LANES, k > 0);
    }
}

/* y = x @ weight.T (+ added): rows of a chunk, two panels from `panel` on. y32, if given, takes floats instead. */
static void TYPED(finish_panels)(const float *c, Rows rows, int64_t chunk, int64_t panel, int64_t num_out,
                                 const ELEMENT *added, ELEMENT *y, float *y32) {
  const int64_t base = first_row(rows, chunk * rows.chunk_groups);
  const int64_t end = first_row(rows, smaller((chunk + 1) * rows.chunk_groups, rows.num_groups));
  for (int64_t row = base; row < end; row++)
    for (int side = 0; side < 2; side++) {
      const int64_t column = (panel + side) * LANES, count = num_out - column;
      if (count <= 0) continue;
      floats sum = load_floats(c + (row - base) * 2 * LANES + side * LANES);
      if (added) sum = sum + TYPED(load)(added + row * num_out + column, count);
      if (y32)
        memcpy(y32 + row * num_out + column, &sum, (size_t)smaller(count, LANES) * 4);
      else
        TYPED(store)(y + row * num_out + column, sum, count);
    }
}

/* silu(gate) * up of one chunk and one panel, put where the next product will read it. */
static void TYPED(gate_chunk)(const float *c, Rows rows, int64_t chunk, int64_t panel, int64_t width, uint32_t *packed) {
  const int64_t from = chunk * rows.chunk_groups, to = smaller(from + rows.chunk_groups, rows.num_groups);
  const int64_t num_words = divide_up(width, WORD_ELEMENTS), column = panel * LANES;
  for (int64_t group = from; group < to; group++) {
    const int64_t first = first_row(rows, group), count = rows_in(rows, group);
    for (int64_t m = 0; m < count; m++, c += 2 * LANES) {
      floats gate = load_floats(c), up = load_floats(c + LANES);
      ELEMENT hidden[LANES];
      TYPED(store)(hidden, gate / (all(1) + exponential(-gate)) * up, LANES);
      uint32_t *to_row = packed + first * num_words + m;
      for (int64_t k = column / WORD_ELEMENTS, lane = 0; k < smaller((column + LANES) / WORD_ELEMENTS, num_words);
           k++, lane += WORD_ELEMENTS)
        memcpy(to_row + k * count, hidden + lane, 4);
    }
  }
}

/* Rows start..stop of x go through one expert. */
typedef struct {
  int64_t expert, start, stop;
} TYPED(Span);

/* Finds the span of a task; tasks are numbered through all spans. */
INLINE int64_t TYPED(span_of)(const int64_t *first_task, int64_t num_spans, int64_t task) {
  int64_t low = 0, high = num_spans;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (first_task[middle] <= task) low = middle;
    else high = middle;
  }
  return low;
}

#define FORMATTED(name) TYPED(name)
#include "products.inc.h"
#undef FORMATTED

#define FORMATTED(name) TYPED(name##_int8)
#define BITS 8
#include "quantized.inc.h"
#include "products.inc.h"
#undef FORMATTED
#undef BITS

#define FORMATTED(name) TYPED(name##_int4)
#define BITS 4
#include "quantized.inc.h"
#include "products.inc.h"
#undef FORMATTED
#undef BITS

#undef BLOCK_WORDS
#undef MULTIPLY_CASE
#undef MULTIPLY_CASES
#undef LARGEST
