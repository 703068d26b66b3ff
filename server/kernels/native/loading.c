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

#define BLOCK 64 /* values rounded together, then scattered */
#endif

/* With S the source's elements. Returns whether all values were finite. */
#define ARRIVE(S, WIDEN, ODD)                                                          \
  const S *from = (const S *)m->from;                                                  \
  const int64_t size = m->rows * m->columns;                                           \
  int odd = 0;                                                                         \
  for (int64_t i = 0; i < size; i++) odd |= ODD(from[i]);                              \
  if (odd) return 0;                                                                   \
  if (!m->turned) {                                                                    \
    for (int64_t i = 0; i < size; i++) to[i] = STORE(m->scale * WIDEN(from[i]));       \
    return 1;                                                                          \
  }                                                                                    \
  T block[BLOCK];                                                                      \
  for (int64_t r = 0; r < m->rows; r++)                                                \
    for (int64_t c0 = 0; c0 < m->columns; c0 += BLOCK) {                               \
      const S *row = from + r * m->columns + c0;                                       \
      const int64_t n = m->columns - c0 < BLOCK ? m->columns - c0 : BLOCK;             \
      for (int64_t c = 0; c < n; c++) block[c] = STORE(m->scale * WIDEN(row[c]));      \
      for (int64_t c = 0; c < n; c++) to[(c0 + c) * m->rows + r] = block[c];           \
    }                                                                                  \
  return 1;

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
