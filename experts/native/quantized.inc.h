/* Matrices of whole numbers of BITS bits (8, 4) with a scale: include with FORMATTED(name) and BITS, after multiply.h.
 *
 * A panel of 16 outputs is a row of segments, each with one scale per output, 16 floats, and the numbers of SEGMENT
 * inputs or what is left of them. Numbers lie in units of 64 bytes, each of which expands to UNIT_WORDS words as an
 * unquantised panel has them (quantized_layout.py is who makes them):
 *
 *     8 bits, float     4 words: [4][16 lanes] bytes
 *     8 bits, bfloat16  2 words: of each 16 bytes the first 8 belong to the first word; the top bit is the sign
 *     4 bits            word j is in bits 4j.. of the 16 (float) or 32 (bfloat16) elements of the unit, plus 8
 *
 * Whole numbers of 8 bits are exact in both element types, so what is rounded is the sum of the products alone. A
 * segment's sum is scaled and added to that of the segments before it: in this order whoever computes it.
 */

#define UNIT_WORDS (4 * 8 / BITS / WORD_ELEMENTS)
#define UNIT_BYTES 64
#define SCALE_BYTES (LANES * 4)
#define SEGMENT_WORDS ((BITS == 4 ? 64 : 256) / WORD_ELEMENTS)
/* As many groups of rows expand words each for itself; more have them expanded once. */
#define FEW_GROUPS 2

INLINE words FORMATTED(expand)(words unit, const int j) {
#if BITS == 4 && WORD_ELEMENTS == 1
  return (words)(__builtin_convertvector((ints)(unit >> (uint32_t)(4 * j) & 15), floats) - all(8));
#elif BITS == 4 && defined(__AVX512BF16__)
  /* The index is the low 5 bits of an element: the fifth is a neighbour's, so each entry is there twice. */
  const __m512i table = _mm512_set_epi32(
      0x40E040C0, 0x40A04080, 0x40404000, 0x3F800000, (int)0xBF80C000, (int)0xC040C080, (int)0xC0A0C0C0, (int)0xC0E0C100,
      0x40E040C0, 0x40A04080, 0x40404000, 0x3F800000, (int)0xBF80C000, (int)0xC040C080, (int)0xC0A0C0C0, (int)0xC0E0C100);
  return (words)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)unit, (unsigned)(4 * j)), table);
#elif BITS == 4
  const words both = unit >> (uint32_t)(4 * j);
  const words low = (words)(__builtin_convertvector((ints)(both & 15), floats) - all(8));
  const words high = (words)(__builtin_convertvector((ints)(both >> 16 & 15), floats) - all(8));
  return high | low >> 16;
#elif WORD_ELEMENTS == 1
  typedef int8_t quarter __attribute__((vector_size(16)));
  quarter bytes;
  memcpy(&bytes, (const char *)&unit + 16 * j, sizeof bytes);
  return (words)__builtin_convertvector(bytes, floats);
#elif defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  static const struct { uint8_t high[128], low[128]; } table __attribute__((aligned(64))) = MAGNITUDES;
  const __m512i *tables = (const __m512i *)&table;
  const __m512i index = (__m512i)unit;
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(tables), index, _mm512_load_si512(tables + 1));
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(tables + 2), index, _mm512_load_si512(tables + 3));
  high = _mm512_ternarylogic_epi32(high, index, _mm512_set1_epi8((char)0x80), 0xF8); /* high | index & 0x80 */
  return (words)(j ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
#else
  typedef uint8_t eighth __attribute__((vector_size(8)));
  typedef uint32_t eight_words __attribute__((vector_size(32)));
  typedef float eight_floats __attribute__((vector_size(32)));
  typedef uint16_t eight_halves __attribute__((vector_size(16)));
  words expanded;
  for (int part = 0; part < 4; part++) {
    eighth bytes;
    memcpy(&bytes, (const char *)&unit + 16 * part + 8 * j, sizeof bytes);
    const eight_words wide = __builtin_convertvector(bytes, eight_words);
    const eight_words magnitude = (eight_words)__builtin_convertvector(wide & 127, eight_floats);
    const eight_halves number = __builtin_convertvector((magnitude >> 16) | (wide & 128) << 8, eight_halves);
    memcpy((char *)&expanded + 16 * part, &number, sizeof number);
  }
  return expanded;
#endif
}

/* num_words, here and below, is of the input; always whole units. */
INLINE const void *FORMATTED(panel_of)(const void *weight, int64_t panel, int64_t num_words) {
  const int64_t num_segments = divide_up(num_words, SEGMENT_WORDS);
  return (const char *)weight + panel * (num_segments * SCALE_BYTES + num_words / UNIT_WORDS * UNIT_BYTES);
}

/* Where the numbers of a segment are: in units behind its scales, or expanded to words. */
typedef struct {
  const char *left_scale, *right_scale, *left, *right;
} FORMATTED(Segment);

INLINE FORMATTED(Segment) FORMATTED(segment_at)(const char *left, const char *right, int64_t first_word) {
  const int64_t offset = first_word / SEGMENT_WORDS * SCALE_BYTES + first_word / UNIT_WORDS * UNIT_BYTES;
  return (FORMATTED(Segment)){left + offset, right + offset, left + offset + SCALE_BYTES, right + offset + SCALE_BYTES};
}

/* c[row][0..32) += scale * sum, of a segment. */
INLINE void FORMATTED(multiply)(const int rows, const int is_expanded, const uint32_t *x,
                                const FORMATTED(Segment) *segment, int64_t num_words, float *c) {
  floats sum[MAX_ROWS][2];
  for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = all(0);
  for (int64_t k = 0; k < num_words; k += UNIT_WORDS)
#pragma GCC unroll 8
    for (int j = 0; j < UNIT_WORDS; j++) {
      const int64_t at = is_expanded ? (k + j) * LANES * 4 : k / UNIT_WORDS * UNIT_BYTES;
      words w0 = load_words(segment->left + at), w1 = load_words(segment->right + at);
      if (!is_expanded) w0 = FORMATTED(expand)(w0, j), w1 = FORMATTED(expand)(w1, j);
      for (int m = 0; m < rows; m++) {
        const uint32_t factor = x[(k + j) * rows + m];
        sum[m][0] = TYPED(add_product)(sum[m][0], w0, factor);
        sum[m][1] = TYPED(add_product)(sum[m][1], w1, factor);
      }
    }
  const floats left_scale = load_floats((const float *)segment->left_scale);
  const floats right_scale = load_floats((const float *)segment->right_scale);
  for (int m = 0; m < rows; m++) {
    float *row = c + m * 2 * LANES;
    store_floats(row, load_floats(row) + sum[m][0] * left_scale);
    store_floats(row + LANES, load_floats(row + LANES) + sum[m][1] * right_scale);
  }
}

/* A group of rows with the whole input: each word is expanded where it is multiplied. */
INLINE void FORMATTED(multiply_units)(const int rows, const uint32_t *x, const char *left, const char *right,
                                      int64_t num_words, float *c) {
  for (int64_t first = 0; first < num_words; first += SEGMENT_WORDS) {
    const FORMATTED(Segment) segment = FORMATTED(segment_at)(left, right, first);
    FORMATTED(multiply)(rows, 0, x + first * rows, &segment, smaller(SEGMENT_WORDS, num_words - first), c);
  }
}

#define UNITS_CASE(rows)                                           \
  case rows:                                                       \
    FORMATTED(multiply_units)(rows, x, left, right, num_words, c); \
    break;
#define WORDS_CASE(rows)                                           \
  case rows:                                                       \
    FORMATTED(multiply)(rows, 1, x, segment, num_words, c);        \
    break;
#ifdef __AVX512F__
#define CASES(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define CASES(CASE) CASE(1) CASE(2) CASE(3)
#endif

static void FORMATTED(multiply_few)(int rows, const uint32_t *x, const char *left, const char *right,
                                    int64_t num_words, float *c) {
  switch (rows) { CASES(UNITS_CASE) }
}

static void FORMATTED(multiply_expanded)(int rows, const uint32_t *x, const FORMATTED(Segment) *segment,
                                         int64_t num_words, float *c) {
  switch (rows) { CASES(WORDS_CASE) }
}

INLINE void FORMATTED(expand_words)(const char *units, int64_t num_words, uint32_t *to) {
  for (int64_t k = 0; k < num_words; k += UNIT_WORDS, units += UNIT_BYTES) {
    const words unit = load_words(units);
#pragma GCC unroll 8
    for (int j = 0; j < UNIT_WORDS; j++) {
      const words expanded = FORMATTED(expand)(unit, j);
      memcpy(to + (k + j) * LANES, &expanded, sizeof expanded);
    }
  }
}

/* Many groups of rows: a segment's words are expanded once for all of them. */
static void FORMATTED(multiply_many)(const uint32_t *x, Rows rows, int64_t from, int64_t to, const char *left,
                                     const char *right, int64_t num_words, float *c) {
  uint32_t expanded[2][SEGMENT_WORDS * LANES] __attribute__((aligned(64)));
  const int64_t base = first_row(rows, from);
  for (int64_t k = 0; k < num_words; k += SEGMENT_WORDS) {
    const int64_t count = smaller(SEGMENT_WORDS, num_words - k);
    FORMATTED(Segment) segment = FORMATTED(segment_at)(left, right, k);
    FORMATTED(expand_words)(segment.left, count, expanded[0]);
    FORMATTED(expand_words)(segment.right, count, expanded[1]);
    segment.left = (const char *)expanded[0], segment.right = (const char *)expanded[1];
    for (int64_t group = from; group < to; group++) {
      const int64_t first = first_row(rows, group);
      const int in_group = rows_in(rows, group);
      FORMATTED(multiply_expanded)(in_group, x + first * num_words + k * in_group, &segment, count,
                                   c + (first - base) * 2 * LANES);
    }
  }
}

/* As the one of unquantised matrices (matmul.inc.h). */
static void FORMATTED(multiply_chunk)(const uint32_t *packed_x, Rows rows, int64_t chunk, const void *left,
                                      const void *right, int64_t num_words, float *c) {
  const int64_t from = chunk * rows.chunk_groups, to = smaller(from + rows.chunk_groups, rows.num_groups);
  const int64_t base = first_row(rows, from);
  memset(c, 0, (size_t)(first_row(rows, to) - base) * 2 * LANES * sizeof *c);
  if (to - from > FEW_GROUPS) {
    FORMATTED(multiply_many)(packed_x, rows, from, to, left, right, num_words, c);
    return;
  }
  for (int64_t group = from; group < to; group++) {
    const int64_t first = first_row(rows, group);
    FORMATTED(multiply_few)(rows_in(rows, group), packed_x + first * num_words, left, right, num_words,
                            c + (first - base) * 2 * LANES);
  }
}

#undef CASES
#undef UNITS_CASE
#undef WORDS_CASE
#undef UNIT_WORDS
#undef UNIT_BYTES
#undef SCALE_BYTES
#undef SEGMENT_WORDS
#undef FEW_GROUPS
