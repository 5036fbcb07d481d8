/* Paged attention for one element type; see attention.c. */

#include "elements.h"
#include "multiply.h"

/* Word k of row m at x[m * CHUNK_WORDS + k]: weights of positions, as the softmax leaves them. */
#define CHUNK_WORDS (CHUNK_POSITIONS / WORD_ELEMENTS)
static void TYPED(multiply_weights)(int rows, const uint32_t *x, const uint32_t *left, const uint32_t *right,
                                    int64_t num_words, float *c, int64_t step_c, int adds) {
#define KSTEP(rows) 1
#define MSTEP(rows) CHUNK_WORDS
  switch (rows) { MULTIPLY_CASES }
#undef KSTEP
#undef MSTEP
}

/* Rows of 16 positions, [lanes][words of head_dim], turned into [words of head_dim][lanes]. */
static void TYPED(turn_keys)(const ELEMENT *const *keys, int64_t head_dim, uint32_t *turned) {
  const int64_t num_words = divide_up(head_dim, WORD_ELEMENTS);
  for (int64_t first = 0; first < num_words; first += LANES) {
    words block[LANES];
    const int64_t count = smaller(LANES * WORD_ELEMENTS, head_dim - first * WORD_ELEMENTS);
    for (int lane = 0; lane < LANES; lane++) {
      block[lane] = (words){0};
      memcpy(&block[lane], keys[lane] + first * WORD_ELEMENTS, (size_t)count * sizeof(ELEMENT));
    }
    turn(block);
    const int64_t present = smaller(LANES, num_words - first);
    for (int64_t k = 0; k < present; k++) memcpy(turned + (first + k) * LANES, &block[k], sizeof block[k]);
  }
}

/* Values of a chunk as panels of 16 lanes of head_dim: [panels][words of positions][lanes]. */
static void TYPED(lay_values)(const ELEMENT *const *values, int64_t num_words, int64_t head_dim, uint32_t *laid) {
  for (int64_t panel = 0; panel * LANES < head_dim; panel++) {
    const int64_t column = panel * LANES, count = smaller(LANES, head_dim - column);
    for (int64_t k = 0; k < num_words; k++) {
      ELEMENT lanes[WORD_ELEMENTS][LANES] = {{0}};
      for (int i = 0; i < WORD_ELEMENTS; i++)
        memcpy(lanes[i], values[k * WORD_ELEMENTS + i] + column, (size_t)count * sizeof(ELEMENT));
      uint32_t *to = laid + (panel * CHUNK_WORDS + k) * LANES;
#if WORD_ELEMENTS == 1
      memcpy(to, lanes[0], sizeof lanes[0]);
#else
      halves low, high;
      memcpy(&low, lanes[0], sizeof low);
      memcpy(&high, lanes[1], sizeof high);
      words both = __builtin_convertvector(low, words) | __builtin_convertvector(high, words) << 16;
      memcpy(to, &both, sizeof both);
#endif
    }
  }
}

/* One row's scores of a chunk become weights; sums so far are brought to the new maximum. visible: positions. */
static void TYPED(soften)(const float *scores, int64_t visible, float scale, float *largest, floats *sum, float *out,
                          int64_t out_width, ELEMENT *weights) {
  const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats scaled[CHUNK_POSITIONS / LANES], most = all(-INFINITY);
  const int64_t num_vectors = divide_up(smaller(visible, CHUNK_POSITIONS), LANES);
  for (int64_t i = 0; i < num_vectors; i++) {
    floats value = load_floats(scores + i * LANES) * scale;
    scaled[i] = choose(lane < (int32_t)(visible - i * LANES), value, all(-INFINITY));
    most = choose(scaled[i] > most, scaled[i], most);
  }
  const float before = *largest, chunk_most = largest_of(most);
  const float now = chunk_most > before ? chunk_most : before;
  floats total = all(0);
  for (int64_t i = 0; i < CHUNK_POSITIONS / LANES; i++) {
    floats weight = i < num_vectors ? exponential(scaled[i] - now) : all(0);
    total = total + weight;
    TYPED(store)(weights + i * LANES, weight, LANES);
  }
  if (now != before) {
    const floats correction = exponential(all(before - now));
    *sum = *sum * correction;
    for (int64_t d = 0; d < out_width; d += LANES) store_floats(out + d, load_floats(out + d) * correction);
    *largest = now;
  }
  *sum = *sum + total;
}

typedef struct {
  uint32_t *queries, *keys, *values;
  ELEMENT *weights;
  float *scores, *out, *largest;
  floats *sums;
} TYPED(Room);

static int64_t TYPED(room_bytes)(int64_t head_words, int64_t out_width) {
  return 4 * (MAX_TILE_ROWS * head_words + CHUNK_POSITIONS * head_words + out_width * CHUNK_WORDS +
              MAX_TILE_ROWS * (CHUNK_WORDS + CHUNK_POSITIONS + out_width + LANES + LANES));
}

static TYPED(Room) TYPED(room)(char *memory, int64_t head_words, int64_t out_width) {
  TYPED(Room) room;
  room.sums = (floats *)memory;
  room.out = (float *)(room.sums + MAX_TILE_ROWS);
  room.scores = room.out + MAX_TILE_ROWS * out_width;
  room.queries = (uint32_t *)(room.scores + MAX_TILE_ROWS * CHUNK_POSITIONS);
  room.keys = room.queries + MAX_TILE_ROWS * head_words;
  room.values = room.keys + CHUNK_POSITIONS * head_words;
  room.weights = (ELEMENT *)(room.values + out_width * CHUNK_WORDS);
  room.largest = (float *)(room.weights + MAX_TILE_ROWS * CHUNK_POSITIONS);
  return room;
}

/* Keys and values of the chunk's positions; those after the last visible one are zero. */
static void TYPED(gather)(const TYPED(Room) *room, const Cache *cache, const Tile *tile, const int64_t *tables,
                          int64_t head, int64_t first, int64_t num_positions) {
  static const ELEMENT zeros[MAX_HEAD_DIM];
  const ELEMENT *keys[CHUNK_POSITIONS], *values[CHUNK_POSITIONS];
  const int64_t head_words = divide_up(cache->head_dim, WORD_ELEMENTS);
  const int64_t num_padded = divide_up(num_positions, 2 * LANES) * 2 * LANES;
  for (int64_t i = 0; i < num_padded; i++) {
    const int64_t position = first + i;
    keys[i] = values[i] = zeros;
    if (i < num_positions) {
      const int64_t block = tables[tile->table + position / cache->block_size];
      const int64_t row = (block * cache->num_heads + head) * cache->block_size + position % cache->block_size;
      keys[i] = (const ELEMENT *)cache->keys + row * cache->head_dim;
      values[i] = (const ELEMENT *)cache->values + row * cache->head_dim;
    }
  }
  for (int64_t i = 0; i < num_padded; i += LANES)
    TYPED(turn_keys)(keys + i, cache->head_dim, room->keys + i * head_words);
  TYPED(lay_values)(values, num_padded / WORD_ELEMENTS, cache->head_dim, room->values);
}

/* One tile's queries of one KV head against everything that they see. */
static void TYPED(attend_tile)(const TYPED(Room) *room, const Cache *cache, const Tile *tile, const int64_t *tables,
                               int64_t head, const ELEMENT *q, int64_t num_query_heads, float scale, ELEMENT *out,
                               float *log_sum_exp) {
  const int64_t group_size = num_query_heads / cache->num_heads, head_dim = cache->head_dim;
  const int64_t head_words = divide_up(head_dim, WORD_ELEMENTS), out_width = divide_up(head_dim, 2 * LANES) * 2 * LANES;
  const Rows rows = cut_rows(tile->num_tokens * group_size, 1, 1);
  for (int64_t group = 0; group < rows.num_groups; group++)
    for (int64_t row = first_row(rows, group), m = 0; m < rows_in(rows, group); m++, row++) {
      const int64_t query = (tile->first_token + row / group_size) * num_query_heads + head * group_size + row % group_size;
      TYPED(pack_row)(q + query * head_dim, head_dim, rows_in(rows, group),
                      room->queries + first_row(rows, group) * head_words + m);
    }
  for (int64_t row = 0; row < rows.num_rows; row++) {
    room->largest[row] = -INFINITY;
    room->sums[row] = all(0);
    memset(room->out + row * out_width, 0, (size_t)out_width * 4);
  }
  const int64_t num_positions = tile->num_visible + tile->num_tokens - 1;
  for (int64_t first = 0; first < num_positions; first += CHUNK_POSITIONS) {
    const int64_t present = smaller(CHUNK_POSITIONS, num_positions - first);
    const int64_t num_words = divide_up(present, WORD_ELEMENTS);
    TYPED(gather)(room, cache, tile, tables, head, first, present);
    for (int64_t group = 0; group < rows.num_groups; group++) {
      const int64_t base = first_row(rows, group), count = rows_in(rows, group);
      if (tile->num_visible + (base + count - 1) / group_size <= first) continue;
      for (int64_t i = 0; i < present; i += 2 * LANES)
        TYPED(multiply_packed)((int)count, room->queries + base * head_words, room->keys + i * head_words,
                               room->keys + (i + LANES) * head_words, head_words,
                               room->scores + base * CHUNK_POSITIONS + i, CHUNK_POSITIONS, 0);
      for (int64_t row = base; row < base + count; row++) {
        const int64_t visible = tile->num_visible + row / group_size - first;
        if (visible > 0)
          TYPED(soften)(room->scores + row * CHUNK_POSITIONS, visible, scale, room->largest + row, room->sums + row,
                        room->out + row * out_width, out_width, room->weights + row * CHUNK_POSITIONS);
        else
          memset(room->weights + row * CHUNK_POSITIONS, 0, CHUNK_POSITIONS * sizeof(ELEMENT));
      }
      for (int64_t d = 0; d < out_width; d += 2 * LANES) {
        const uint32_t *left = room->values + d / LANES * CHUNK_WORDS * LANES;
        const uint32_t *right = d + LANES < head_dim ? left + CHUNK_WORDS * LANES : left;
        TYPED(multiply_weights)((int)count, (const uint32_t *)(room->weights + base * CHUNK_POSITIONS), left, right,
                                num_words, room->out + base * out_width + d, out_width, 1);
      }
    }
  }
  for (int64_t row = 0; row < rows.num_rows; row++) {
    const int64_t query = (tile->first_token + row / group_size) * num_query_heads + head * group_size + row % group_size;
    const float sum = sum_of(room->sums[row]);
    for (int64_t d = 0; d < head_dim; d += LANES)
      TYPED(store)(out + query * head_dim + d, load_floats(room->out + row * out_width + d) / sum, head_dim - d);
    if (log_sum_exp) log_sum_exp[query] = room->largest[row] + logf(sum);
  }
}

/* q and out [tokens, num_query_heads, head_dim]; log_sum_exp [tokens, num_query_heads] or NULL. 0, or 1 without
 * memory. */
int TYPED(attend)(const ELEMENT *q, int64_t num_query_heads, const ELEMENT *keys, const ELEMENT *values,
                  int64_t num_kv_heads, int64_t block_size, int64_t head_dim, const Tile *tiles, int64_t num_tiles,
                  const int64_t *tables, float scale, ELEMENT *out, float *log_sum_exp, int num_threads) {
  const Cache cache = {keys, values, num_kv_heads, block_size, head_dim};
  const int64_t head_words = divide_up(head_dim, WORD_ELEMENTS);
  const int64_t out_width = divide_up(head_dim, 2 * LANES) * 2 * LANES;
  const int64_t num_tasks = num_tiles * num_kv_heads;
  Counter counter = {0};
  int failed = 0;
#pragma omp parallel if (num_threads > 1 && num_tasks > 1) num_threads(num_threads)
  {
    char *memory = workspace(1, TYPED(room_bytes)(head_words, out_width));
    if (memory) {
      const TYPED(Room) room = TYPED(room)(memory, head_words, out_width);
      FOR_EACH_TASK(task, counter, num_tasks)
      TYPED(attend_tile)(&room, &cache, tiles + task / num_kv_heads, tables, task % num_kv_heads, q,
                         num_query_heads, scale, out, log_sum_exp);
    } else {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  }
  return failed;
}

#undef CHUNK_WORDS
#undef MULTIPLY_CASE
#undef MULTIPLY_CASES
#undef LARGEST
