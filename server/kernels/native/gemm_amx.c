/* y = x w^T for bfloat16 on AMX tiles, from weights packed once.
 *
 * Packed layout: [N / 32][K / 32][2][16][16][2]: for 32 outputs and 32 inputs two tiles one after the other, each 16
 * pairs of inputs by 16 outputs. A thread reads its outputs' weights front to back, so a step of few rows runs at the
 * speed of memory. Rows are padded to tiles of 16 with zeros and every output sums its inputs in the same order: a row's
 * result does not depend on how many rows share the call.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

static inline bf16 to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)((bits >> 16) | 0x40u) : (bf16)rounded;
}

static inline float from_bf16(bf16 v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* Linux hands the tile registers out on request only. 0 = granted. */
int amx_request(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

/* w: [N, K] → packed; N % 32 == 0, K % 32 == 0. */
void amx_pack(const bf16 *w, bf16 *packed, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
  for (int64_t nb = 0; nb < n / 32; nb++)
    for (int64_t kb = 0; kb < k / 32; kb++)
      for (int64_t half = 0; half < 2; half++) {
        bf16 *tile = packed + (((nb * (k / 32) + kb) * 2) + half) * 512;
        for (int64_t pair = 0; pair < 16; pair++)
          for (int64_t col = 0; col < 16; col++)
            for (int64_t e = 0; e < 2; e++)
              tile[(pair * 16 + col) * 2 + e] = w[(nb * 32 + half * 16 + col) * k + kb * 32 + pair * 2 + e];
      }
}

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
} __attribute__((packed, aligned(64)));

static void configure(void) {
  struct tile_config config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.colsb[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
}

static inline void store(const float *c, bf16 *y, int64_t stride, int64_t rows, const bf16 *bias) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < 16; i++) y[r * stride + i] = to_bf16(c[r * 16 + i] + (bias ? from_bf16(bias[i]) : 0.0f));
}

/* 32 columns of y from one panel of packed weights [K / 32][2][512]. */
static void panel(const bf16 *x, const bf16 *w, const bf16 *b, bf16 *out, int64_t m, int64_t k, int64_t stride) {
  const int64_t steps = k / 32, tiles = (m + 15) / 16;
  float c[4][256] __attribute__((aligned(64)));
  int64_t t = 0;
  for (; t + 2 <= tiles; t += 2) {
    const bf16 *x0 = x + t * 16 * k, *x1 = x0 + 16 * k;
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
    const int64_t last = m - (t + 1) * 16 < 16 ? m - (t + 1) * 16 : 16;
    store(c[0], out + t * 16 * stride, stride, 16, b);
    store(c[1], out + t * 16 * stride + 16, stride, 16, b ? b + 16 : NULL);
    store(c[2], out + (t + 1) * 16 * stride, stride, last, b);
    store(c[3], out + (t + 1) * 16 * stride + 16, stride, last, b ? b + 16 : NULL);
  }
  if (t < tiles) {
    const bf16 *x0 = x + t * 16 * k;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(4, x0 + s * 32, k * 2);
      _tile_loadd(6, w + s * 1024, 64);
      _tile_loadd(7, w + s * 1024 + 512, 64);
      _mm_prefetch((const char *)(w + s * 1024 + 4096), _MM_HINT_T0);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    const int64_t last = m - t * 16 < 16 ? m - t * 16 : 16;
    store(c[0], out + t * 16 * stride, stride, last, b);
    store(c[1], out + t * 16 * stride + 16, stride, last, b ? b + 16 : NULL);
  }
}

/* x: [tiles * 16, K], rows beyond m zero; y: [m, N], rows `stride` apart; bias: [N] or NULL. */
void amx_gemm(const bf16 *x, const bf16 *packed, const bf16 *bias, bf16 *y, int64_t m, int64_t n, int64_t k,
              int64_t stride) {
#pragma omp parallel
  {
    configure();
#pragma omp for schedule(static)
    for (int64_t nb = 0; nb < n / 32; nb++)
      panel(x, packed + nb * k * 32, bias ? bias + nb * 32 : NULL, y + nb * 32, m, k, stride);
    _tile_release();
  }
}

/* The same from NF4 codes: codes [N / 32][K / 32][2][16][16] bytes, a pair of inputs each, the even one in the low
 * nibble; scales [N / 32][K / 64][2][16] float; levels: the 16 values. A panel is widened to bfloat16 once, as
 * bitsandbytes rounds it, and used for all rows. buffer: [threads, K * 32]. */
void amx_gemm_nf4(const bf16 *x, const uint8_t *codes, const float *scales, const float *levels, const bf16 *bias,
                  bf16 *y, int64_t m, int64_t n, int64_t k, int64_t stride, bf16 *buffer) {
  const int64_t steps = k / 32;
  const __m512 table = _mm512_loadu_ps(levels);
  const __m512i nibble = _mm512_set1_epi32(15);
#pragma omp parallel
  {
    configure();
    bf16 *w = buffer + omp_get_thread_num() * k * 32;
#pragma omp for schedule(static)
    for (int64_t nb = 0; nb < n / 32; nb++) {
      const uint8_t *block = codes + nb * k * 16;
      const float *scale = scales + nb * (k / 64) * 32;
      for (int64_t s = 0; s < steps; s++)
        for (int64_t half = 0; half < 2; half++) {
          const __m512 factor = _mm512_loadu_ps(scale + (s / 2) * 32 + half * 16);
          const uint8_t *tile = block + s * 512 + half * 256;
          bf16 *wide = w + s * 1024 + half * 512;
          for (int64_t pair = 0; pair < 16; pair++) {
            const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(tile + pair * 16)));
            const __m512 even = _mm512_permutexvar_ps(_mm512_and_epi32(both, nibble), table);
            const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, factor)));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, factor)));
            _mm512_storeu_si512(wide + pair * 32, _mm512_or_epi32(low, _mm512_slli_epi32(high, 16)));
          }
        }
      panel(x, w, bias ? bias + nb * 32 : NULL, y + nb * 32, m, k, stride);
    }
    _tile_release();
  }
}
