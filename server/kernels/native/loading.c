/* What brings adapters into the arena: one call for all matrices of one adapter, by the thread that calls. */

#ifndef LOADING_TYPES
#define LOADING_TYPES
/* One matrix on its way from a file: to = scale * from, turned where `turned`. */
typedef struct {
  const void *from;      /* [rows, columns]; bfloat16 where narrow_source, else float */
  void *to;              /* [rows, columns] or [columns, rows] of T */
  int64_t rows, columns;
  int64_t turned, narrow_source;
  float scale;
} arrival;

/* Bytes to be copied; to zero where from is NULL. */
typedef struct {
  const void *from;
  void *to;
  int64_t bytes;
} copy;

void copy_all(const copy *copies, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (copies[i].from)
      memcpy(copies[i].to, copies[i].from, (size_t)copies[i].bytes);
    else
      memset(copies[i].to, 0, (size_t)copies[i].bytes);
}

#define TILE 16 /* rows and columns turned together, so that both sides are read and written in stretches */

/* to[c * stride + r] = tile[r][c] of 16-bit values, four by four within 64-bit words. */
static inline void turn_16(uint16_t tile[TILE][TILE], uint16_t *to, int64_t stride) {
  for (int r = 0; r < TILE; r += 4) {
    uint64_t words[4][TILE / 4];
    memcpy(words, tile[r], sizeof words);
    for (int c = 0; c < TILE / 4; c++) {
      const uint64_t w0 = words[0][c], w1 = words[1][c], w2 = words[2][c], w3 = words[3][c];
      const uint64_t even = 0x0000ffff0000ffffull;
      const uint64_t e01 = (w0 & even) | (w1 & even) << 16, o01 = (w0 >> 16 & even) | (w1 & ~even);
      const uint64_t e23 = (w2 & even) | (w3 & even) << 16, o23 = (w2 >> 16 & even) | (w3 & ~even);
      const uint64_t turned[4] = {(uint32_t)e01 | e23 << 32, (uint32_t)o01 | o23 << 32, e01 >> 32 | (e23 >> 32 << 32),
                                  o01 >> 32 | (o23 >> 32 << 32)};
      for (int i = 0; i < 4; i++) memcpy(to + (4 * c + i) * stride + r, turned + i, 8);
    }
  }
}

static inline void turn_32(float tile[TILE][TILE], float *to, int64_t stride) {
  for (int c = 0; c < TILE; c++)
    for (int r = 0; r < TILE; r++) to[c * stride + r] = tile[r][c];
}
#endif

/* With S the source's elements. Returns whether all values were finite. */
#define ARRIVE(S, WIDEN, ODD)                                                                             \
  const S *from = (const S *)m->from;                                                                     \
  const float scale = m->scale;                                                                           \
  int odd = 0;                                                                                            \
  if (!m->turned) {                                                                                       \
    const int64_t size = m->rows * m->columns;                                                            \
    for (int64_t i = 0; i < size; i++) {                                                                  \
      odd |= ODD(from[i]);                                                                                \
      to[i] = STORE(scale * WIDEN(from[i]));                                                              \
    }                                                                                                     \
    return !odd;                                                                                          \
  }                                                                                                       \
  T tile[TILE][TILE];                                                                                     \
  for (int64_t r0 = 0; r0 < m->rows; r0 += TILE)                                                          \
    for (int64_t c0 = 0; c0 < m->columns; c0 += TILE) {                                                   \
      const S *corner = from + r0 * m->columns + c0;                                                      \
      T *line = to + c0 * m->rows + r0;                                                                   \
      if (m->rows - r0 >= TILE && m->columns - c0 >= TILE) {                                              \
        for (int r = 0; r < TILE; r++)                                                                    \
          for (int c = 0; c < TILE; c++) {                                                                \
            odd |= ODD(corner[r * m->columns + c]);                                                       \
            tile[r][c] = STORE(scale * WIDEN(corner[r * m->columns + c]));                                \
          }                                                                                               \
        TURN(tile, line, m->rows);                                                                        \
        continue;                                                                                         \
      }                                                                                                   \
      for (int r = 0; r < TILE && r < m->rows - r0; r++)                                                  \
        for (int c = 0; c < TILE && c < m->columns - c0; c++) {                                           \
          odd |= ODD(corner[r * m->columns + c]);                                                         \
          line[c * m->rows + r] = STORE(scale * WIDEN(corner[r * m->columns + c]));                       \
        }                                                                                                 \
    }                                                                                                     \
  return !odd;

static int NAME(arrive_float)(const arrival *m, T *to) { ARRIVE(float, same, odd_f32) }
static int NAME(arrive_bf16)(const arrival *m, T *to) { ARRIVE(bf16, widen, odd_bf16) }
#undef ARRIVE

/* Returns the first matrix that holds a NaN or an infinity, whose place in `to` is then undefined, or -1. */
int64_t NAME(arrive)(const arrival *all, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (!(all[i].narrow_source ? NAME(arrive_bf16)(all + i, (T *)all[i].to) : NAME(arrive_float)(all + i, (T *)all[i].to)))
      return i;
  return -1;
}
