/* The inner loop, once per element type: include after elements.h.
 *
 *     c[m][0..16)  (+)= sum over k of x[k][m] * left[k][0..16)      k: words
 *     c[m][16..32) (+)= sum over k of x[k][m] * right[k][0..16)
 */

INLINE floats TYPED(add_product)(floats sum, words w, uint32_t x) {
#if WORD_ELEMENTS == 1
  float factor;
  memcpy(&factor, &x, sizeof factor);
  return sum + (floats)w * factor;
#elif defined(__AVX512BF16__)
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
  sum = sum + (floats)(w << 16) * float_of((uint16_t)x);
  return sum + (floats)(w & 0xffff0000u) * float_of((uint16_t)(x >> 16));
#endif
}

/* Word k of row m is x[k * step_k + m * step_m]; at least one of the steps is a constant where this is inlined. */
INLINE void TYPED(multiply)(const int rows, const uint32_t *x, const int64_t step_k, const int64_t step_m,
                            const uint32_t *left, const uint32_t *right, int64_t num_words, float *c, int64_t step_c,
                            int adds) {
  floats sum[MAX_ROWS][2];
  for (int m = 0; m < rows; m++) {
    sum[m][0] = adds ? load_floats(c + m * step_c) : all(0);
    sum[m][1] = adds ? load_floats(c + m * step_c + LANES) : all(0);
  }
  for (int64_t k = 0; k < num_words; k++) {
    words w0 = load_words(left + k * LANES), w1 = load_words(right + k * LANES);
    for (int m = 0; m < rows; m++) {
      uint32_t factor = x[k * step_k + m * step_m];
      sum[m][0] = TYPED(add_product)(sum[m][0], w0, factor);
      sum[m][1] = TYPED(add_product)(sum[m][1], w1, factor);
    }
  }
  for (int m = 0; m < rows; m++) {
    store_floats(c + m * step_c, sum[m][0]);
    store_floats(c + m * step_c + LANES, sum[m][1]);
  }
}

#define MULTIPLY_CASE(rows)                                                                              \
  case rows:                                                                                             \
    TYPED(multiply)(rows, x, KSTEP(rows), MSTEP(rows), left, right, num_words, c, step_c, adds);          \
    break;
#ifdef __AVX512F__
#define MULTIPLY_CASES \
  MULTIPLY_CASE(1) MULTIPLY_CASE(2) MULTIPLY_CASE(3) MULTIPLY_CASE(4) MULTIPLY_CASE(5) MULTIPLY_CASE(6) \
  MULTIPLY_CASE(7) MULTIPLY_CASE(8) MULTIPLY_CASE(9) MULTIPLY_CASE(10) MULTIPLY_CASE(11) MULTIPLY_CASE(12)
#else
#define MULTIPLY_CASES MULTIPLY_CASE(1) MULTIPLY_CASE(2) MULTIPLY_CASE(3)
#endif

/* x in words [num_words][rows]. */
static void TYPED(multiply_packed)(int rows, const uint32_t *x, const uint32_t *left, const uint32_t *right,
                                   int64_t num_words, float *c, int64_t step_c, int adds) {
#define KSTEP(rows) rows
#define MSTEP(rows) 1
  switch (rows) { MULTIPLY_CASES }
#undef KSTEP
#undef MSTEP
}

/* A row of x into every `step`th word from `packed` on, a last half word filled up with zero. */
INLINE void TYPED(pack_row)(const ELEMENT *row, int64_t num_elements, int64_t step, uint32_t *packed) {
  const int64_t whole = num_elements / WORD_ELEMENTS;
  for (int64_t k = 0; k < whole; k++) memcpy(packed + k * step, row + k * WORD_ELEMENTS, 4);
  if (whole * WORD_ELEMENTS < num_elements) {
    packed[whole * step] = 0;
    memcpy(packed + whole * step, row + whole * WORD_ELEMENTS, sizeof(ELEMENT));
  }
}
