/* Types that Python mirrors (structs.py), conversions and what both element types share. */
#if defined(__AVX2__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_WIDTH 512 /* of a head */
#define SPAN 16       /* rows of a prompt taken together by LoRA */
#define PANEL 32      /* outputs of a matrix product taken together */

typedef uint16_t bf16;

/* A linear layer's weight as `pack` or the NF4 packer lays it out. */
typedef struct {
  int64_t n, k;
  const void *weight;   /* [ceil(n / 32)] panels of T, or codes where scales is given */
  const float *scales;  /* NF4: [panels][k / 64][2][16]; else NULL */
  const float *levels;  /* NF4: [16] */
  const float *bias;    /* [n] or NULL */
} product;

/* The arena's matrices of one linear layer: a [rows, in], b [rows, out]. */
typedef struct {
  const void *a, *b;
  int64_t out;
} site;

/* Up to three linear layers that share their input; outputs lie side by side. */
typedef struct {
  int64_t count;
  product products[3];
  site sites[3];
} joint;

/* LoRA of single rows: items of row tokens[j] are first[j] .. first[j + 1]; r0, r1, weight are the item's, offset[i]
 * its place among all items' ranks. */
typedef struct {
  int64_t token_count, items;
  const int64_t *tokens, *first, *r0, *r1, *offset;
  const float *weight;
} decode_plan;

/* LoRA of prompts: piece p is rows piece_start[p] .. + SPAN of segment piece_segment[p]; t1, r0, r1, weight are the
 * segment's. Pieces of one plan do not share rows. */
typedef struct {
  int64_t pieces, widest;
  const int64_t *piece_segment, *piece_start, *t1, *r0, *r1;
  const float *weight;
} prefill_plan;

/* What an adapter does to the outputs of one linear layer besides: y + weight * (scale y + shift), from the base's own
 * y; both [n] or NULL. */
typedef struct {
  const float *scale, *shift;
} affine;

/* Rows t0 .. t1 and their adapter's affines, [joints of all layers][3]. */
typedef struct {
  int64_t t0, t1;
  const affine *affines;
  float weight;
} affine_span;

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

static inline float same(float f) { return f; }

/* 1 for a NaN or an infinity. */
static inline int odd_bf16(bf16 v) { return (v & 0x7f80u) == 0x7f80u; }
static inline int odd_f32(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (bits & 0x7f800000u) == 0x7f800000u;
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

/* a b + c in one rounding where the processor can; the compiler may not reorder it. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* Eight numbers at a time, in whatever registers the processor has; sums over lanes run in one fixed order. */
typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t v8bits __attribute__((vector_size(32)));
typedef uint16_t v8half __attribute__((vector_size(16)));

static inline v8 load8_f32(const float *from) {
  v8 v;
  memcpy(&v, from, sizeof v);
  return v;
}

static inline v8 load8_bf16(const bf16 *from) {
  v8half v;
  memcpy(&v, from, sizeof v);
  return (v8)(__builtin_convertvector(v, v8bits) << 16);
}

static inline float sum8(v8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

/* Four sums of products with b over n in steps of eight, then what is left. */
#define DOTS_BY_EIGHTS(type, load)                                                             \
  v8 acc[4] = {{0}, {0}, {0}, {0}};                                                            \
  for (; i + 8 <= n; i += 8) {                                                                 \
    const v8 right = load(b + i);                                                              \
    if (ahead)                                                                                 \
      for (int j = 0; j < 4; j++) __builtin_prefetch(ahead + 4 * i + 8 * j, 0, 3);             \
    for (int j = 0; j < 4; j++) acc[j] += load(a[j] + i) * right;                              \
  }                                                                                            \
  for (int j = 0; j < 4; j++) tail[j] = sum8(acc[j]);

static inline void prefetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 3);
}

/* Sums of four products a_j . b over n, each in one fixed order, whichever four are asked for together. `ahead` is
 * fetched into the cache meanwhile, four rows of n; it may lie past the end of what is there. */
static inline void dots_bf16(const bf16 *const a[4], const bf16 *b, int64_t n, const bf16 *ahead, float sums[4]) {
  int64_t i = 0;
  float tail[4] = {0, 0, 0, 0};
#ifdef __AVX512BF16__
  __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (; i + 32 <= n; i += 32) {
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + i);
    if (ahead)
      for (int j = 0; j < 4; j++) __builtin_prefetch(ahead + 4 * i + 32 * j, 0, 3);
    for (int j = 0; j < 4; j++) acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)_mm512_loadu_si512(a[j] + i), right);
  }
  for (int j = 0; j < 4; j++) tail[j] = _mm512_reduce_add_ps(acc[j]);
#else
  DOTS_BY_EIGHTS(bf16, load8_bf16)
#endif
  for (; i < n; i++)
    for (int j = 0; j < 4; j++) tail[j] = FMA(widen(a[j][i]), widen(b[i]), tail[j]);
  for (int j = 0; j < 4; j++) sums[j] = tail[j];
}

static inline void dots_f32(const float *const a[4], const float *b, int64_t n, const float *ahead, float sums[4]) {
  int64_t i = 0;
  float tail[4] = {0, 0, 0, 0};
  DOTS_BY_EIGHTS(float, load8_f32)
  for (; i < n; i++)
    for (int j = 0; j < 4; j++) tail[j] = FMA(a[j][i], b[i], tail[j]);
  for (int j = 0; j < 4; j++) sums[j] = tail[j];
}

#ifdef __AMX_BF16__
static int tiles_granted = 0;

/* Linux hands the tile registers out on request only. */
int tiles_request(void) { return tiles_granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
} __attribute__((packed, aligned(64)));

static void tiles_on(void) {
  if (!tiles_granted) return;
  struct tile_config config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.colsb[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
}

static void tiles_off(void) {
  if (tiles_granted) _tile_release();
}
#else
int tiles_request(void) { return 0; }
static void tiles_on(void) {}
static void tiles_off(void) {}
#endif
