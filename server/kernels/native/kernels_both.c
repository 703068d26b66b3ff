#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define MAX_WIDTH 512 /* of a head */
#define CHUNK 128
#define SPAN 16 /* rows of a prompt taken together */

typedef uint16_t bf16;

static inline float widen(bf16 v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* Round to nearest, ties to even; a NaN stays one. */
static inline bf16 narrow(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)((bits >> 16) | 0x40u) : (bf16)rounded;
}

/* e^x within 2 ulp, without a call, so that loops over it become vector instructions. */
static inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = rintf(x * 1.44269504f);
  float r = x - n * 0.693145752f;
  r -= n * 1.42860677e-6f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float two_n;
  memcpy(&two_n, &bits, 4);
  return p * two_n;
}

/* Sums of four products a_i . b over n, each in one fixed order, whichever four are asked for together. */
static inline void dots_bf16(const bf16 *const a[4], const bf16 *b, int64_t n, float sums[4]) {
  int64_t i = 0;
  float tail[4] = {0, 0, 0, 0};
#ifdef __AVX512BF16__
  __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (; i + 32 <= n; i += 32) {
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + i);
    for (int j = 0; j < 4; j++) acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)_mm512_loadu_si512(a[j] + i), right);
  }
  for (int j = 0; j < 4; j++) tail[j] = _mm512_reduce_add_ps(acc[j]);
#endif
  for (; i < n; i++)
    for (int j = 0; j < 4; j++) tail[j] += widen(a[j][i]) * widen(b[i]);
  for (int j = 0; j < 4; j++) sums[j] = tail[j];
}

static inline void dots_f32(const float *const a[4], const float *b, int64_t n, float sums[4]) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < n; i++) {
    const float right = b[i];
    s0 += a[0][i] * right;
    s1 += a[1][i] * right;
    s2 += a[2][i] * right;
    s3 += a[3][i] * right;
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

static inline float same(float f) { return f; }

#define T bf16
#define LOAD widen
#define STORE narrow
#define NAME(op) op##_bf16
#include "kernels.c"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T float
#define LOAD same
#define STORE same
#define NAME(op) op##_f32
#include "kernels.c"
