/* Work cut into tasks that threads take one after the other, and rows cut into groups and chunks. */
#pragma once

#include "words.h"

/* Rows of one task at most: their inputs and sums stay in the second level of a core's cache. */
#define CHUNK_GROUPS 16

typedef struct {
  int64_t next;
} Counter;

#define FOR_EACH_TASK(task, counter, num_tasks) \
  for (int64_t task; (task = __atomic_fetch_add(&(counter).next, 1, __ATOMIC_RELAXED)) < (num_tasks);)

/* Groups of rows that are multiplied together, as few as can be and about equally large. */
typedef struct {
  int64_t num_rows, num_groups, chunk_groups, num_chunks;
} Rows;

/* Few rows are one chunk, and so are many if that makes work enough for all. */
INLINE Rows cut_rows(int64_t num_rows, int64_t num_panels, int64_t num_threads) {
  int64_t num_groups = divide_up(num_rows, MAX_ROWS);
  int64_t num_chunks = divide_up(num_groups, CHUNK_GROUPS);
  while (num_chunks < num_groups && num_chunks * num_panels < 2 * num_threads) num_chunks++;
  int64_t chunk_groups = divide_up(num_groups, at_least_one(num_chunks));
  return (Rows){num_rows, num_groups, chunk_groups, divide_up(num_groups, at_least_one(chunk_groups))};
}

INLINE int64_t first_row(Rows rows, int64_t group) { return group * rows.num_rows / rows.num_groups; }

INLINE int rows_in(Rows rows, int64_t group) { return (int)(first_row(rows, group + 1) - first_row(rows, group)); }
