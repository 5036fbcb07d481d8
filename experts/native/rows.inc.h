/* Rows of one element type; see rows.c. Numbers are widened, computed with in float and rounded once, to even. */

#if WORD_ELEMENTS == 1
static inline float TYPED(widened)(ELEMENT value) { return value; }
static inline ELEMENT TYPED(narrowed)(float value) { return value; }
#else
static inline float TYPED(widened)(ELEMENT value) {
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static inline ELEMENT TYPED(narrowed)(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (ELEMENT)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
#endif

/* sort_copies, then each row of [R, width]: its token's state times the score of its copy. */
int64_t TYPED(sort_rows)(const ELEMENT *x, int64_t width, const int64_t *ids, const float *scores, int64_t num_tokens,
                         int64_t top_k, const int64_t *rank_of_expert, int64_t num_experts, int64_t num_ranks,
                         int64_t *starts, int64_t *row_of_copy, int64_t *copy_of_row, int64_t *spans, ELEMENT *rows) {
  int64_t num_spans = sort_copies(ids, num_tokens, top_k, rank_of_expert, num_experts, num_ranks, starts, row_of_copy,
                                  copy_of_row, spans);
  if (num_spans < 0) return num_spans;
  for (int64_t row = 0; row < num_tokens * top_k; row++) {
    int64_t copy = copy_of_row[row];
    const ELEMENT *from = x + copy / top_k * width;
    float score = TYPED(widened)(TYPED(narrowed)(scores[copy]));
    ELEMENT *to = rows + row * width;
    for (int64_t i = 0; i < width; i++) to[i] = TYPED(narrowed)(TYPED(widened)(from[i]) * score);
  }
  return num_spans;
}

/* y [T, width]: each token's rows, summed in the order of row_of_copy; a lone one as it is. */
void TYPED(combine_rows)(const ELEMENT *rows, int64_t width, const int64_t *row_of_copy, int64_t num_tokens,
                         int64_t top_k, ELEMENT *y) {
  for (int64_t token = 0; token < num_tokens; token++) {
    const int64_t *own = row_of_copy + token * top_k;
    ELEMENT *to = y + token * width;
    if (top_k == 1) {
      memcpy(to, rows + own[0] * width, (size_t)width * sizeof *to);
      continue;
    }
    for (int64_t i = 0; i < width; i++) {
      float sum = 0;
      for (int64_t k = 0; k < top_k; k++) sum += TYPED(widened)(rows[own[k] * width + i]);
      to[i] = TYPED(narrowed)(sum);
    }
  }
}
