/* Norms, positions and maxima: each result depends on its own row alone. */

#include "team.h"

#define TEMPLATE "layer.inc.h"
#include "each_element.h"

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
