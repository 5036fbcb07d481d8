/* What lies between the products of a layer, for one element type; see layer.c. */

#include "elements.h"

/* y = x / rms(x), rounded to the element, times weight. x and y [num_rows, width]. */
void TYPED(rms_norm)(const ELEMENT *x, int64_t num_rows, int64_t width, const ELEMENT *weight, float eps, ELEMENT *y,
                     int num_threads) {
#pragma omp parallel for if (num_threads > 1 && num_rows > 16) num_threads(num_threads)
  for (int64_t row = 0; row < num_rows; row++) {
    const ELEMENT *from = x + row * width;
    ELEMENT *to = y + row * width;
    floats squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
      const floats value = TYPED(load)(from + i, width - i);
      squares = squares + value * value;
    }
    const float factor = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
      const floats normed = TYPED(rounded)(TYPED(load)(from + i, width - i) * factor);
      TYPED(store)(to + i, normed * TYPED(load)(weight + i, width - i), width - i);
    }
  }
}

/* Pairs (2j, 2j + 1) of one head rotated, then made unit length if the model does so: eps < 0 says it does not. */
INLINE void TYPED(rotate)(const ELEMENT *x, int64_t width, const float *cosine, const float *sine, float eps, ELEMENT *y) {
  float squares = 0;
  for (int64_t j = 0; j < width / 2; j++) {
    const float even = TYPED(one)(x[2 * j]), odd = TYPED(one)(x[2 * j + 1]);
    y[2 * j] = TYPED(element)(even * cosine[j] - odd * sine[j]);
    y[2 * j + 1] = TYPED(element)(even * sine[j] + odd * cosine[j]);
  }
  if (eps < 0) return;
  for (int64_t i = 0; i < width; i++) squares += TYPED(one)(y[i]) * TYPED(one)(y[i]);
  const float factor = 1.0f / sqrtf(squares / (float)width + eps);
  for (int64_t i = 0; i < width; i++) y[i] = TYPED(element)(TYPED(one)(y[i]) * factor);
}

INLINE void TYPED(scale)(const ELEMENT *x, int64_t width, float factor, ELEMENT *y) {
  for (int64_t i = 0; i < width; i++) y[i] = TYPED(element)(TYPED(one)(x[i]) * factor);
}

/* A NaN value would reach the block's next owner: a weight of zero does not cancel it. Infinities would become one. */
INLINE void TYPED(keep_finite)(const ELEMENT *x, int64_t width, ELEMENT *y) {
  for (int64_t i = 0; i < width; i++) {
    const float value = TYPED(one)(x[i]);
    const float least = value < -LARGEST ? -LARGEST : value;
    y[i] = value != value ? 0 : TYPED(element)(least > LARGEST ? LARGEST : least);
  }
}

/* Queries to q [num_tokens, heads, head_dim], keys and values to their place in the cache. projected has the query
 * heads, then key heads, then value heads of each token; slots [num_tokens] count positions through all blocks.
 * With cosines and sines [num_tokens, head_dim / 2] queries and keys are rotated, else queries are multiplied by
 * factors [num_tokens]; where both are NULL they stay. */
void TYPED(position)(const ELEMENT *projected, int64_t num_tokens, int64_t num_query_heads, ELEMENT *keys, ELEMENT *values,
                     int64_t num_kv_heads, int64_t block_size, int64_t head_dim, const int64_t *slots,
                     const float *cosines, const float *sines, float eps, const float *factors, ELEMENT *q,
                     int num_threads) {
  const int64_t width = head_dim;
  const int64_t num_heads = num_query_heads + 2 * num_kv_heads;
#pragma omp parallel for if (num_threads > 1 && num_tokens > 16) num_threads(num_threads)
  for (int64_t token = 0; token < num_tokens; token++) {
    const ELEMENT *from = projected + token * num_heads * width;
    const float *cosine = cosines ? cosines + token * (width / 2) : NULL;
    const float *sine = sines ? sines + token * (width / 2) : NULL;
    ELEMENT *to = q + token * num_query_heads * width;
    for (int64_t head = 0; head < num_query_heads; head++, from += width, to += width) {
      if (cosine) TYPED(rotate)(from, width, cosine, sine, eps, to);
      else if (factors) TYPED(scale)(from, width, factors[token], to);
      else memcpy(to, from, (size_t)width * sizeof *to);
    }
    const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
    for (int64_t head = 0; head < num_kv_heads; head++, from += width) {
      const int64_t row = (block * num_kv_heads + head) * block_size + offset;
      ELEMENT *key = keys + row * width;
      if (cosine) TYPED(rotate)(from, width, cosine, sine, eps, key);
      else memcpy(key, from, (size_t)width * sizeof *key);
      TYPED(keep_finite)(from + num_kv_heads * width, width, values + row * width);
    }
  }
}

#undef LARGEST
