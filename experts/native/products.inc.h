/* Plain products and gated MLPs with matrices of one format: include after what they are made of, with FORMATTED(name).
 * The format offers FORMATTED(panel_of) and FORMATTED(multiply_chunk); see matmul.inc.h. */

/* x [num_rows, num_in]; added and y [num_rows, num_out], of which one of y and y32 is NULL. 0, or 1 without memory. */
int FORMATTED(matmul)(const ELEMENT *x, int64_t num_rows, const void *weight, int64_t num_out, int64_t num_in,
                  const ELEMENT *added, ELEMENT *y, float *y32, int num_threads) {
  const int64_t num_words = divide_up(num_in, WORD_ELEMENTS);
  const int64_t num_panels = divide_up(num_out, LANES), num_pairs = divide_up(num_panels, 2);
  const Rows rows = cut_rows(num_rows, num_pairs, num_threads);
  const int64_t num_tasks = num_pairs * rows.num_chunks;
  uint32_t *packed = workspace(0, num_rows * num_words * 4);
  if (!packed) return 1;
  if (num_tasks == 1) num_threads = 1;
  Counter packing = {0}, computing = {0};
#pragma omp parallel if (num_threads > 1) num_threads(num_threads)
  {
    FOR_EACH_TASK(group, packing, rows.num_groups) TYPED(pack_group)(x, num_in, rows, group, packed);
#pragma omp barrier
    FOR_EACH_TASK(task, computing, num_tasks) {
      float c[CHUNK_GROUPS * MAX_ROWS * 2 * LANES];
      const int64_t chunk = task / num_pairs, panel = task % num_pairs * 2;
      const void *left = FORMATTED(panel_of)(weight, panel, num_words);
      const void *right = panel + 1 < num_panels ? FORMATTED(panel_of)(weight, panel + 1, num_words) : left;
      FORMATTED(multiply_chunk)(packed, rows, chunk, left, right, num_words, c);
      TYPED(finish_panels)(c, rows, chunk, panel, num_out, added, y, y32);
    }
  }
  return 0;
}

/* Gated MLPs: y = down(silu(gate(x)) * up(x)) (+ added), rows of span i through the expert it names.
 * weights [num_experts][3]: gate, up [width, model], down [model, width], packed. 0, or 1 without memory. */
int FORMATTED(experts)(const ELEMENT *x, int64_t num_rows, const int64_t *spans, int64_t num_spans,
                   const void *const *weights, int64_t model, int64_t width, const ELEMENT *added, ELEMENT *y,
                   int num_threads) {
  const TYPED(Span) *span = (const TYPED(Span) *)spans;
  const int64_t x_words = divide_up(model, WORD_ELEMENTS), h_words = divide_up(width, WORD_ELEMENTS);
  const int64_t hidden_panels = divide_up(width, LANES), model_panels = divide_up(model, LANES);
  const int64_t model_pairs = divide_up(model_panels, 2);
  const int64_t plan_bytes = divide_up(num_spans * (int64_t)(sizeof(Rows) + 24) + 24, 64) * 64;
  char *memory = workspace(0, plan_bytes + num_rows * (x_words + h_words) * 4);
  if (!memory) return 1;
  Rows *rows = (Rows *)memory;
  int64_t *groups_before = (int64_t *)(rows + num_spans), *hidden_before = groups_before + num_spans + 1;
  int64_t *model_before = hidden_before + num_spans + 1;
  uint32_t *packed_x = (uint32_t *)(memory + plan_bytes), *packed_h = packed_x + num_rows * x_words;
  groups_before[0] = hidden_before[0] = model_before[0] = 0;
  for (int64_t i = 0; i < num_spans; i++) {
    rows[i] = cut_rows(span[i].stop - span[i].start, num_spans * model_pairs, num_threads);
    groups_before[i + 1] = groups_before[i] + rows[i].num_groups;
    hidden_before[i + 1] = hidden_before[i] + rows[i].num_chunks * hidden_panels;
    model_before[i + 1] = model_before[i] + rows[i].num_chunks * model_pairs;
  }
  Counter packing = {0}, hiding = {0}, modelling = {0};
#pragma omp parallel if (num_threads > 1) num_threads(num_threads)
  {
    FOR_EACH_TASK(task, packing, groups_before[num_spans]) {
      const int64_t i = TYPED(span_of)(groups_before, num_spans, task);
      TYPED(pack_group)(x + span[i].start * model, model, rows[i], task - groups_before[i],
                        packed_x + span[i].start * x_words);
    }
#pragma omp barrier
    float c[CHUNK_GROUPS * MAX_ROWS * 2 * LANES];
    FOR_EACH_TASK(task, hiding, hidden_before[num_spans]) {
      const int64_t i = TYPED(span_of)(hidden_before, num_spans, task), local = task - hidden_before[i];
      const int64_t chunk = local / hidden_panels, panel = local % hidden_panels;
      const void *const *own = weights + span[i].expert * 3;
      FORMATTED(multiply_chunk)(packed_x + span[i].start * x_words, rows[i], chunk, FORMATTED(panel_of)(own[0], panel, x_words),
                            FORMATTED(panel_of)(own[1], panel, x_words), x_words, c);
      TYPED(gate_chunk)(c, rows[i], chunk, panel, width, packed_h + span[i].start * h_words);
    }
#pragma omp barrier
    FOR_EACH_TASK(task, modelling, model_before[num_spans]) {
      const int64_t i = TYPED(span_of)(model_before, num_spans, task), local = task - model_before[i];
      const int64_t chunk = local / model_pairs, panel = local % model_pairs * 2;
      const void *down = weights[span[i].expert * 3 + 2];
      const void *left = FORMATTED(panel_of)(down, panel, h_words);
      const void *right = panel + 1 < model_panels ? FORMATTED(panel_of)(down, panel + 1, h_words) : left;
      const int64_t offset = span[i].start * model;
      FORMATTED(multiply_chunk)(packed_h + span[i].start * h_words, rows[i], chunk, left, right, h_words, c);
      TYPED(finish_panels)(c, rows[i], chunk, panel, model, added ? added + offset : NULL, y + offset, NULL);
    }
  }
  return 0;
}
