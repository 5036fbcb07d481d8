/* Norms, positions and choices of a layer: each result depends on its own row alone. */

#include "team.h"

#define TYPED(name) name##_float
#define ELEMENT float
#define WORD_ELEMENTS 1
#include "layer.inc.h"
#undef TYPED
#undef ELEMENT
#undef WORD_ELEMENTS

#define TYPED(name) name##_bfloat16
#define ELEMENT uint16_t
#define WORD_ELEMENTS 2
#include "layer.inc.h"

/* The num_chosen largest of each row of logits [num_rows, width], largest first, of equal ones the first; a NaN counts
 * as largest. ids and scores [num_rows, num_chosen]: which they are, and their sigmoid. */
void choose_experts(const float *logits, int64_t num_rows, int64_t width, int64_t num_chosen, int64_t *ids,
                    float *scores) {
  for (int64_t row = 0; row < num_rows; row++, logits += width, ids += num_chosen, scores += num_chosen)
    for (int64_t choice = 0; choice < num_chosen; choice++) {
      int64_t best = -1;
      for (int64_t i = 0; i < width; i++) {
        int taken = 0;
        for (int64_t earlier = 0; earlier < choice; earlier++) taken |= ids[earlier] == i;
        if (taken) continue;
        if (best < 0 || logits[i] > logits[best] || (logits[i] != logits[i] && logits[best] == logits[best])) best = i;
      }
      ids[choice] = best;
      float score[LANES];
      store_floats(score, all(1) / (all(1) + exponential(all(-logits[best]))));
      scores[choice] = score[0];
    }
}

/* Each row's largest number, NaN if it has one, and where it first is. rows [num_rows, width]. */
void largest_of_rows(const float *rows, int64_t num_rows, int64_t width, float *largest, int64_t *places,
                     int num_threads) {
#pragma omp parallel for if (num_threads > 1 && num_rows * width > 65536) num_threads(num_threads)
  for (int64_t row = 0; row < num_rows; row++) {
    const float *x = rows + row * width;
    floats most = all(-INFINITY), poison = all(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      const floats value = load_floats(x + i);
      most = choose(value > most, value, most);
      poison = poison + value * 0.0f;
    }
    float best = largest_of(most), rest = sum_of(poison);
    for (; i < width; i++) {
      best = x[i] > best ? x[i] : best;
      rest += x[i] * 0.0f;
    }
    int64_t place = 0;
    if (rest != rest)
      for (int64_t k = 0; k < width; k++)
        if (x[k] != x[k]) best = x[k];
    while (place < width && !(x[place] == best || (best != best && x[place] != x[place]))) place++;
    largest[row] = best;
    places[row] = smaller(place, width - 1);
  }
}
