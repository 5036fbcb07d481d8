/* What all kernels share: vectors of 16 lanes, the two element types, and the one loop that multiplies.
 *
 * Matrices are read in words of 32 bits: one float, or two neighbouring bfloat16. A product of words is added to a
 * float accumulator in one step, one word after the other, so a result's bits depend on the two vectors that are
 * multiplied and on nothing else: not on how many rows go together, nor on who computes them.
 *
 * Written with GCC's vector extension, which every instruction set has code for; what needs a special instruction to
 * be fast has it where there is one.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

/* Rows that are multiplied at the same time: as many as there are registers for two accumulators each. */
#ifdef __AVX512F__
#define MAX_ROWS 12
#else
#define MAX_ROWS 3
#endif

INLINE words load_words(const void *from) {
  words loaded;
  memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

INLINE floats load_floats(const float *from) {
  floats loaded;
  memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

INLINE void store_floats(float *to, floats value) { memcpy(to, &value, sizeof value); }

INLINE floats all(float value) { return value - (floats){0}; }

INLINE floats choose(ints condition, floats yes, floats no) {
  return (floats)(((ints)yes & condition) | ((ints)no & ~condition));
}

/* bfloat16: the upper half of a float, rounded to nearest even; a NaN stays one. */

INLINE uint16_t half_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return (uint16_t)(bits >> 16) | 0x40;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float float_of(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE halves halves_of(floats value) {
  words bits = (words)value;
  words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  words nan = bits >> 16 | 0x40;
  ints is_nan = value != value;
  words chosen = (rounded & ~(words)is_nan) | (nan & (words)is_nan);
  return __builtin_convertvector(chosen, halves);
}

INLINE floats floats_of(halves value) { return (floats)(__builtin_convertvector(value, words) << 16); }

/* exp to about one unit in the last place; 0 below -87.3, where the exact value is next to nothing; NaN of NaN. */
INLINE floats exponential(floats x) {
  const floats log2e = all(1.44269504088896341f);
  const floats given = x;
  ints tiny = x < all(-87.3f);
  x = choose(tiny, all(-87.3f), x);
  x = choose(x > all(88.3f), all(88.3f), x);
  floats shifted = x * log2e + all(12582912.0f);
  floats n = shifted - all(12582912.0f);
  floats r = x - n * all(0.693359375f);
  r = r - n * all(-2.12194440e-4f);
  floats p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  ints exponent = ((ints)shifted - 0x4b400000) << 23;
  floats power = choose(tiny, all(0.0f), (floats)((ints)p + exponent));
  return choose(given != given, given, power);
}

INLINE float sum_of(floats value) {
  float parts[LANES];
  store_floats(parts, value);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) parts[i] += parts[i + step];
  return parts[0];
}

INLINE float largest_of(floats value) {
  float parts[LANES];
  store_floats(parts, value);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) parts[i] = parts[i] > parts[i + step] ? parts[i] : parts[i + step];
  return parts[0];
}

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

/* Memory that a thread keeps from call to call; what it held is lost when it has to grow. NULL without memory. */
INLINE void *workspace(int which, int64_t num_bytes) {
  static __thread struct { void *memory; int64_t num_bytes; } kept[2];
  if (kept[which].num_bytes < num_bytes) {
    free(kept[which].memory);
    kept[which].num_bytes = (num_bytes + 4095) / 4096 * 4096;
    kept[which].memory = aligned_alloc(4096, (size_t)kept[which].num_bytes);
    if (!kept[which].memory) kept[which].num_bytes = 0;
  }
  return kept[which].memory;
}

INLINE int64_t at_least_one(int64_t number) { return number > 1 ? number : 1; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
