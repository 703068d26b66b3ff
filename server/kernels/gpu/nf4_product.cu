// Products with NF4 weights for few rows: y[m, n] = sum over k of x[m, k] * scale[n, k / 64] * level[code[n, k]].
//
// Written for memory's pace: codes go from memory to registers as bitsandbytes packed them, each byte becomes two
// weights by one look-up in shared memory (a copy of the table for every lane, so that no two lanes meet in a bank),
// its block's scale multiplies both, and the tensor cores do the rest. See nf4_cuda.py for how it is cut up.
//
// Constants given by the compiler's command line:
//   WIDTH   inputs, a multiple of 64
//   ROWS    a power of two: the most rows of x
//   WARPS   of a group of threads; they share its slice of 64 * WARPS * KB * STEPS inputs
//   MT      tiles of 16 outputs that every warp has at a time
//   KB      blocks of 64 inputs that every warp has on their way at a time: 2 or 4
//   STEPS   times KB: the blocks of one warp
//   NP      tiles of 8 rows whose sums are joined at a time
//   AHEAD   tiles of a group whose codes are asked for before x is there
//   HALF    1: x and y are float16, 0: bfloat16
//   WIDE    1: scales are float32, 0: float16
#include "device.cuh"

#ifndef LORAPLEX_HOST
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)

// 32 codes, if they are wanted; without a branch, which would keep the loads apart from the arithmetic.
DEVICE void read_codes(Quad& q, const u8* at, int wanted) {
    asm volatile("{ .reg .pred yes; setp.ne.s32 yes, %5, 0;\n"
                 "@yes ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)
                 : "l"(at), "r"(wanted));
}

// Into the card's cache, for later; a multiple of 16 bytes.
DEVICE void fetch_ahead(const void* at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes));
#endif
}

// 16 bytes to shared memory, or zeros; finished by `arrived`.
DEVICE void copy16(void* to, const void* from, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

DEVICE void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same number twice, in x's type.
DEVICE u32 twice(float f) { return narrow(f) * 0x10001u; }

// Two numbers times two.
DEVICE u32 times(u32 a, u32 b) {
    u32 product;
#if HALF
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#endif
    return product;
}

DEVICE Floats read_uncached(const Floats* at) {
    Floats f;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "l"(at));
    return f;
}
#endif

#define NT ((ROWS + 7) / 8)                   // tiles of 8 rows
#define BLOCKS (WIDTH / 64)
#define OWN (KB * STEPS)                      // blocks of one warp
#define SLICE (WARPS * OWN * 64)              // inputs of one group
#define SLICES ((WIDTH + SLICE - 1) / SLICE)
#define ROOM (SLICE + 32)                     // elements from one row of x to the next: 64 bytes more, in other banks
#define R (16 * MT)                           // outputs of a tile
#define SUMS (R + 4)
#define MOST 256                              // tiles that a group walks at most
#define THREADS (32 * WARPS)

// Of KB blocks, side by side.
struct Scales {
#if WIDE
    float of[KB];
#else
    u64 bits;
#endif
};

DEVICE void read_scales(Scales& s, const void* scales, u32 row, int block) {
    const u32 at = row * BLOCKS + block;
#if WIDE
    UNROLL for (int b = 0; b < KB; b++) s.of[b] = block + b < BLOCKS ? ((const float*)scales)[at + b] : 0.f;
#elif BLOCKS % KB == 0 && KB == 4
    s.bits = block < BLOCKS ? *(const u64*)((const u16*)scales + at) : 0;
#elif BLOCKS % KB == 0
    s.bits = block < BLOCKS ? *(const u32*)((const u16*)scales + at) : 0;
#else
    s.bits = 0;
    UNROLL for (int b = 0; b < KB; b++)
        if (block + b < BLOCKS) s.bits |= (u64)((const u16*)scales)[at + b] << (16 * b);
#endif
}

// The scale of block 2 * p or, where `second`, of the one after it.
DEVICE u32 scale_of(const Scales& s, int p, int second) {
#if WIDE
    return twice(second ? s.of[2 * p + 1] : s.of[2 * p]);
#else
    const u32 both = (u32)(s.bits >> (32 * p));
    return twice(from_half((u16)(second ? both >> 16 : both)));
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

// x [rows, WIDTH], rows x_stride elements apart; codes [out, WIDTH / 2]; scales [out, BLOCKS]; levels [16] in x's type;
// bias [out] or null; y [rows, out]. Where there are several slices: parts [tiles, SLICES, ROWS, R], and counters, one a
// tile, zero before and after.
//
// Four lanes have a row of the weight: of every two blocks, each has 32 inputs side by side. Which inputs meet in one
// multiplication of the tensor cores is of no matter as long as x has the same: lane t's 4 * j ... 4 * j + 3 in the j-th.
KERNEL nf4_product(const u16* x, long long x_stride, const u8* codes, const void* scales, const u16* levels,
                   const u16* bias, u16* y, float* parts, int* counters, int rows, int out) {
    let_next_begin();
    SHARED_TABLE(u32, table, 256 * 32);
    SHARED_TABLE(u8, joins, MOST);
    SHARED_ROOM(room);
    u16* rows_of_x = (u16*)room;
    float* sums = (float*)(room + ROWS * ROOM * 2);

    const int warp = THREAD >> 5, lane = THREAD & 31, g = lane >> 2, t = lane & 3;
    const int tiles = (out + R - 1) / R, slice = blockIdx.y;
    const int block0 = (slice * WARPS + warp) * OWN, second = t >> 1;  // of every two blocks, which is this lane's

    // What a warp has of its next step: a step is KB of its blocks, for all outputs of a tile.
    Quad packed[MT][2][KB / 2];
    Scales scale[MT][2], coming[MT][2];
    {
        const int row0 = (int)blockIdx.x * R + g;
        const u8* from = codes + (long long)row0 * (WIDTH / 2) + block0 * 32 + t * 16;
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
            const int row = m * 16 + h * 8;
            UNROLL for (int p = 0; p < KB / 2; p++) {
                packed[m][h][p] = Quad{0, 0, 0, 0};
                read_codes(packed[m][h][p], from + row * (WIDTH / 2) + p * 64,
                           row0 + row < out && block0 + 2 * p + second < BLOCKS);
            }
            read_scales(scale[m][h], scales, (u32)min(row0 + row, out - 1), block0);
            coming[m][h] = scale[m][h];
        }
    }

    // While x is still being made, memory has nothing to do: the codes of the first tiles go on their way.
    for (int i = THREAD; i < AHEAD * R; i += THREADS) {
        const int row = ((int)blockIdx.x + i / R * (int)gridDim.x) * R + i % R;
        const int from = slice * (SLICE / 2), bytes = min(SLICE / 2, WIDTH / 2 - from);
        if (row < out) fetch_ahead(codes + (long long)row * (WIDTH / 2) + from, bytes);
    }
    // The table: entry e at 128 * e bytes, once for every lane. What is stored here is read only behind the barrier.
    if (THREAD < 256) {
        const int e = THREAD;
        const u32 both = (u32)levels[e >> 4] | (u32)levels[e & 15] << 16;
        Quad four = {both, both, both, both};
        UNROLL for (int i = 0; i < 8; i++) *(Quad*)(table + e * 32 + ((i + lane) & 7) * 4) = four;
    }
    // Of 128 inputs, the q-th 16 bytes of all four lanes lie side by side. Every group begins elsewhere: all of them
    // asking for the same lines at the same moment had a third of the pace.
    const int begin = (int)(blockIdx.x * 5 % 16) * (rows * (SLICE / 8) / 16);
    wait_for_writes();
    for (int at = THREAD; at < rows * (SLICE / 8); at += THREADS) {
        const int i = at + begin < rows * (SLICE / 8) ? at + begin : at + begin - rows * (SLICE / 8);
        const int row = i / (SLICE / 8), k = i % (SLICE / 8) * 8, chunk = k / 8 & 15;
        const bool inside = slice * SLICE + k < WIDTH;
        copy16(rows_of_x + row * ROOM + (k & ~127) + ((chunk & 3) * 4 + (chunk >> 2)) * 8,
               inside ? x + row * x_stride + slice * SLICE + k : x, inside);
    }
    arrived();
    BARRIER();

    const u16* own_x[NT];  // rows past the last stand for the first: nobody reads what comes of them
    UNROLL for (int n = 0; n < NT; n++)
        own_x[n] = rows_of_x + (n * 8 + g < rows ? n * 8 + g : 0) * ROOM + warp * OWN * 64 + 8 * t;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float total[MT][NT][4];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 4; i++)
            total[m][n][i] = 0.f;
        ROLLED for (int step = 0; step < STEPS; step++) {
            const bool same = step + 1 < STEPS;
            const int next = same ? tile : tile + gridDim.x;
            const int next_block = block0 + (same ? (step + 1) * KB : 0), row0 = next * R + g;
            const u8* from = codes + (long long)row0 * (WIDTH / 2) + next_block * 32 + t * 16;
            if (next < tiles) {
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    read_scales(coming[m][h], scales, (u32)min(row0 + m * 16 + h * 8, out - 1), next_block);
            }
            UNROLL for (int p = 0; p < KB / 2; p++) {
                u32 factor[MT][2];
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    factor[m][h] = scale_of(scale[m][h], p, second);
                UNROLL for (int q = 0; q < 4; q++) {
                    Quad given[NT];
                    UNROLL for (int n = 0; n < NT; n++)
                        given[n] = *(const Quad*)(own_x[n] + step * KB * 64 + p * 128 + q * 32);
                    UNROLL for (int m = 0; m < MT; m++) {
                        const Quad& upper = packed[m][0][p];
                        const Quad& lower = packed[m][1][p];
                        const u32 up = q == 0 ? upper.x : q == 1 ? upper.y : q == 2 ? upper.z : upper.w;
                        const u32 low = q == 0 ? lower.x : q == 1 ? lower.y : q == 2 ? lower.z : lower.w;
                        UNROLL for (int j = 0; j < 2; j++) {
                            const u32 a0 = times(LOOK_UP(up, 2 * j), factor[m][0]);
                            const u32 a1 = times(LOOK_UP(low, 2 * j), factor[m][1]);
                            const u32 a2 = times(LOOK_UP(up, 2 * j + 1), factor[m][0]);
                            const u32 a3 = times(LOOK_UP(low, 2 * j + 1), factor[m][1]);
                            UNROLL for (int n = 0; n < NT; n++)
                                multiply(total[m][n], a0, a1, a2, a3, j ? given[n].z : given[n].x,
                                         j ? given[n].w : given[n].y);
                        }
                    }
                }
                // What was used makes room for the same place of the next step: all of one is always on its way.
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    read_codes(packed[m][h][p], from + (m * 16 + h * 8) * (WIDTH / 2) + p * 64,
                               row0 + m * 16 + h * 8 < out && next_block + 2 * p + second < BLOCKS);
            }
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) scale[m][h] = coming[m][h];
        }

        // The warps' sums, joined in the warps' order.
        UNROLL for (int n0 = 0; n0 < NT; n0 += NP) {
            if (n0) BARRIER();
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NP; n++) UNROLL for (int i = 0; i < 4; i++)
                sums[(warp * 8 * NP + n * 8 + 2 * t + (i & 1)) * SUMS + m * 16 + (i >> 1) * 8 + g] = total[m][n0 + n][i];
            BARRIER();
            for (int i = THREAD; i < min(rows - 8 * n0, 8 * NP) * (R / 4); i += THREADS) {
                const int own = i / (R / 4), c = 8 * n0 + own, r = i % (R / 4) * 4;
                Floats sum = *(const Floats*)(sums + own * SUMS + r);
                UNROLL for (int w = 1; w < WARPS; w++) {
                    const Floats other = *(const Floats*)(sums + (w * 8 * NP + own) * SUMS + r);
                    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                }
                if (SLICES > 1)
                    *(Floats*)(parts + (((long long)tile * SLICES + slice) * ROWS + c) * R + r) = sum;
                else
                    finish(y, bias, sum, c, tile * R + r, out);
            }
        }
        BARRIER();
    }
    if (SLICES == 1) return;

    // Once for all tiles: whoever counts last sees everybody's parts, and adds them in the slices' order, so that it is
    // the same sum every time.
    FENCE();
    BARRIER();
    const int walked = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    if (THREAD < walked) {
        int* counter = counters + blockIdx.x + THREAD * gridDim.x;
        joins[THREAD] = COUNT(counter) == SLICES - 1;
        if (joins[THREAD]) *counter = 0;
    }
    BARRIER();
    FENCE();
    for (int i = THREAD; i < walked * rows * (R / 4); i += THREADS) {
        const int place = i / (rows * (R / 4)), c = i / (R / 4) % rows, r = i % (R / 4) * 4;
        if (!joins[place]) continue;
        const long long tile = blockIdx.x + place * (int)gridDim.x;
        Floats part[SLICES], sum = {0.f, 0.f, 0.f, 0.f};
        UNROLL for (int s = 0; s < SLICES; s++)
            part[s] = read_uncached((const Floats*)(parts + ((tile * SLICES + s) * ROWS + c) * R + r));
        UNROLL for (int s = 0; s < SLICES; s++)
            sum.x += part[s].x, sum.y += part[s].y, sum.z += part[s].z, sum.w += part[s].w;
        finish(y, bias, sum, c, (int)tile * R + r, out);
    }
}
