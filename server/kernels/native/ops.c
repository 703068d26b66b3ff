/* The small operations of a decoder layer. */

static inline float NAME(dot)(const T *a, const T *b, int64_t n) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += LOAD(a[i]) * LOAD(b[i]);
  return sum;
}

/* One row of RMSNorm, y may be x. late: the weight is multiplied before the one rounding (OLMo 2), not after a first
 * one (Llama). */
static inline void NAME(norm_row)(const T *x, const float *weight, T *y, int64_t width, float eps, int late) {
  float sum = 0.0f;
  for (int64_t i = 0; i < width; i++) {
    const float v = LOAD(x[i]);
    sum += v * v;
  }
  const float scale = 1.0f / sqrtf(sum / (float)width + eps);
  if (late)
    for (int64_t i = 0; i < width; i++) y[i] = STORE(weight[i] * (LOAD(x[i]) * scale));
  else
    for (int64_t i = 0; i < width; i++) y[i] = STORE(weight[i] * LOAD(STORE(LOAD(x[i]) * scale)));
}

void NAME(rms_norm)(const T *x, const float *weight, T *y, int64_t rows, int64_t width, float eps, int64_t late) {
#pragma omp parallel for schedule(static) if (rows > 8)
  for (int64_t t = 0; t < rows; t++) NAME(norm_row)(x + t * width, weight, y + t * width, width, eps, (int)late);
}

/* y[t] = silu(both[t, :width]) * both[t, width:] */
static void NAME(silu_mul_rows)(const T *both, T *y, int64_t rows, int64_t width) {
  const int64_t chunk = 256, chunks = (width + chunk - 1) / chunk;
#pragma omp for schedule(static)
  for (int64_t at = 0; at < rows * chunks; at++) {
    const int64_t t = at / chunks, from = at % chunks * chunk, to = from + chunk < width ? from + chunk : width;
    const T *gate = both + t * 2 * width, *up = gate + width;
    T *out = y + t * width;
    for (int64_t i = from; i < to; i++) {
      const float g = LOAD(gate[i]);
      out[i] = STORE(LOAD(STORE(g / (1.0f + exponential(-g)))) * LOAD(up[i]));
    }
  }
}

void NAME(silu_mul)(const T *both, T *y, int64_t rows, int64_t width) {
#pragma omp parallel
  NAME(silu_mul_rows)(both, y, rows, width);
}

/* Rotate q and k of qkv [rows, (heads + 2 kv_heads) * width] and put k and v where the cache wants them. The first
 * `rotary` elements of a head turn, the rest pass. cos, sin: [rows, rotary]; q: [rows, heads, width]; cache k, v:
 * [kv_heads, slots, width]. */
static void NAME(rope_store_rows)(const T *qkv, const T *cos, const T *sin, const int64_t *write, T *q, T *k_cache,
                                  T *v_cache, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                                  int64_t rotary, int64_t slots) {
  const int64_t half = rotary / 2;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    const T *in = qkv + t * (heads + 2 * kv_heads) * width, *c = cos + t * rotary, *s = sin + t * rotary;
    for (int64_t h = 0; h < heads + kv_heads; h++, in += width) {
      T *out = h < heads ? q + (t * heads + h) * width : k_cache + ((h - heads) * slots + write[t]) * width;
      T turned[MAX_WIDTH]; /* not `out` itself: it might be any of the inputs, for all the compiler knows */
      for (int64_t i = 0; i < half; i++) {
        /* Rounded after every operation, as the tensors of transformers' rotation are. */
        const float a = LOAD(in[i]), b = LOAD(in[i + half]);
        turned[i] = STORE(LOAD(STORE(a * LOAD(c[i]))) + LOAD(STORE(-b * LOAD(s[i]))));
        turned[i + half] = STORE(LOAD(STORE(b * LOAD(c[i + half]))) + LOAD(STORE(a * LOAD(s[i + half]))));
      }
      memcpy(out, turned, (size_t)rotary * sizeof(T));
      memcpy(out + rotary, in + rotary, (size_t)(width - rotary) * sizeof(T));
    }
    for (int64_t h = 0; h < kv_heads; h++, in += width)
      memcpy(v_cache + (h * slots + write[t]) * width, in, (size_t)width * sizeof(T));
  }
}

void NAME(rope_store)(const T *qkv, const T *cos, const T *sin, const int64_t *write, T *q, T *k_cache, T *v_cache,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t rotary, int64_t slots) {
#pragma omp parallel
  NAME(rope_store_rows)(qkv, cos, sin, write, q, k_cache, v_cache, rows, heads, kv_heads, width, rotary, slots);
}

/* One query row and one key/value head: up to all `group` query heads that share it. scores: [4, length]. */
static void NAME(attend)(const T *query, const T *keys, const T *values, const int64_t *pages, int64_t first,
                         int64_t length, T *out, int64_t group, int64_t width, int64_t page_tokens, float scale,
                         float softcap, float *scores) {
  for (int64_t h0 = 0; h0 < group; h0 += 4) {
    const int64_t heads = group - h0 < 4 ? group - h0 : 4;
    const T *queries[4];
    for (int64_t j = 0; j < 4; j++) queries[j] = query + (h0 + (j < heads ? j : 0)) * width;
    for (int64_t p = first; p < length; p++) {
      const int64_t at = (pages[p / page_tokens] * page_tokens + p % page_tokens) * width;
      float sums[4];
      prefetch(values + at, width * (int64_t)sizeof(T)); /* wanted soon, and lies elsewhere */
      NAME(dots)(queries, keys + at, width, NULL, sums);
      for (int64_t j = 0; j < heads; j++) scores[j * length + p] = sums[j] * scale;
    }
    float total[4];
    for (int64_t j = 0; j < heads; j++) {
      float *row = scores + j * length, best = -INFINITY, sum = 0.0f;
      if (softcap != 0.0f)
        for (int64_t p = first; p < length; p++) row[p] = softcap * tanhf(row[p] / softcap);
      for (int64_t p = first; p < length; p++) best = row[p] > best ? row[p] : best;
      for (int64_t p = first; p < length; p++) {
        row[p] = exponential(row[p] - best);
        sum += row[p];
      }
      total[j] = sum;
    }
    for (int64_t c = 0; c < width; c += 32) {
      const int64_t wide = width - c < 32 ? width - c : 32;
      float acc[4][32];
      memset(acc, 0, sizeof acc);
      if (wide == 32)
        for (int64_t p = first; p < length; p++) {
          const T *value = values + (pages[p / page_tokens] * page_tokens + p % page_tokens) * width + c;
          for (int64_t j = 0; j < 4; j++) {
            const float weight = scores[(j < heads ? j : 0) * length + p];
            for (int64_t i = 0; i < 32; i++) acc[j][i] += weight * LOAD(value[i]);
          }
        }
      else
        for (int64_t p = first; p < length; p++) {
          const T *value = values + (pages[p / page_tokens] * page_tokens + p % page_tokens) * width + c;
          for (int64_t j = 0; j < heads; j++)
            for (int64_t i = 0; i < wide; i++) acc[j][i] += scores[j * length + p] * LOAD(value[i]);
        }
      for (int64_t j = 0; j < heads; j++)
        for (int64_t i = 0; i < wide; i++) out[(h0 + j) * width + c + i] = STORE(acc[j][i] / total[j]);
    }
  }
}

/* Attention of rows that each look at their own sequence's first length[i] tokens. Row i of the list is row row[i] of q
 * and out [rows, heads, width]; its pages are pages[sequence[i] * max_pages ...]; k, v: [kv_heads, slots, width];
 * window 0 = none; softcap 0 = none; scratch: [threads, 4 * longest]. Threads share the work by tokens looked at. */
static void NAME(attention_rows)(const T *q, const T *k, const T *v, const int64_t *row, const int64_t *sequence,
                                 const int64_t *length, const int64_t *pages, T *out, float *scratch, int64_t count,
                                 int64_t heads, int64_t kv_heads, int64_t width, int64_t slots, int64_t max_pages,
                                 int64_t page_tokens, int64_t longest, float scale, int64_t window, float softcap) {
  const int64_t group = heads / kv_heads, threads = omp_get_num_threads(), me = omp_get_thread_num();
  int64_t total = 0, before = 0;
  for (int64_t i = 0; i < count; i++) total += length[i] * kv_heads;
  for (int64_t i = 0; i < count; i++)
    for (int64_t g = 0; g < kv_heads; g++) {
      const int64_t middle = before + length[i] / 2;
      before += length[i];
      if (middle * threads / total != me) continue;
      NAME(attend)(q + (row[i] * heads + g * group) * width, k + g * slots * width, v + g * slots * width,
                   pages + sequence[i] * max_pages, window && length[i] > window ? length[i] - window : 0, length[i],
                   out + (row[i] * heads + g * group) * width, group, width, page_tokens, scale, softcap,
                   scratch + me * 4 * longest);
    }
#pragma omp barrier
}

void NAME(attention)(const T *q, const T *k, const T *v, const int64_t *row, const int64_t *sequence,
                     const int64_t *length, const int64_t *pages, T *out, float *scratch, int64_t count, int64_t heads,
                     int64_t kv_heads, int64_t width, int64_t slots, int64_t max_pages, int64_t page_tokens,
                     int64_t longest, float scale, int64_t window, float softcap) {
#pragma omp parallel
  NAME(attention_rows)(q, k, v, row, sequence, length, pages, out, scratch, count, heads, kv_heads, width, slots,
                       max_pages, page_tokens, longest, scale, window, softcap);
}

/* Four rank rows of an adapter, or fewer, on one row of x: h = weight * a x. */
typedef struct {
  const T *x, *a;
  int64_t rows;
  float weight, *h;
} NAME(four);

static void NAME(shrink_four)(NAME(four) it, int64_t in, const T *ahead) {
  const T *rows[4];
  float sums[4];
  for (int64_t n = 0; n < 4; n++) rows[n] = it.a + (n < it.rows ? n : 0) * in;
  NAME(dots)(rows, it.x, in, ahead, sums);
  for (int64_t n = 0; n < it.rows; n++) it.h[n] = it.weight * sums[n];
}

/* h[site][item's ranks] = weight * x[row] a[r0:r1]^T; threads do not wait for each other at the end. Four rows are
 * computed while the four after them, whosever they are, come from memory. */
static void NAME(shrink_part)(const site *sites, int64_t count, const T *x, int64_t in, const decode_plan *plan,
                              float *h) {
  const int64_t total = plan->offset[plan->items];
  NAME(four) now = {.rows = 0};
#pragma omp for schedule(static) nowait
  for (int64_t at = 0; at < count * plan->token_count; at++) {
    const int64_t s = at / plan->token_count, j = at % plan->token_count;
    const T *row = x + plan->tokens[j] * in, *a = (const T *)sites[s].a;
    for (int64_t i = plan->first[j]; i < plan->first[j + 1]; i++) {
      const int64_t r0 = plan->r0[i], r1 = plan->r1[i];
      for (int64_t r = r0; r < r1; r += 4) {
        const NAME(four) next = {row, a + r * in, r1 - r < 4 ? r1 - r : 4, plan->weight[i],
                                 h + s * total + plan->offset[i] + r - r0};
        if (now.rows) NAME(shrink_four)(now, in, next.a);
        now = next;
      }
    }
  }
  if (now.rows) NAME(shrink_four)(now, in, NULL);
}

/* acc[k] += sum over four rows, n apart, of v[r] * rows[r][k]; four rows of `ahead`, `apart` from each other, are fetched
 * meanwhile. */
static inline void NAME(expand_four)(float *acc, const T *rows, int64_t n, const float *v, int64_t wide, const T *ahead,
                                     int64_t apart) {
  const T *r0 = rows, *r1 = rows + n, *r2 = rows + 2 * n, *r3 = rows + 3 * n;
  const float v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3];
  int64_t k = 0;
  for (; k + 32 <= wide; k += 32) {
    for (int64_t r = 0; r < 4; r++) __builtin_prefetch(ahead + r * apart + k, 0, 3);
    for (int64_t o = k; o < k + 32; o++)
      acc[o] = FMA(v3, LOAD(r3[o]), FMA(v2, LOAD(r2[o]), FMA(v1, LOAD(r1[o]), FMA(v0, LOAD(r0[o]), acc[o]))));
  }
  for (; k < wide; k++)
    acc[k] = FMA(v3, LOAD(r3[k]), FMA(v2, LOAD(r2[k]), FMA(v1, LOAD(r1[k]), FMA(v0, LOAD(r0[k]), acc[k]))));
}

/* y[row] += h b[r0:r1]. Few rows are cut into pieces, so that one row alone still uses all threads. */
static void NAME(expand_part)(const site *sites, int64_t count, T *y, int64_t stride, const decode_plan *plan,
                              const float *h) {
  const int64_t total = plan->offset[plan->items], threads = omp_get_num_threads();
  const int64_t pieces = count * plan->token_count < 2 * threads ? 2 * threads : 1;
  const int64_t units = plan->token_count * count * pieces;
#pragma omp for schedule(static) nowait
  for (int64_t at = 0; at < units; at++) {
    const int64_t j = at / (count * pieces), s = at / pieces % count, piece = at % pieces;
    int64_t column = 0;
    for (int64_t i = 0; i < s; i++) column += sites[i].out;
    const int64_t n = sites[s].out, step = (n / pieces + 63) / 64 * 64;
    const int64_t from = piece * step < n ? piece * step : n, to = from + step < n ? from + step : n;
    const int64_t i0 = plan->first[j], i1 = plan->first[j + 1];
    const T *b = (const T *)sites[s].b;
    T *out = y + plan->tokens[j] * stride + column;
    /* What is read after this unit: the beginning of the next one. */
    const int64_t after = at + 1 < units ? at + 1 : at;
    const site *other = sites + after / pieces % count;
    const T *next_unit = (const T *)other->b + plan->r0[plan->first[after / (count * pieces)]] * other->out;
    for (int64_t c = from; c < to; c += 512) {
      const int64_t wide = to - c < 512 ? to - c : 512;
      float acc[512];
      for (int64_t k = 0; k < wide; k++) acc[k] = LOAD(out[c + k]);
      for (int64_t i = i0; i < i1; i++) {
        const int64_t ranks = plan->r1[i] - plan->r0[i];
        const float *v = h + s * total + plan->offset[i];
        const T *row = b + plan->r0[i] * n + c;
        int64_t r = 0;
        for (; r + 4 <= ranks; r += 4, row += 4 * n) {
          const T *ahead = row + 4 * n;
          int64_t apart = n;
          if (r + 4 >= ranks) {
            if (i + 1 < i1)
              ahead = b + plan->r0[i + 1] * n + c;
            else if (c + 512 < to)
              ahead = b + plan->r0[i0] * n + c + 512;
            else
              ahead = next_unit, apart = other->out;
          }
          NAME(expand_four)(acc, row, n, v + r, wide, ahead, apart);
        }
        for (; r < ranks; r++, row += n)
          for (int64_t k = 0; k < wide; k++) acc[k] = FMA(v[r], LOAD(row[k]), acc[k]);
      }
      for (int64_t k = 0; k < wide; k++) out[c + k] = STORE(acc[k]);
    }
  }
}

/* y[s][rows of the piece] += w * (x a^T) b for every piece. scratch: [threads, SPAN * widest]. */
static void NAME(pieces_part)(const site *sites, int64_t count, const T *x, int64_t in, T *y, int64_t stride,
                              const prefill_plan *plan, float *scratch) {
  float *h = scratch + omp_get_thread_num() * SPAN * plan->widest;
#pragma omp for schedule(dynamic, 1)
  for (int64_t at = 0; at < plan->pieces * count; at++) {
    const int64_t s = at % count, i = plan->piece_segment[at / count], from = plan->piece_start[at / count];
    const int64_t rank = plan->r1[i] - plan->r0[i], n = sites[s].out, widest = plan->widest;
    const int64_t rows = plan->t1[i] - from < SPAN ? plan->t1[i] - from : SPAN;
    const T *a = (const T *)sites[s].a + plan->r0[i] * in, *b = (const T *)sites[s].b + plan->r0[i] * n;
    int64_t column = 0;
    for (int64_t k = 0; k < s; k++) column += sites[k].out;
    T *out = y + from * stride + column;
    for (int64_t r = 0; r < rank; r++) {
      prefetch(b + r * n, n * (int64_t)sizeof(T)); /* read below in columns, which no processor foresees */
      for (int64_t t = 0; t < rows; t += 4) {
        const T *inputs[4];
        float sums[4];
        for (int64_t j = 0; j < 4; j++) inputs[j] = x + (from + (t + j < rows ? t + j : t)) * in;
        NAME(dots)(inputs, a + r * in, in, NULL, sums);
        for (int64_t j = 0; j < 4 && t + j < rows; j++) h[(t + j) * widest + r] = plan->weight[i] * sums[j];
      }
    }
    for (int64_t c = 0; c < n; c += 32) {
      const int64_t wide = n - c < 32 ? n - c : 32;
      for (int64_t t = 0; t < rows; t += 4) {
        const int64_t four = rows - t < 4 ? rows - t : 4;
        float acc[4][32];
        for (int64_t j = 0; j < 4; j++)
          for (int64_t k = 0; k < 32; k++)
            acc[j][k] = j < four && k < wide ? LOAD(out[(t + j) * stride + c + k]) : 0.0f;
        for (int64_t r = 0; r < rank; r++) {
          const T *row = b + r * n + c;
          float v[4];
          for (int64_t j = 0; j < 4; j++) v[j] = j < four ? h[(t + j) * widest + r] : 0.0f;
          if (wide == 32)
            for (int64_t j = 0; j < 4; j++)
              for (int64_t k = 0; k < 32; k++) acc[j][k] = FMA(v[j], LOAD(row[k]), acc[j][k]);
          else
            for (int64_t j = 0; j < 4; j++)
              for (int64_t k = 0; k < wide; k++) acc[j][k] = FMA(v[j], LOAD(row[k]), acc[j][k]);
        }
        for (int64_t j = 0; j < four; j++)
          for (int64_t k = 0; k < wide; k++) out[(t + j) * stride + c + k] = STORE(acc[j][k]);
      }
    }
  }
}

/* Every row's own deltas, added in place. decode may be NULL; prefill: `layers` plans, one after the other. Threads may
 * leave before the others have finished; multiply_part may still run on others when they come. */
static void NAME(adapters_part)(const site *sites, int64_t count, const T *x, int64_t in, T *y, int64_t stride,
                                const decode_plan *decode, const prefill_plan *prefill, int64_t layers, float *h,
                                float *scratch) {
  if (decode) NAME(shrink_part)(sites, count, x, in, decode, h);
#pragma omp barrier
  if (decode) NAME(expand_part)(sites, count, y, stride, decode, h);
  for (int64_t i = 0; i < layers; i++) NAME(pieces_part)(sites, count, x, in, y, stride, prefill + i, scratch);
}

void NAME(adapters)(const site *sites, int64_t count, const T *x, int64_t in, T *y, int64_t stride,
                    const decode_plan *decode, const prefill_plan *prefill, int64_t layers, float *h, float *scratch) {
#pragma omp parallel
  NAME(adapters_part)(sites, count, x, in, y, stride, decode, prefill, layers, h, scratch);
}

/* finite[i] = 0 where page pages[i] holds a NaN or an infinity in one of the caches, each [kv_heads, slots, width]; the
 * others are left alone. */
void NAME(finite_pages)(const T *const *caches, int64_t count, int64_t kv_heads, int64_t slots, int64_t width,
                        int64_t page_tokens, const int64_t *pages, int64_t page_count, int64_t *finite) {
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t c = 0; c < count; c++)
    for (int64_t i = 0; i < page_count; i++) {
      int odd = 0;
      for (int64_t h = 0; h < kv_heads; h++) {
        const T *values = caches[c] + (h * slots + pages[i] * page_tokens) * width;
        for (int64_t n = 0; n < page_tokens * width; n++) odd |= NAME(odd)(values[n]);
      }
      if (odd) {
#pragma omp atomic write
        finite[i] = 0;
      }
    }
}
