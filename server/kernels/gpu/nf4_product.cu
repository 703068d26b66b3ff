// Products with NF4 weights for few rows: y[m, n] = sum over k of x[m, k] * scale[n, k / 64] * level[code[n, k]].
//
// Written for memory's pace: codes go from memory to registers as bitsandbytes packed them, each byte becomes two
// weights by one look-up in shared memory (a copy of the table for every lane, so that no two lanes meet in a bank),
// the tensor cores multiply, and a block's scale multiplies its finished sum. See nf4_cuda.py for how it is cut up.
//
// Constants given by the compiler's command line:
//   ROWS    a power of two: the most rows of x
//   MT      tiles of 16 outputs that every warp has at a time
//   KB      blocks of 64 inputs that every warp has on their way at a time
//   STEPS   times KB: the blocks of one warp; the 8 warps of a group share its slice of 512 * KB * STEPS inputs
//   HALF    1: x and y are float16, 0: bfloat16
//   WIDE    1: scales are float32, 0: float16
//   EVEN    1: the number of blocks is a multiple of KB
//   GROUPS  thread groups that are to fit a processor
#ifndef LORAPLEX_HOST
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct __align__(8) Pair { u32 x, y; };
struct __align__(16) Quad { u32 x, y, z, w; };
struct __align__(16) Floats { float x, y, z, w; };

#define KERNEL extern "C" __global__ void __launch_bounds__(256, GROUPS)
#define SHARED_TABLE(type, name, count) __shared__ type name[count]
#define SHARED_ROOM(name) extern __shared__ __align__(16) u8 name[]
#define BARRIER() __syncthreads()
#define FENCE() __threadfence()
#define COUNT(address) atomicAdd(address, 1)
#define THREAD ((int)threadIdx.x)

// 16 codes, if they are wanted; without a branch, which would keep the loads apart from the arithmetic.
__device__ __forceinline__ void read_codes(Pair& p, const u8* at, int wanted) {
    asm volatile("{ .reg .pred yes; setp.ne.s32 yes, %3, 0;\n"
                 "@yes ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(p.x), "+r"(p.y)
                 : "l"(at), "r"(wanted));
}

// 16 bytes to shared memory, or zeros; finished by `arrived`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// d += a b, one tile of 16 outputs, 16 inputs and 8 rows.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float from_half(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

__device__ __forceinline__ u16 narrow(float f) {
    u16 bits;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
    return bits;
}

__device__ __forceinline__ float widen(u16 bits) {
#if HALF
    return from_half(bits);
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ Floats read_uncached(const Floats* at) {
    Floats f;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "l"(at));
    return f;
}
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#endif

#define WARPS 8
#define NT ((ROWS + 7) / 8)              // tiles of 8 rows
#define OWN (KB * STEPS)                 // blocks of one warp
#define SLICE (WARPS * OWN * 64)         // inputs of one group of threads
#define ROOM (SLICE + 8)                 // elements from one row of x to the next: 16 bytes more, in other banks
#define R (16 * MT)                      // outputs of a tile
#define SUMS (R + 4)
#define NP (NT < 4 ? NT : 4)             // tiles of rows whose sums are joined at a time
#define MOST 256                         // tiles that a group walks at most

struct Scales {
#if WIDE
    float of[KB];
#elif KB == 4
    u64 bits;
#else
    u32 bits;
#endif
};

DEVICE void read_scales(Scales& s, const void* scales, u32 at, int there) {
#if WIDE
    UNROLL for (int b = 0; b < KB; b++) s.of[b] = b < there ? ((const float*)scales)[at + b] : 0.f;
#else
    const u16* from = (const u16*)scales + at;
#if EVEN && KB == 4
    s.bits = there > 0 ? *(const u64*)from : 0;
#elif EVEN && KB == 2
    s.bits = there > 0 ? *(const u32*)from : 0;
#else
    s.bits = 0;
    UNROLL for (int b = 0; b < KB; b++)
        if (b < there) {
#if KB == 4
            s.bits |= (u64)from[b] << (16 * b);
#else
            s.bits |= (u32)from[b] << (16 * b);
#endif
        }
#endif
#endif
}

DEVICE float scale_of(const Scales& s, int b) {
#if WIDE
    return s.of[b];
#else
    return from_half((u16)(s.bits >> (16 * b)));
#endif
}

// Four outputs of row c, from output n on.
DEVICE void finish(u16* y, const u16* bias, const Floats& sum, int c, int n, int out) {
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    UNROLL for (int k = 0; k < 4; k++)
        if (n + k < out) y[(long long)c * out + n + k] = narrow(four[k] + (bias ? widen(bias[n + k]) : 0.f));
}

// The two weights of a word's byte, in x's type, side by side.
#define LOOK_UP(word, byte)                \
    (*(const u32*)((const u8*)table +      \
                   (((byte) == 0 ? (word) << 7 & 0x7f80 : (word) >> (8 * (byte) - 7) & 0x7f80) | 4 * lane)))

// x [rows, width], rows x_stride elements apart; codes [out, width / 2]; scales [out, width / 64]; levels [16] in x's
// type; bias [out] or null; y [rows, out]. Where an output's sum is cut into slices (gridDim.y > 1): parts
// [tiles, slices, ROWS, R], and counters, one a tile, zero before and after.
KERNEL nf4_product(const u16* x, long long x_stride, const u8* codes, const void* scales, const u16* levels,
                   const u16* bias, u16* y, float* parts, int* counters, int rows, int out, int width) {
    SHARED_TABLE(u32, table, 256 * 32);
    SHARED_TABLE(u8, joins, MOST);
    SHARED_ROOM(room);
    u16* rows_of_x = (u16*)room;
    float* sums = (float*)(room + ROWS * ROOM * 2);

    const int warp = THREAD >> 5, lane = THREAD & 31, g = lane >> 2, t = lane & 3;
    const int blocks = width / 64, tiles = (out + R - 1) / R, slices = gridDim.y, slice = blockIdx.y;
    const int block0 = (slice * WARPS + warp) * OWN;
    const u32 row_bytes = width / 2;  // a weight is under 4 GiB

    // What a warp has of its next step: a step is KB of its blocks, for all outputs of a tile.
    Pair packed[MT][2][KB];
    Scales scale[MT][2], coming[MT][2];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
        const u32 row = (u32)min((int)blockIdx.x * R + m * 16 + h * 8 + g, out - 1);
        UNROLL for (int b = 0; b < KB; b++) {
            packed[m][h][b].x = packed[m][h][b].y = 0;
            read_codes(packed[m][h][b], codes + (row * row_bytes + min(block0 + b, blocks - 1) * 32 + t * 8), 1);
        }
        read_scales(scale[m][h], scales, row * (u32)blocks + block0, blocks - block0);
        coming[m][h] = scale[m][h];
    }

    // The table: entry e at 128 * e bytes, once for every lane. What is stored here is read only behind the barrier.
    {
        const int e = warp * 32 + lane;
        const u32 both = (u32)levels[e >> 4] | (u32)levels[e & 15] << 16;
        Quad four = {both, both, both, both};
        UNROLL for (int i = 0; i < 8; i++) *(Quad*)(table + e * 32 + ((i + lane) & 7) * 4) = four;
    }
    for (int i = THREAD; i < rows * (SLICE / 8); i += 256) {
        const int row = i / (SLICE / 8), k = i % (SLICE / 8) * 8;
        const bool inside = slice * SLICE + k < width;
        copy16(rows_of_x + row * ROOM + k, inside ? x + row * x_stride + slice * SLICE + k : x, inside);
    }
    arrived();
    BARRIER();

    const u16* own_x[NT];  // rows past the last stand for the first: nobody reads what comes of them
    UNROLL for (int n = 0; n < NT; n++)
        own_x[n] = rows_of_x + (n * 8 + g < rows ? n * 8 + g : 0) * ROOM + warp * OWN * 64 + 16 * t;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float total[MT][NT][4];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 4; i++)
            total[m][n][i] = 0.f;
        ROLLED for (int step = 0; step < STEPS; step++) {
            const bool same = step + 1 < STEPS;
            const int next = same ? tile : tile + gridDim.x, more = next < tiles;
            const int next_block = block0 + (same ? (step + 1) * KB : 0);
            u32 row_at[MT][2], block_at[KB];
            UNROLL for (int b = 0; b < KB; b++) block_at[b] = min(next_block + b, blocks - 1) * 32 + t * 8;
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
                const u32 row = (u32)min(next * R + m * 16 + h * 8 + g, out - 1);
                row_at[m][h] = row * row_bytes;
                if (more) read_scales(coming[m][h], scales, row * (u32)blocks + next_block, blocks - next_block);
            }
            UNROLL for (int b = 0; b < KB; b++) {
                Quad given[NT][2];
                UNROLL for (int n = 0; n < NT; n++) UNROLL for (int q = 0; q < 2; q++)
                    given[n][q] = *(const Quad*)(own_x[n] + (step * KB + b) * 64 + q * 8);
                UNROLL for (int m = 0; m < MT; m++) {
                    float part[NT][4];
                    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 4; i++) part[n][i] = 0.f;
                    UNROLL for (int j = 0; j < 4; j++) {
                        const u32 low = j < 2 ? packed[m][0][b].x : packed[m][0][b].y;
                        const u32 high = j < 2 ? packed[m][1][b].x : packed[m][1][b].y;
                        const u32 a0 = LOOK_UP(low, 2 * (j & 1)), a1 = LOOK_UP(high, 2 * (j & 1));
                        const u32 a2 = LOOK_UP(low, 2 * (j & 1) + 1), a3 = LOOK_UP(high, 2 * (j & 1) + 1);
                        UNROLL for (int n = 0; n < NT; n++) {
                            const Quad& q = given[n][j >> 1];
                            multiply(part[n], a0, a1, a2, a3, j & 1 ? q.z : q.x, j & 1 ? q.w : q.y);
                        }
                    }
                    // What was used makes room for the same place of the next step: all of one is always on its way.
                    UNROLL for (int h = 0; h < 2; h++)
                        read_codes(packed[m][h][b], codes + (row_at[m][h] + block_at[b]), more);
                    const float s0 = scale_of(scale[m][0], b), s1 = scale_of(scale[m][1], b);
                    UNROLL for (int n = 0; n < NT; n++) {
                        total[m][n][0] += s0 * part[n][0];
                        total[m][n][1] += s0 * part[n][1];
                        total[m][n][2] += s1 * part[n][2];
                        total[m][n][3] += s1 * part[n][3];
                    }
                }
            }
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) scale[m][h] = coming[m][h];
        }

        // The warps' sums, joined in the warps' order; NP tiles of rows at a time.
        UNROLL for (int n0 = 0; n0 < NT; n0 += NP) {
            if (n0) BARRIER();
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NP; n++) UNROLL for (int i = 0; i < 4; i++)
                sums[(warp * 8 * NP + n * 8 + 2 * t + (i & 1)) * SUMS + m * 16 + (i >> 1) * 8 + g] = total[m][n0 + n][i];
            BARRIER();
            for (int i = THREAD; i < min(rows - 8 * n0, 8 * NP) * (R / 4); i += 256) {
                const int own = i / (R / 4), c = 8 * n0 + own, r = i % (R / 4) * 4;
                Floats sum = *(const Floats*)(sums + own * SUMS + r);
                UNROLL for (int w = 1; w < WARPS; w++) {
                    const Floats other = *(const Floats*)(sums + (w * 8 * NP + own) * SUMS + r);
                    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                }
                if (slices > 1)
                    *(Floats*)(parts + (((long long)tile * slices + slice) * ROWS + c) * R + r) = sum;
                else
                    finish(y, bias, sum, c, tile * R + r, out);
            }
        }
        BARRIER();
    }
    if (slices == 1) return;

    // Once for all tiles: whoever counts last sees everybody's parts, and adds them in the slices' order, so that it is
    // the same sum every time.
    FENCE();
    BARRIER();
    const int walked = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    if (THREAD < walked) {
        int* counter = counters + blockIdx.x + THREAD * gridDim.x;
        joins[THREAD] = COUNT(counter) == slices - 1;
        if (joins[THREAD]) *counter = 0;
    }
    BARRIER();
    FENCE();
    for (int i = THREAD; i < walked * rows * (R / 4); i += 256) {
        const int place = i / (rows * (R / 4)), c = i / (R / 4) % rows, r = i % (R / 4) * 4;
        if (!joins[place]) continue;
        const long long tile = blockIdx.x + place * (int)gridDim.x;
        Floats sum = {0.f, 0.f, 0.f, 0.f};
        for (int s = 0; s < slices; s++) {
            const Floats part = read_uncached((const Floats*)(parts + ((tile * slices + s) * ROWS + c) * R + r));
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        finish(y, bias, sum, c, (int)tile * R + r, out);
    }
}
