/* The decode step's operations for a CPU, compiled on the machine that runs them.
 *
 * Meaning and shapes: server/kernels/reference.py and the docstrings in native/__init__.py. Every sum runs in float
 * and is rounded once, when it is stored. A row's result depends on that row alone, never on how many rows share the
 * call: each output is summed in the same order whatever the batch.
 *
 * The file is included twice by kernels_both.c, with T = bfloat16 and with T = float.
 */

static inline float NAME(dot)(const T *a, const T *b, int64_t n) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += LOAD(a[i]) * LOAD(b[i]);
  return sum;
}

/* y[t] = x[t] / sqrt(mean(x[t]^2) + eps), rounded, times weight, rounded: as transformers' RMSNorm does it. */
void NAME(rms_norm)(const T *x, const T *weight, T *y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows > 8)
  for (int64_t t = 0; t < rows; t++) {
    const T *in = x + t * width;
    T *out = y + t * width;
    float sum = 0.0f;
    for (int64_t i = 0; i < width; i++) { float v = LOAD(in[i]); sum += v * v; }
    const float scale = 1.0f / sqrtf(sum / (float)width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = STORE(LOAD(weight[i]) * LOAD(STORE(LOAD(in[i]) * scale)));
  }
}

/* y[t] = silu(gate_up[t, :width]) * gate_up[t, width:] */
void NAME(silu_mul)(const T *gate_up, T *y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
  for (int64_t t = 0; t < rows; t++) {
    const T *gate = gate_up + t * 2 * width, *up = gate + width;
    T *out = y + t * width;
    for (int64_t i = 0; i < width; i++) {
      const float g = LOAD(gate[i]);
      out[i] = STORE(LOAD(STORE(g / (1.0f + exponential(-g)))) * LOAD(up[i]));
    }
  }
}

/* Rotate q and k of qkv [rows, (heads + 2 kv_heads) * width] and put k and v where the cache wants them.
 * cos, sin: [rows, width]; q: [rows, heads, width]; cache k, v: [kv_heads, slots, width]. */
void NAME(rope_store)(const T *qkv, const T *cos, const T *sin, const int64_t *write, T *q, T *k_cache, T *v_cache,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t slots) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static) if (rows > 8)
  for (int64_t t = 0; t < rows; t++) {
    const T *in = qkv + t * (heads + 2 * kv_heads) * width, *c = cos + t * width, *s = sin + t * width;
    for (int64_t h = 0; h < heads + kv_heads; h++, in += width) {
      T *out = h < heads ? q + (t * heads + h) * width : k_cache + ((h - heads) * slots + write[t]) * width;
      for (int64_t i = 0; i < half; i++) {
        /* Rounded after every operation, as the tensors of transformers' rotation are. */
        const float a = LOAD(in[i]), b = LOAD(in[i + half]);
        out[i] = STORE(LOAD(STORE(a * LOAD(c[i]))) + LOAD(STORE(-b * LOAD(s[i]))));
        out[i + half] = STORE(LOAD(STORE(b * LOAD(c[i + half]))) + LOAD(STORE(a * LOAD(s[i + half]))));
      }
    }
    for (int64_t h = 0; h < kv_heads; h++, in += width)
      memcpy(v_cache + (h * slots + write[t]) * width, in, (size_t)width * sizeof(T));
  }
}

/* Attention of one new token a sequence over its pages. q, out: [rows, heads, width]; k, v: [kv_heads, slots, width];
 * pages: [rows, max_pages]; window 0 = none; softcap 0 = none; scratch: [threads, group * longest]. */
void NAME(paged_decode)(const T *q, const T *k, const T *v, const int64_t *pages, const int64_t *lengths, T *out,
                        float *scratch, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t slots,
                        int64_t max_pages, int64_t page_tokens, int64_t longest, float scale, int64_t window,
                        float softcap) {
  const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t g = 0; g < kv_heads; g++) {
      float *scores = scratch + omp_get_thread_num() * group * longest;
      const int64_t length = lengths[t], first = window && length > window ? length - window : 0;
      const T *keys = k + g * slots * width, *values = v + g * slots * width;
      const T *query = q + (t * heads + g * group) * width;
      for (int64_t p = first; p < length; p++) {
        const T *key = keys + (pages[t * max_pages + p / page_tokens] * page_tokens + p % page_tokens) * width;
        for (int64_t h = 0; h < group; h++) {
          float score = NAME(dot)(query + h * width, key, width) * scale;
          if (softcap != 0.0f) score = softcap * tanhf(score / softcap);
          scores[h * longest + p] = score;
        }
      }
      for (int64_t h = 0; h < group; h++) {
        float *row = scores + h * longest, best = -INFINITY, sum = 0.0f;
        for (int64_t p = first; p < length; p++) best = row[p] > best ? row[p] : best;
        for (int64_t p = first; p < length; p++) { row[p] = exponential(row[p] - best); sum += row[p]; }
        float acc[MAX_WIDTH];
        for (int64_t i = 0; i < width; i++) acc[i] = 0.0f;
        for (int64_t p = first; p < length; p++) {
          const T *value = values + (pages[t * max_pages + p / page_tokens] * page_tokens + p % page_tokens) * width;
          const float weight = row[p];
          for (int64_t i = 0; i < width; i++) acc[i] += weight * LOAD(value[i]);
        }
        T *o = out + (t * heads + g * group + h) * width;
        for (int64_t i = 0; i < width; i++) o[i] = STORE(acc[i] / sum);
      }
    }
}

/* y[s][t] += sum over t's items of w * (x[t] a[s][r0:r1]^T) b[s][r0:r1], for sites s that share the input x.
 * Items of token tokens[j] are first[j] .. first[j+1]; r0, r1, w are the item's; offset[i] its place in h.
 * a[s]: [rows, in]; b[s]: [rows, out[s]]; y[s]: row stride stride[s]; scratch h: [sites, total rows]. */
void NAME(lora_decode)(const T *x, const T *const *a, const T *const *b, T *const *y, const int64_t *out,
                       const int64_t *stride, int64_t sites, int64_t in, const int64_t *tokens, const int64_t *first,
                       int64_t token_count, const int64_t *r0, const int64_t *r1, const float *w,
                       const int64_t *offset, int64_t items, float *h) {
  const int64_t total = offset[items];
#pragma omp parallel
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t s = 0; s < sites; s++)
      for (int64_t j = 0; j < token_count; j++) {
        const T *row = x + tokens[j] * in;
        for (int64_t i = first[j]; i < first[j + 1]; i++)
          for (int64_t r = r0[i]; r < r1[i]; r += 4) {
            const T *rows[4];
            float sums[4];
            for (int j4 = 0; j4 < 4; j4++) rows[j4] = a[s] + (r + j4 < r1[i] ? r + j4 : r) * in;
            NAME(dots)(rows, row, in, sums);
            for (int64_t j4 = 0; j4 < 4 && r + j4 < r1[i]; j4++)
              h[s * total + offset[i] + r + j4 - r0[i]] = w[i] * sums[j4];
          }
      }
    /* Halves of a token's outputs, so that one token alone still uses two cores. */
#pragma omp for schedule(static) collapse(3)
    for (int64_t s = 0; s < sites; s++)
      for (int64_t j = 0; j < token_count; j++)
        for (int64_t part = 0; part < 2; part++) {
          const int64_t n = out[s], mid = n / 2 / 32 * 32, from = part ? mid : 0, to = part ? n : mid;
          T *o = y[s] + tokens[j] * stride[s];
          for (int64_t c = from; c < to; c += CHUNK) {
            const int64_t wide = to - c < CHUNK ? to - c : CHUNK;
            float acc[CHUNK];
            for (int64_t k = 0; k < wide; k++) acc[k] = LOAD(o[c + k]);
            for (int64_t i = first[j]; i < first[j + 1]; i++)
              for (int64_t r = r0[i]; r < r1[i]; r++) {
                const float v = h[s * total + offset[i] + r - r0[i]];
                const T *row = b[s] + r * n + c;
                if (wide == CHUNK)
                  for (int64_t k = 0; k < CHUNK; k++) acc[k] += v * LOAD(row[k]);
                else
                  for (int64_t k = 0; k < wide; k++) acc[k] += v * LOAD(row[k]);
              }
            for (int64_t k = 0; k < wide; k++) o[c + k] = STORE(acc[k]);
          }
        }
  }
}

/* The same for prompts: segments of many rows, each with one adapter. t0, t1, r0, r1, w: of segment i; piece i is rows
 * piece_t[i] .. piece_t[i] + SPAN of segment piece_of[i]. No two pieces share a row of y: segments that overlap come in
 * different calls. scratch: [threads, SPAN * widest]. */
void NAME(lora_prefill)(const T *x, const T *const *a, const T *const *b, T *const *y, const int64_t *out,
                        const int64_t *stride, int64_t sites, int64_t in, const int64_t *t1, const int64_t *r0,
                        const int64_t *r1, const float *w, const int64_t *piece_of, const int64_t *piece_t,
                        int64_t pieces, float *scratch, int64_t widest) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (int64_t s = 0; s < sites; s++)
    for (int64_t p = 0; p < pieces; p++) {
      float *h = scratch + omp_get_thread_num() * SPAN * widest;
      const int64_t i = piece_of[p], from = piece_t[p], rank = r1[i] - r0[i];
      const int64_t rows = t1[i] - from < SPAN ? t1[i] - from : SPAN;
      for (int64_t r = 0; r < rank; r++)
        for (int64_t t = 0; t < rows; t += 4) {
          const T *inputs[4];
          float sums[4];
          for (int j = 0; j < 4; j++) inputs[j] = x + (from + (t + j < rows ? t + j : t)) * in;
          NAME(dots)(inputs, a[s] + (r0[i] + r) * in, in, sums);
          for (int64_t j = 0; j < 4 && t + j < rows; j++) h[(t + j) * widest + r] = w[i] * sums[j];
        }
      const int64_t n = out[s];
      for (int64_t c = 0; c < n; c += 32) {
        const int64_t wide = n - c < 32 ? n - c : 32;
        for (int64_t t = 0; t < rows; t += 4) {
          const int64_t four = rows - t < 4 ? rows - t : 4;
          float acc[4][32];
          for (int64_t j = 0; j < 4; j++)
            for (int64_t k = 0; k < 32; k++)
              acc[j][k] = j < four && k < wide ? LOAD(y[s][(from + t + j) * stride[s] + c + k]) : 0.0f;
          for (int64_t r = 0; r < rank; r++) {
            const T *row = b[s] + (r0[i] + r) * n + c;
            float v[4];
            for (int64_t j = 0; j < 4; j++) v[j] = j < four ? h[(t + j) * widest + r] : 0.0f;
            if (wide == 32)
              for (int64_t j = 0; j < 4; j++)
                for (int64_t k = 0; k < 32; k++) acc[j][k] += v[j] * LOAD(row[k]);
            else
              for (int64_t j = 0; j < 4; j++)
                for (int64_t k = 0; k < wide; k++) acc[j][k] += v[j] * LOAD(row[k]);
          }
          for (int64_t j = 0; j < four; j++)
            for (int64_t k = 0; k < wide; k++) y[s][(from + t + j) * stride[s] + c + k] = STORE(acc[j][k]);
        }
      }
    }
}
