/* y = x w^T + bias from weights packed once into panels of 32 outputs, which a thread reads front to back: a step of few
 * rows runs at the speed of memory.
 *
 * bfloat16: panel [K / 32][2][16][16][2]: for 32 inputs two tiles one after the other, each 16 pairs of inputs by 16
 * outputs, as AMX wants them. float: panel [K][32].
 */

#ifndef GEMM_BF16
#define GEMM_BF16

#define AT_ONCE 4  /* rows: their sums fill the registers of AVX2 */
#define FETCHING 4 /* times so many rows are computed while the next panel is fetched */

/* What is needed after a panel: so many bytes of memory; and where a fetch of them stands. */
typedef struct {
  const char *from;
  int64_t bytes, step;
} ahead;

#define PACKED_AT_bf16(k, i, o) ((((i) / 32) * 2 + (o) / 16) * 512 + ((i) % 32 / 2 * 16 + (o) % 16) * 2 + (i) % 2)

static inline void store_bf16(const float *c, bf16 *y, int64_t stride, int64_t rows, int64_t columns,
                              const float *bias) {
#ifdef __AVX512BF16__
  if (columns == 16) {
    const __m512 more = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r++)
      _mm256_storeu_si256((__m256i *)(y + r * stride),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_loadu_ps(c + r * 16), more)));
    return;
  }
#endif
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i++) y[r * stride + i] = narrow(c[r * 16 + i] + (bias ? bias[i] : 0.0f));
}

#ifdef __AVX512BF16__
/* Without tiles: four rows by 32 outputs at a time. The last rows are repeated, so that all take the same way. */
static void panel_without_tiles(const bf16 *x, const bf16 *w, const float *bias, bf16 *y, int64_t m, int64_t k,
                                int64_t stride, int64_t columns, ahead next) {
  (void)next;
  for (int64_t t = 0; t < m; t += 4) {
    const bf16 *rows[4];
    for (int j = 0; j < 4; j++) rows[j] = x + (t + j < m ? t + j : m - 1) * k;
    float acc[4][32];
    __m512 sums[4][2];
    for (int j = 0; j < 4; j++) sums[j][0] = sums[j][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < k / 32; s++)
      for (int64_t pair = 0; pair < 16; pair++) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(w + s * 1024 + pair * 32);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(w + s * 1024 + 512 + pair * 32);
        for (int j = 0; j < 4; j++) {
          int32_t both;
          memcpy(&both, rows[j] + s * 32 + pair * 2, 4);
          const __m512bh input = (__m512bh)_mm512_set1_epi32(both);
          sums[j][0] = _mm512_dpbf16_ps(sums[j][0], left, input);
          sums[j][1] = _mm512_dpbf16_ps(sums[j][1], right, input);
        }
      }
    for (int j = 0; j < 4; j++) {
      _mm512_storeu_ps(acc[j], sums[j][0]);
      _mm512_storeu_ps(acc[j] + 16, sums[j][1]);
    }
    for (int64_t j = 0; j < 4 && t + j < m; j++)
      for (int64_t o = 0; o < columns; o++)
        y[(t + j) * stride + o] = narrow(acc[j][o] + (bias ? bias[o] : 0.0f));
  }
}
#else
#define INPUTS 512 /* taken together: x of so many, widened, stays in the first cache */

/* COUNT rows by 16 outputs over `inputs` inputs; sums in registers. x: [COUNT][INPUTS] widened; w: from one of the first
 * two tiles of a panel on, and every second one; acc: [COUNT][32] of which 16 are used. */
#define BLOCK_OF(COUNT)                                                                                    \
  static void block_of_##COUNT(const float x[][INPUTS], const bf16 *w, int64_t inputs, float acc[][32],    \
                               ahead *next) {                                                              \
    v8 sums[COUNT][2];                                                                                     \
    const char *fetch = next->from;                                                                        \
    for (int j = 0; j < COUNT; j++) {                                                                      \
      sums[j][0] = load8_f32(acc[j]);                                                                      \
      sums[j][1] = load8_f32(acc[j] + 8);                                                                  \
    }                                                                                                      \
    for (int64_t i = 0; i < inputs; i += 2) {                                                              \
      const bf16 *at = w + i / 32 * 1024 + i % 32 * 16;                                                    \
      v8bits left, right;                                                                                  \
      memcpy(&left, at, 32);                                                                               \
      memcpy(&right, at + 16, 32);                                                                         \
      __builtin_prefetch(fetch, 0, 2);                                                                     \
      fetch += next->step;                                                                                 \
      const v8 even0 = (v8)(left << 16), even1 = (v8)(right << 16);                                        \
      for (int j = 0; j < COUNT; j++) {                                                                    \
        sums[j][0] += x[j][i] * even0;                                                                     \
        sums[j][1] += x[j][i] * even1;                                                                     \
      }                                                                                                    \
      const v8 odd0 = (v8)(left & 0xffff0000u), odd1 = (v8)(right & 0xffff0000u);                          \
      for (int j = 0; j < COUNT; j++) {                                                                    \
        sums[j][0] += x[j][i + 1] * odd0;                                                                  \
        sums[j][1] += x[j][i + 1] * odd1;                                                                  \
      }                                                                                                    \
    }                                                                                                      \
    for (int j = 0; j < COUNT; j++) {                                                                      \
      memcpy(acc[j], &sums[j][0], 32);                                                                     \
      memcpy(acc[j] + 8, &sums[j][1], 32);                                                                 \
    }                                                                                                      \
    next->from = fetch;                                                                                    \
  }
/* The same for 32 outputs: few rows take all tiles as memory has them, at its pace. */
#define WHOLE_OF(COUNT)                                                                                    \
  static void block_of_##COUNT(const float x[][INPUTS], const bf16 *w, int64_t inputs, float acc[][32],    \
                               ahead *next) {                                                              \
    (void)next;                                                                                            \
    v8 sums[COUNT][4];                                                                                     \
    for (int j = 0; j < COUNT; j++)                                                                        \
      for (int o = 0; o < 4; o++) sums[j][o] = load8_f32(acc[j] + 8 * o);                                  \
    for (int64_t i = 0; i < inputs; i += 2)                                                                \
      for (int half = 0; half < 2; half++) {                                                               \
        const bf16 *at = w + i / 32 * 1024 + i % 32 * 16 + half * 512;                                     \
        v8bits left, right;                                                                                \
        memcpy(&left, at, 32);                                                                             \
        memcpy(&right, at + 16, 32);                                                                       \
        __builtin_prefetch(at + 4096, 0, 3);                                                               \
        const v8 even0 = (v8)(left << 16), even1 = (v8)(right << 16);                                      \
        for (int j = 0; j < COUNT; j++) {                                                                  \
          sums[j][2 * half] += x[j][i] * even0;                                                            \
          sums[j][2 * half + 1] += x[j][i] * even1;                                                        \
        }                                                                                                  \
        const v8 odd0 = (v8)(left & 0xffff0000u), odd1 = (v8)(right & 0xffff0000u);                        \
        for (int j = 0; j < COUNT; j++) {                                                                  \
          sums[j][2 * half] += x[j][i + 1] * odd0;                                                         \
          sums[j][2 * half + 1] += x[j][i + 1] * odd1;                                                     \
        }                                                                                                  \
      }                                                                                                    \
    for (int j = 0; j < COUNT; j++)                                                                        \
      for (int o = 0; o < 4; o++) memcpy(acc[j] + 8 * o, &sums[j][o], 32);                                 \
  }
WHOLE_OF(1)
WHOLE_OF(2)
BLOCK_OF(3)
BLOCK_OF(4)

/* For processors that know nothing of bfloat16: widened to float. Every row's sums run in the same order, however many
 * rows there are. While the first rows are computed the next panel comes from memory. */
static void panel_without_tiles(const bf16 *x, const bf16 *w, const float *bias, bf16 *y, int64_t m, int64_t k,
                                int64_t stride, int64_t columns, ahead next) {
  static void (*const blocks[])(const float[][INPUTS], const bf16 *, int64_t, float[][32], ahead *) = {
      block_of_1, block_of_2, block_of_3, block_of_4};
  const int64_t blocks_of_rows = m / AT_ONCE + (m % AT_ONCE == 3); /* one and two rows fetch their own */
  const int64_t fetching = blocks_of_rows < FETCHING ? blocks_of_rows : FETCHING;
  next.step = fetching ? next.bytes / (k * fetching) : 0;
  for (int64_t t = 0; t < m; t += AT_ONCE) {
    const int64_t count = m - t < AT_ONCE ? m - t : AT_ONCE;
    float wide[AT_ONCE][INPUTS], acc[AT_ONCE][32];
    if (t == FETCHING * AT_ONCE) next.step = 0;
    memset(acc, 0, sizeof acc);
    for (int64_t from = 0; from < k; from += INPUTS) {
      const int64_t inputs = k - from < INPUTS ? k - from : INPUTS;
      for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < inputs; i += 8) {
          const v8 eight = load8_bf16(x + (t + j) * k + from + i);
          memcpy(wide[j] + i, &eight, 32);
        }
      for (int64_t half = 0; half < (count < 3 ? 1 : 2); half++) { /* few rows take both at once, as memory has them */
        float(*sums)[32] = (float(*)[32])(&acc[0][half * 16]);
        blocks[count - 1]((const float(*)[INPUTS])wide, w + from * 32 + half * 512, inputs, sums, &next);
      }
    }
    for (int64_t j = 0; j < count; j++)
      for (int64_t o = 0; o < columns; o++)
        y[(t + j) * stride + o] = narrow(acc[j][o] + (bias ? bias[o] : 0.0f));
  }
}
#endif

/* 32 columns of y from one panel. x: rows of K up to whole tiles of 16 must be readable; what lies there beyond m is
 * not used. */
static void panel_bf16(const bf16 *x, const bf16 *w, const float *bias, bf16 *y, int64_t m, int64_t k, int64_t stride,
                       int64_t columns, ahead next) {
#ifdef __AMX_BF16__
  if (tiles_granted) {
    const int64_t steps = k / 32, left = columns < 16 ? columns : 16, right = columns - left;
    const float *more = bias ? bias + 16 : NULL;
    float c[4][256] __attribute__((aligned(64)));
    int64_t t = 0;
    for (; t + 16 < m; t += 32) {
      const bf16 *x0 = x + t * k, *x1 = x0 + 16 * k;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, x0 + s * 32, k * 2);
        _tile_loadd(6, w + s * 1024, 64);
        _tile_loadd(7, w + s * 1024 + 512, 64);
        _tile_loadd(5, x1 + s * 32, k * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c[0], 64);
      _tile_stored(1, c[1], 64);
      _tile_stored(2, c[2], 64);
      _tile_stored(3, c[3], 64);
      const int64_t last = m - t - 16 < 16 ? m - t - 16 : 16;
      bf16 *out = y + t * stride;
      store_bf16(c[0], out, stride, 16, left, bias);
      store_bf16(c[2], out + 16 * stride, stride, last, left, bias);
      if (right) {
        store_bf16(c[1], out + 16, stride, 16, right, more);
        store_bf16(c[3], out + 16 * stride + 16, stride, last, right, more);
      }
    }
    if (t < m) {
      const bf16 *x0 = x + t * k;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, x0 + s * 32, k * 2);
        _tile_loadd(6, w + s * 1024, 64);
        _tile_loadd(7, w + s * 1024 + 512, 64);
        for (int64_t i = 0; i < 2048; i += 64) __builtin_prefetch((const char *)(w + s * 1024 + 16384) + i, 0, 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, c[0], 64);
      _tile_stored(1, c[1], 64);
      store_bf16(c[0], y + t * stride, stride, m - t, left, bias);
      if (right) store_bf16(c[1], y + t * stride + 16, stride, m - t, right, more);
    }
    return;
  }
#endif
  panel_without_tiles(x, w, bias, y, m, k, stride, columns, next);
}

#if defined(__AVX2__) && !defined(__AVX512BF16__)
/* The levels of eight codes, of which the lowest four bits count. */
static inline __m256 level8(__m256i codes, __m256 below, __m256 above) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes), _mm256_permutevar8x32_ps(above, codes),
                          _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

/* Products as bfloat16 in the upper halves, ties to even; what is below is left over. Finite numbers only. */
static inline __m256i rounded8(__m256 levels, __m256 factor) {
  const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(levels, factor));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
#endif

/* One NF4 panel as bitsandbytes rounds it: codes [K / 32][2][16][16] bytes, a pair of inputs each, the even one in the
 * low nibble; scales [K / 64][2][16]; w: the panel in bfloat16. */
static void widen_nf4(const uint8_t *codes, const float *scales, const float *levels, bf16 *w, int64_t k) {
#ifdef __AVX512BF16__
  const __m512 table = _mm512_loadu_ps(levels);
  const __m512i nibble = _mm512_set1_epi32(15);
#elif defined(__AVX2__)
  const __m256 below = _mm256_loadu_ps(levels), above = _mm256_loadu_ps(levels + 8);
#endif
  for (int64_t s = 0; s < k / 32; s++)
    for (int64_t half = 0; half < 2; half++) {
      const float *scale = scales + (s / 2) * 32 + half * 16;
      const uint8_t *tile = codes + s * 512 + half * 256;
      bf16 *wide = w + s * 1024 + half * 512;
#ifdef __AVX512BF16__
      const __m512 factor = _mm512_loadu_ps(scale);
      for (int64_t pair = 0; pair < 16; pair++) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(tile + pair * 16)));
        const __m512 even = _mm512_permutexvar_ps(_mm512_and_epi32(both, nibble), table);
        const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, factor)));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, factor)));
        _mm512_storeu_si512(wide + pair * 32, _mm512_or_epi32(low, _mm512_slli_epi32(high, 16)));
      }
#elif defined(__AVX2__)
      for (int64_t o = 0; o < 16; o += 8) {
        const __m256 factor = _mm256_loadu_ps(scale + o);
        for (int64_t pair = 0; pair < 16; pair++) {
          const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(tile + pair * 16 + o)));
          const __m256i high = rounded8(level8(_mm256_srli_epi32(both, 4), below, above), factor);
          const __m256i low = rounded8(level8(both, below, above), factor);
          const __m256i words = _mm256_or_si256(_mm256_srli_epi32(low, 16),
                                                _mm256_and_si256(high, _mm256_set1_epi32((int)0xffff0000u)));
          _mm256_storeu_si256((__m256i *)(wide + (pair * 16 + o) * 2), words);
        }
      }
#else
      for (int64_t pair = 0; pair < 16; pair++)
        for (int64_t o = 0; o < 16; o++) {
          const uint8_t code = tile[pair * 16 + o];
          wide[(pair * 16 + o) * 2] = narrow(levels[code & 15] * scale[o]);
          wide[(pair * 16 + o) * 2 + 1] = narrow(levels[code >> 4] * scale[o]);
        }
#endif
    }
}

static void widen_nf4_into_bf16(const product *p, int64_t nb, bf16 *buffer) {
  widen_nf4((const uint8_t *)p->weight + nb * p->k * 16, p->scales + nb * (p->k / 64) * 32, p->levels, buffer, p->k);
}

#define PACKED_AT_f32(k, i, o) ((i) * 32 + (o))

/* COUNT rows by 16 outputs of a panel [k][32]. */
#define FLOATS_OF(COUNT)                                                                                         \
  static void floats_of_##COUNT(const float *x, const float *w, int64_t k, float acc[][32]) {                    \
    v8 sums[COUNT][2];                                                                                           \
    memset(sums, 0, sizeof sums);                                                                                \
    for (int64_t i = 0; i < k; i++) {                                                                            \
      const v8 left = load8_f32(w + i * 32), right = load8_f32(w + i * 32 + 8);                                  \
      for (int j = 0; j < COUNT; j++) {                                                                          \
        sums[j][0] += x[j * k + i] * left;                                                                       \
        sums[j][1] += x[j * k + i] * right;                                                                      \
      }                                                                                                          \
    }                                                                                                            \
    for (int j = 0; j < COUNT; j++) {                                                                            \
      memcpy(acc[j], &sums[j][0], 32);                                                                           \
      memcpy(acc[j] + 8, &sums[j][1], 32);                                                                       \
    }                                                                                                            \
  }
FLOATS_OF(1)
FLOATS_OF(2)
FLOATS_OF(3)
FLOATS_OF(4)

static void panel_f32(const float *x, const float *w, const float *bias, float *y, int64_t m, int64_t k,
                      int64_t stride, int64_t columns, ahead next) {
  (void)next;
  static void (*const blocks[])(const float *, const float *, int64_t, float[][32]) = {
      floats_of_1, floats_of_2, floats_of_3, floats_of_4};
  for (int64_t t = 0; t < m; t += AT_ONCE) {
    const int64_t count = m - t < AT_ONCE ? m - t : AT_ONCE;
    float acc[AT_ONCE][32];
    for (int64_t half = 0; half < 2; half++)
      blocks[count - 1](x + t * k, w + half * 16, k, (float(*)[32])(&acc[0][half * 16]));
    for (int64_t j = 0; j < count; j++)
      for (int64_t o = 0; o < columns; o++) y[(t + j) * stride + o] = acc[j][o] + (bias ? bias[o] : 0.0f);
  }
}

static void widen_nf4_into_f32(const product *p, int64_t nb, float *buffer) {
  (void)p, (void)nb, (void)buffer; /* NF4 computes in bfloat16 only */
}
#endif

/* w: [n, k] -> packed: [ceil(n / 32)] panels, outputs beyond n zero. bfloat16: k % 32 == 0. */
void NAME(pack)(const T *w, T *packed, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
  for (int64_t nb = 0; nb < (n + 31) / 32; nb++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t o = 0; o < 32; o++)
        packed[nb * 32 * k + NAME(PACKED_AT)(k, i, o)] = nb * 32 + o < n ? w[(nb * 32 + o) * k + i] : 0;
}

/* rows[r] = w[outputs[r]], from the packed weight. */
void NAME(packed_rows)(const T *packed, const int64_t *outputs, T *rows, int64_t count, int64_t k) {
  for (int64_t r = 0; r < count; r++) {
    const T *panel = packed + outputs[r] / 32 * 32 * k;
    for (int64_t i = 0; i < k; i++) rows[r * k + i] = panel[NAME(PACKED_AT)(k, i, outputs[r] % 32)];
  }
}

/* The outputs of several products of one input side by side. buffer: [threads, 32 * k] where there is NF4. Threads do
 * not wait for each other at the end. */
static void NAME(multiply_part)(const product *products, int64_t count, const T *x, T *y, int64_t rows, int64_t stride,
                                T *buffer) {
  int64_t panels = 0;
  for (int64_t i = 0; i < count; i++) panels += (products[i].n + 31) / 32;
#pragma omp for schedule(static) nowait
  for (int64_t at = 0; at < panels; at++) {
    const product *p = products;
    int64_t nb = at, column = 0;
    for (; nb >= (p->n + 31) / 32; p++) {
      nb -= (p->n + 31) / 32;
      column += p->n;
    }
    const T *w = (const T *)p->weight + nb * 32 * p->k;
    ahead next = {(const char *)(w + 32 * p->k), 32 * p->k * (int64_t)sizeof(T), 0};
    if (p->scales) {
      next = (ahead){(const char *)p->weight + (nb + 1) * p->k * 16, p->k * 16, 0};
      T *wide = buffer + omp_get_thread_num() * 32 * p->k;
      NAME(widen_nf4_into)(p, nb, wide);
      w = wide;
    }
    const int64_t columns = p->n - nb * 32 < 32 ? p->n - nb * 32 : 32;
    NAME(panel)(x, w, p->bias ? p->bias + nb * 32 : NULL, y + column + nb * 32, rows, p->k, stride, columns,
                next);
  }
}

/* x: [rows up to whole 16s, k]; y: [rows, stride]. */
void NAME(multiply)(const product *products, int64_t count, const T *x, T *y, int64_t rows, int64_t stride, T *buffer) {
#pragma omp parallel
  {
    tiles_on();
    NAME(multiply_part)(products, count, x, y, rows, stride, buffer);
    tiles_off();
  }
}
