/* Rows on their way to experts and back: scaled, sorted by rank, put back in place and summed up.
 *
 * The plain form, with the same bits, is experts/routed_rows.py and experts/row_plan.py.
 */

#include <stdint.h>
#include <string.h>

/* Experts of one token at most. */
#define MAX_TOP_K 64

/* Groups R = num_tokens * top_k copies by the rank of their expert, stably. Where a copy goes: row_of_copy, a token's
 * in the order of its expert ids. starts has num_ranks + 1 places; spans gets (rank, first row, row behind the last)
 * of each rank that has rows. Returns how many spans there are, -1 if an id is none of the experts. */
static int64_t sort_copies(const int64_t *ids, int64_t num_tokens, int64_t top_k, const int64_t *rank_of_expert,
                           int64_t num_experts, int64_t num_ranks, int64_t *starts, int64_t *row_of_copy,
                           int64_t *copy_of_row, int64_t *spans) {
  int64_t num_rows = num_tokens * top_k, num_spans = 0;
  memset(starts, 0, (size_t)(num_ranks + 1) * sizeof *starts);
  for (int64_t copy = 0; copy < num_rows; copy++) {
    if (ids[copy] < 0 || ids[copy] >= num_experts) return -1;
    starts[rank_of_expert[ids[copy]] + 1]++;
  }
  for (int64_t rank = 0; rank < num_ranks; rank++) {
    starts[rank + 1] += starts[rank];
    if (starts[rank + 1] == starts[rank]) continue;
    int64_t *span = spans + 3 * num_spans++;
    span[0] = rank, span[1] = starts[rank], span[2] = starts[rank + 1];
  }
  for (int64_t token = 0; token < num_tokens; token++) {
    const int64_t *own = ids + token * top_k;
    int64_t by_id[MAX_TOP_K];
    for (int64_t k = 0; k < top_k; k++) {
      int64_t row = starts[rank_of_expert[own[k]]]++, place = k;
      copy_of_row[row] = token * top_k + k;
      for (; place > 0 && own[by_id[place - 1]] > own[k]; place--) {
        by_id[place] = by_id[place - 1];
        row_of_copy[token * top_k + place] = row_of_copy[token * top_k + place - 1];
      }
      by_id[place] = k;
      row_of_copy[token * top_k + place] = row;
    }
  }
  return num_spans;
}

#define TEMPLATE "rows.inc.h"
#include "each_element.h"
