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

/* Sums of two panels for a chunk of groups: c[row - first row of the chunk][2 * LANES]. */
static void TYPED(multiply_chunk)(const uint32_t *packed_x, Rows rows, int64_t chunk, const uint32_t *left,
                                  const uint32_t *right, int64_t num_words, float *c) {
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

/* x [num_rows, num_in]; added and y [num_rows, num_out], of which one of y and y32 is NULL. 0, or 1 without memory. */
int TYPED(matmul)(const ELEMENT *x, int64_t num_rows, const uint32_t *weight, int64_t num_out, int64_t num_in,
                  const ELEMENT *added, ELEMENT *y, float *y32, int num_threads) {
  const int64_t num_words = divide_up(num_in, WORD_ELEMENTS);
  const int64_t num_panels = divide_up(num_out, LANES), num_pairs = divide_up(num_panels, 2);
  const Rows rows = cut_rows(num_rows, num_pairs, num_threads);
  const int64_t num_tasks = num_pairs * rows.num_chunks;
  uint32_t *packed = workspace(0, num_rows * num_words * 4);
  if (!packed) return 1;
  if (num_tasks == 1) num_threads = 1;
  Counter packing = {0}, computing = {0};
#pragma omp parallel if (num_threads > 1) num_threads(num_threads)
  {
    FOR_EACH_TASK(group, packing, rows.num_groups) TYPED(pack_group)(x, num_in, rows, group, packed);
#pragma omp barrier
    FOR_EACH_TASK(task, computing, num_tasks) {
      float c[CHUNK_GROUPS * MAX_ROWS * 2 * LANES];
      const int64_t chunk = task / num_pairs, panel = task % num_pairs * 2;
      const uint32_t *left = weight + panel * num_words * LANES;
      const uint32_t *right = panel + 1 < num_panels ? left + num_words * LANES : left;
      TYPED(multiply_chunk)(packed, rows, chunk, left, right, num_words, c);
      TYPED(finish_panels)(c, rows, chunk, panel, num_out, added, y, y32);
    }
  }
  return 0;
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

/* Gated MLPs: y = down(silu(gate(x)) * up(x)) (+ added), rows of span i through the expert it names.
 * weights [num_experts][3]: gate, up [width, model], down [model, width], packed. 0, or 1 without memory. */
int TYPED(experts)(const ELEMENT *x, int64_t num_rows, const int64_t *spans, int64_t num_spans,
                   const uint32_t *const *weights, int64_t model, int64_t width, const ELEMENT *added, ELEMENT *y,
                   int num_threads) {
  const TYPED(Span) *span = (const TYPED(Span) *)spans;
  const int64_t x_words = divide_up(model, WORD_ELEMENTS), h_words = divide_up(width, WORD_ELEMENTS);
  const int64_t hidden_panels = divide_up(width, LANES), model_panels = divide_up(model, LANES);
  const int64_t model_pairs = divide_up(model_panels, 2);
  const int64_t plan_bytes = divide_up(num_spans * (int64_t)(sizeof(Rows) + 24) + 24, 64) * 64;
  char *memory = workspace(0, plan_bytes + num_rows * (x_words + h_words) * 4);
  if (!memory) return 1;
  Rows *rows = (Rows *)memory;
  int64_t *groups_before = (int64_t *)(rows + num_spans), *hidden_before = groups_before + num_spans + 1;
  int64_t *model_before = hidden_before + num_spans + 1;
  uint32_t *packed_x = (uint32_t *)(memory + plan_bytes), *packed_h = packed_x + num_rows * x_words;
  groups_before[0] = hidden_before[0] = model_before[0] = 0;
  for (int64_t i = 0; i < num_spans; i++) {
    rows[i] = cut_rows(span[i].stop - span[i].start, num_spans * model_pairs, num_threads);
    groups_before[i + 1] = groups_before[i] + rows[i].num_groups;
    hidden_before[i + 1] = hidden_before[i] + rows[i].num_chunks * hidden_panels;
    model_before[i + 1] = model_before[i] + rows[i].num_chunks * model_pairs;
  }
  Counter packing = {0}, hiding = {0}, modelling = {0};
#pragma omp parallel if (num_threads > 1) num_threads(num_threads)
  {
    FOR_EACH_TASK(task, packing, groups_before[num_spans]) {
      const int64_t i = TYPED(span_of)(groups_before, num_spans, task);
      TYPED(pack_group)(x + span[i].start * model, model, rows[i], task - groups_before[i],
                        packed_x + span[i].start * x_words);
    }
#pragma omp barrier
    float c[CHUNK_GROUPS * MAX_ROWS * 2 * LANES];
    FOR_EACH_TASK(task, hiding, hidden_before[num_spans]) {
      const int64_t i = TYPED(span_of)(hidden_before, num_spans, task), local = task - hidden_before[i];
      const int64_t chunk = local / hidden_panels, panel = local % hidden_panels;
      const uint32_t *const *own = weights + span[i].expert * 3;
      TYPED(multiply_chunk)(packed_x + span[i].start * x_words, rows[i], chunk, own[0] + panel * x_words * LANES,
                            own[1] + panel * x_words * LANES, x_words, c);
      TYPED(gate_chunk)(c, rows[i], chunk, panel, width, packed_h + span[i].start * h_words);
    }
#pragma omp barrier
    FOR_EACH_TASK(task, modelling, model_before[num_spans]) {
      const int64_t i = TYPED(span_of)(model_before, num_spans, task), local = task - model_before[i];
      const int64_t chunk = local / model_pairs, panel = local % model_pairs * 2;
      const uint32_t *left = weights[span[i].expert * 3 + 2] + panel * h_words * LANES;
      const uint32_t *right = panel + 1 < model_panels ? left + h_words * LANES : left;
      const int64_t offset = span[i].start * model;
      TYPED(multiply_chunk)(packed_h + span[i].start * h_words, rows[i], chunk, left, right, h_words, c);
      TYPED(finish_panels)(c, rows[i], chunk, panel, model, added ? added + offset : NULL, y + offset, NULL);
    }
  }
  return 0;
}

#undef BLOCK_WORDS
#undef MULTIPLY_CASE
#undef MULTIPLY_CASES
#undef LARGEST
