/* The CPU's operations, compiled on the machine that runs them, for T = bfloat16 and T = float.
 *
 * Meaning and shapes: server/kernels/reference.py and the docstrings in this folder's Python files. Every sum runs in
 * float and is rounded once, when it is stored. A row's result depends on that row alone, never on how many rows share
 * the call: each output is summed in the same order whatever the batch, on however many threads.
 *
 * Functions with "_rows" or "_part" in their names hold orphaned OpenMP loops: every thread of the team calls them.
 */
#include "common.h"

#define T bf16
#define LOAD widen
#define STORE narrow
#define TURN turn_16
#define NAME(op) op##_bf16
#include "gemm.c"
#include "ops.c"
#include "decoder.c"
#include "loading.c"
#undef T
#undef LOAD
#undef STORE
#undef TURN
#undef NAME

#define T float
#define LOAD same
#define STORE same
#define TURN turn_32
#define NAME(op) op##_f32
#include "gemm.c"
#include "ops.c"
#include "decoder.c"
#include "loading.c"
