/* All decoder layers of Llama's kind in one call and one team of threads. */

#ifndef DECODER_TYPES
#define DECODER_TYPES
/* Norms are float [width] or NULL where the family has none. */
typedef struct {
  joint qkv, out, gate_up, down;
  const float *before_attention, *q_norm, *k_norm, *after_attention, *before_mlp, *after_mlp;
  void *k, *v;     /* this layer's cache: [kv_heads, slots, width] */
  int64_t window;  /* 0 = none */
} layer;

typedef struct {
  const layer *layers;
  int64_t hidden, heads, kv_heads, width, rotary, inner, slots, page_tokens;
  int64_t late_norm;  /* see norm_row */
  int64_t flat_norm;  /* q_norm and k_norm run over all heads together, not over each */
  float eps, scale;
} decoder;

typedef struct {
  int64_t rows;
  void *x;                     /* [rows up to whole 16s, hidden], changed in place */
  const void *cos, *sin;       /* [rows, rotary] */
  const int64_t *write;        /* [rows] cache slots */
  int64_t count, max_pages, longest;
  const int64_t *row, *sequence, *length, *pages; /* see attention_rows */
  const decode_plan *decode;
  const prefill_plan *prefill;
  int64_t prefill_layers;
  const affine_span *affine;
  int64_t affine_spans;
  /* Work space; rows up to whole 16s. */
  void *normed, *qkv, *q, *attended, *y, *gate_up, *inner, *wide;
  float *h, *scores, *pieces;
} batch;
#endif

/* The affines of joint `at` on its outputs y, which other threads may still be computing. */
static void NAME(affine_part)(const joint *j, int64_t at, T *y, int64_t stride, const batch *b) {
  int any = 0;
  for (int64_t i = 0; i < b->affine_spans; i++)
    for (int64_t s = 0; s < j->count; s++) {
      const affine *a = b->affine[i].affines + 3 * at + s;
      any |= a->scale || a->shift;
    }
  if (!any) return;
#pragma omp barrier
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < b->rows; t++) {
    T *row = y + t * stride;
    for (int64_t s = 0; s < j->count; row += j->products[s++].n)
      for (int64_t c = 0, wide; c < j->products[s].n; c += wide) {
        float own[256], sum[256];
        wide = j->products[s].n - c < 256 ? j->products[s].n - c : 256;
        for (int64_t k = 0; k < wide; k++) own[k] = sum[k] = LOAD(row[c + k]);
        for (int64_t i = 0; i < b->affine_spans; i++) {
          const affine_span *span = b->affine + i;
          const affine *a = span->affines + 3 * at + s;
          if (t < span->t0 || t >= span->t1) continue;
          if (a->scale)
            for (int64_t k = 0; k < wide; k++) sum[k] += span->weight * a->scale[c + k] * own[k];
          if (a->shift)
            for (int64_t k = 0; k < wide; k++) sum[k] += span->weight * a->shift[c + k];
        }
        for (int64_t k = 0; k < wide; k++) row[c + k] = STORE(sum[k]);
      }
  }
}

/* Joint `at` of all layers' four each. */
static void NAME(joint_part)(const joint *j, int64_t at, const T *x, T *y, const batch *b) {
  int64_t stride = 0;
  for (int64_t i = 0; i < j->count; i++) stride += j->products[i].n;
  NAME(multiply_part)(j->products, j->count, x, y, b->rows, stride, (T *)b->wide);
  if (b->affine_spans) NAME(affine_part)(j, at, y, stride, b);
  if (b->decode || b->prefill_layers)
    NAME(adapters_part)(j->sites, j->count, x, j->products[0].k, y, stride, b->decode, b->prefill, b->prefill_layers,
                        b->h, b->pieces);
#pragma omp barrier
}

/* x += norm(y). The same thread gets the same rows as in the norm that follows: no barrier between them. */
static void NAME(residual_rows)(T *x, T *y, const float *norm, int64_t rows, const decoder *d) {
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < rows; t++) {
    T *to = x + t * d->hidden, *from = y + t * d->hidden;
    if (norm) NAME(norm_row)(from, norm, from, d->hidden, d->eps, (int)d->late_norm);
    for (int64_t i = 0; i < d->hidden; i++) to[i] = STORE(LOAD(to[i]) + LOAD(from[i]));
  }
}

static const T *NAME(normed_rows)(const T *x, const float *norm, T *y, int64_t rows, const decoder *d) {
  if (norm) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
      NAME(norm_row)(x + t * d->hidden, norm, y + t * d->hidden, d->hidden, d->eps, (int)d->late_norm);
    return y;
  }
#pragma omp barrier
  return x;
}

static void NAME(head_norm_rows)(T *qkv, const float *norm, int64_t column, int64_t heads, int64_t rows,
                                 const decoder *d) {
  const int64_t stride = (d->heads + 2 * d->kv_heads) * d->width;
  const int64_t count = d->flat_norm ? 1 : heads, width = d->flat_norm ? heads * d->width : d->width;
#pragma omp for schedule(static)
  for (int64_t at = 0; at < rows * count; at++) {
    T *x = qkv + at / count * stride + column + at % count * width;
    NAME(norm_row)(x, norm, x, width, d->eps, (int)d->late_norm);
  }
}

static void NAME(until_attention)(const decoder *d, const layer *l, const batch *b) {
  const int64_t first = 4 * (l - d->layers);
  const T *x = NAME(normed_rows)((const T *)b->x, l->before_attention, (T *)b->normed, b->rows, d);
  NAME(joint_part)(&l->qkv, first, x, (T *)b->qkv, b);
  if (l->q_norm) NAME(head_norm_rows)((T *)b->qkv, l->q_norm, 0, d->heads, b->rows, d);
  if (l->k_norm) NAME(head_norm_rows)((T *)b->qkv, l->k_norm, d->heads * d->width, d->kv_heads, b->rows, d);
  NAME(rope_store_rows)((const T *)b->qkv, (const T *)b->cos, (const T *)b->sin, b->write, (T *)b->q, (T *)l->k,
                        (T *)l->v, b->rows, d->heads, d->kv_heads, d->width, d->rotary, d->slots);
  NAME(attention_rows)((const T *)b->q, (const T *)l->k, (const T *)l->v, b->row, b->sequence, b->length, b->pages,
                       (T *)b->attended, b->scores, b->count, d->heads, d->kv_heads, d->width, d->slots, b->max_pages,
                       d->page_tokens, b->longest, d->scale, l->window, 0.0f);
}

static void NAME(after_attention)(const decoder *d, const layer *l, const batch *b) {
  const int64_t first = 4 * (l - d->layers);
  NAME(joint_part)(&l->out, first + 1, (const T *)b->attended, (T *)b->y, b);
  NAME(residual_rows)((T *)b->x, (T *)b->y, l->after_attention, b->rows, d);
  const T *x = NAME(normed_rows)((const T *)b->x, l->before_mlp, (T *)b->normed, b->rows, d);
  NAME(joint_part)(&l->gate_up, first + 2, x, (T *)b->gate_up, b);
  NAME(silu_mul_rows)((const T *)b->gate_up, (T *)b->inner, b->rows, d->inner);
  NAME(joint_part)(&l->down, first + 3, (const T *)b->inner, (T *)b->y, b);
  NAME(residual_rows)((T *)b->x, (T *)b->y, l->after_mlp, b->rows, d);
}

/* Stages from .. to: 2 i is layer i until its attention, without the rows that are not in the list; 2 i + 1 is what
 * follows. */
void NAME(decode)(const decoder *d, const batch *b, int64_t from, int64_t to) {
#pragma omp parallel
  {
    tiles_on();
    for (int64_t stage = from; stage < to; stage++) {
      const layer *l = d->layers + stage / 2;
      if (stage % 2)
        NAME(after_attention)(d, l, b);
      else
        NAME(until_attention)(d, l, b);
    }
    tiles_off();
  }
}
