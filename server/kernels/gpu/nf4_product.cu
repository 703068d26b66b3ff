// Products with NF4 weights for few rows: y[m, n] = sum over k of x[m, k] * scale[n, k / 64] * level[code[n, k]].
//
// Written for memory's pace: codes go from memory to registers as bitsandbytes packed them, each byte becomes two
// weights by one look-up in shared memory (a copy of the table for every lane, so that no two lanes meet in a bank),
// its block's scale multiplies both, and the tensor cores do the rest. See nf4_cuda.py for how it is cut up.
//
// Constants given by the compiler's command line:
//   WIDTH   inputs, a multiple of 64
//   ROWS    a power of two: the most rows of x
//   WGMMA   1: four warps multiply together, 64 outputs by all rows of x at once (compute capability 9.0 alone);
//           0: every warp for itself, 16 outputs by 8 rows
//   WARPS   of a group of threads; they, or their fours, are its sharers
//   APART   0: the sharers split the group's slice of 64 * SHARERS * KB * STEPS inputs and add up their sums;
//           1: each has tiles of outputs of its own, and all of a slice of 64 * KB * STEPS inputs
//   MT      tiles of 16 outputs that every warp has at a time
//   KB      blocks of 64 inputs that every warp has on their way at a time: 2 or 4
//   STEPS   times KB: the blocks of one warp
//   NP      tiles of 8 rows whose sums are joined at a time
//   BY_REGISTERS  1: without WGMMA too, x goes by way of registers; 0: by copies that bypass them
//   AHEAD   times a group walks on, whose codes it asks for before the kernel in front of it has ended; 0: those of its
//           first step alone
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

// So many bytes, a multiple of 16, to the second cache; nobody waits for them.
DEVICE void fetch_later(const u8* at, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}

// 16 bytes to shared memory, or zeros; finished by `arrived`.
DEVICE void copy16(void* to, const void* from, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

DEVICE void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The word's byte b as second byte, above the lowest one of `low`, which is less than 256.
DEVICE u32 entry(u32 word, int b, u32 low) { return __byte_perm(word, low, 0x5504 | b << 4); }

// Shared memory that a launch asks for begins here where a kernel declares none itself. As a number in the instruction
// it costs nothing; as an address in a register it would be added anew for every byte.
#define ROOM_AT 1024
DEVICE bool table_is_there(const void* table) { return (u32)__cvta_generic_to_shared(table) == ROOM_AT; }
DEVICE u32 in_table(const void*, u32 at) {
    u32 both;
    asm volatile("ld.shared.u32 %0, [%1+1024];" : "=r"(both) : "r"(at));
    return both;
}

// What all lanes of a warp have alike, as the compiler is to know.
DEVICE int alike(int value) { return __shfl_sync(0xffffffff, value, 0); }

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

// 16 bytes of what kernels before this one wrote.
DEVICE Quad read_fresh(const u16* at) {
    Quad q;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(at) : "memory");
    return q;
}

#if WGMMA
#if HALF
#define WIDE_PRODUCT(shape) "wgmma.mma_async.sync.aligned." shape ".f32.f16.f16 "
#else
#define WIDE_PRODUCT(shape) "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 "
#endif
#define FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WITH(a, x) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x)

// What shared memory holds of x, as the tensor cores are told: 8 rows by 16 bytes lie together, `across` bytes from
// there to the next 8 inputs, `down` bytes to the next 8 rows.
DEVICE u64 described(const void* at, u32 across, u32 down) {
    const u32 address = (u32)__cvta_generic_to_shared(at);
    return (u64)((address & 0x3ffff) >> 4) | (u64)(across >> 4) << 16 | (u64)(down >> 4) << 32;
}

// What was written to shared memory is seen by the tensor cores, once a barrier has followed.
DEVICE void show_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Around the multiplications that take their a from registers; the second lets those before them end.
DEVICE void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void let_run() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}
DEVICE void finish_multiplying() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// d += a x, one tile of 64 x 16 times 16 x rows; d and a as in `multiply`, 16 rows of them a warp.
template <int TILES>
DEVICE void multiply_wide(float (&d)[TILES][4], const u32 (&a)[4], u64 x) {
    if constexpr (TILES == 1)
        asm volatile("{ .reg .pred add; setp.eq.u64 add, %8, %8;\n" WIDE_PRODUCT("m64n8k16")
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, add, 1, 1, 0; }" : FOUR(0) : WITH(a, x));
    if constexpr (TILES == 2)
        asm volatile("{ .reg .pred add; setp.eq.u64 add, %12, %12;\n" WIDE_PRODUCT("m64n16k16")
                     "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, add, 1, 1, 0; }"
                     : FOUR(0), FOUR(1) : WITH(a, x));
    if constexpr (TILES == 4)
        asm volatile("{ .reg .pred add; setp.eq.u64 add, %20, %20;\n" WIDE_PRODUCT("m64n32k16")
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, add, 1, 1, 0; }"
                     : FOUR(0), FOUR(1), FOUR(2), FOUR(3) : WITH(a, x));
    if constexpr (TILES == 8)
        asm volatile("{ .reg .pred add; setp.eq.u64 add, %36, %36;\n" WIDE_PRODUCT("m64n64k16")
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                     "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, 0; }"
                     : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7) : WITH(a, x));
}
#endif

DEVICE Floats read_uncached(const Floats* at) {
    Floats f;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "l"(at));
    return f;
}
#endif

#define NT ((ROWS + 7) / 8)                   // tiles of 8 rows
#define BLOCKS (WIDTH / 64)
#define OWN (KB * STEPS)                      // blocks of one sharer
#if WGMMA
#define SHARERS (WARPS / 4)
#define TILE 64                               // outputs
#define CHUNK (NT * 512 + 64)                 // bytes of 32 inputs of x; 64 more, so that neighbours are in other banks
#define X_BYTES (SLICE / 32 * CHUNK)
#else
#define SHARERS WARPS
#define TILE 16
#define ROOM (SLICE + 32)                     // elements from one row of x to the next: 64 bytes more, in other banks
#define X_BYTES (ROWS * ROOM * 2)
#endif
#define SPLIT (APART ? 1 : SHARERS)           // parts of a slice
#define WALK (APART ? SHARERS : 1)            // tiles that a group has at a time
#define SLICE (SPLIT * OWN * 64)              // inputs of one group
#define SLICES ((WIDTH + SLICE - 1) / SLICE)
#define R (TILE * MT)                         // outputs of a group at a time
#define SUMS (R + 4)
#define MOST 256                              // times R outputs that a group walks at most
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

// The two weights of a word's byte, in x's type, side by side. Entries lie 256 bytes apart, of which a lane's own four
// are read: so the byte's place in the address is made by moving bytes alone, in one instruction.
#define LOOK_UP(word, byte) in_table(table, entry(word, byte, 4 * lane))
#define TABLE 0x10000  // bytes

// x [rows, WIDTH], rows x_stride elements apart; codes [out, WIDTH / 2]; scales [out, BLOCKS]; levels [16] in x's type;
// bias [out] or null; y [rows, out]. Where there are several slices: parts [tiles, SLICES, ROWS, R], and counters, one a
// tile, zero before and after.
//
// Four lanes have a row of the weight: of every two blocks, each has 32 inputs side by side. Which inputs meet in one
// multiplication of the tensor cores is of no matter as long as x has the same: lane t's 4 * j ... 4 * j + 3 in the j-th.
KERNEL nf4_product(const u16* x, long long x_stride, const u8* codes, const void* scales, const u16* levels,
                   const u16* bias, u16* y, float* parts, int* counters, int rows, int out) {
    let_next_begin();
    SHARED_ROOM(table);
    u8* joins = table + TABLE;
    u8* room = joins + MOST;
    float* sums = (float*)(room + X_BYTES);
    if (!table_is_there(table)) return;  // then what comes out is wrong, and found to be so when an engine starts

    const int warp = THREAD >> 5, lane = THREAD & 31, g = lane >> 2, t = lane & 3;
    const int tiles = (out + R - 1) / R, slice = blockIdx.y;
    const int sharer = alike(WGMMA ? warp >> 2 : warp), lane_row = WGMMA ? (warp & 3) * 16 + g : g;
    const int block0 = (slice * SPLIT + (APART ? 0 : sharer)) * OWN, second = t >> 1;  // of two blocks, the lane's
    const int tile0 = APART ? (int)blockIdx.x * SHARERS + sharer : (int)blockIdx.x, stride = WALK * (int)gridDim.x;

    // What a warp has of its next step: a step is KB of its blocks, for all outputs of a tile.
    Quad packed[MT][2][KB / 2];
    Scales scale[MT][2], coming[MT][2];
    {
        const int row0 = tile0 * R + lane_row;
        const u8* from = codes + (long long)row0 * (WIDTH / 2) + block0 * 32 + t * 16;
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
            const int row = m * TILE + h * 8;
            UNROLL for (int p = 0; p < KB / 2; p++) {
                packed[m][h][p] = Quad{0, 0, 0, 0};
                read_codes(packed[m][h][p], from + row * (WIDTH / 2) + p * 64,
                           row0 + row < out && block0 + 2 * p + second < BLOCKS);
            }
            read_scales(scale[m][h], scales, (u32)min(row0 + row, out - 1), block0);
            coming[m][h] = scale[m][h];
        }
    }

#if AHEAD
    // Memory would idle until the kernel in front has ended. A row is one instruction.
    for (int i = THREAD; i < AHEAD * WALK * R; i += THREADS) {
        const int row = ((int)blockIdx.x * WALK + i / (WALK * R) * stride) * R + i % (WALK * R);
        const int bytes = min(SLICE, WIDTH - slice * SLICE) / 2;
        if (row < out) fetch_later(codes + (long long)row * (WIDTH / 2) + slice * (SLICE / 2), bytes);
    }
#endif

    // The table: entry e at 256 * e bytes, once for every lane. What is stored here is read only behind the barrier.
    if (THREAD < 256) {
        const int e = THREAD;
        const u32 both = (u32)levels[e >> 4] | (u32)levels[e & 15] << 16;
        Quad four = {both, both, both, both};
        UNROLL for (int i = 0; i < 8; i++) *(Quad*)(table + e * 256 + ((i + lane) & 7) * 16) = four;
    }
    wait_for_writes();
    // Every group begins elsewhere: all of them asking for the same lines at the same moment had a third of the pace.
#if WGMMA
    // Of 128 inputs, four lanes have 32 each, of which the tensor cores get four at a time: two in each of two columns
    // of 8 rows by 16 bytes. A warp moves 32 inputs a lane pair, of four rows at a time.
    const int moves = SLICE / 64 * ((rows + 3) / 4), rotation = (int)(blockIdx.x * 5 % 16) * (moves / 16);
    for (int at = warp; at < moves; at += 8 * WARPS) {
        Quad got[8];
        u8* to[8];
        UNROLL for (int i = 0; i < 8; i++) {
            const int turned = at + i * WARPS + rotation, move = turned < moves ? turned : turned - moves;
            const int half = move % (SLICE / 64), n = move / (SLICE / 64) * 4 + (lane >> 3);
            const int own = lane >> 1 & 3, q = (half & 1) * 2 + (lane & 1), k = (half >> 1) * 128 + own * 32 + q * 8;
            const bool there = at + i * WARPS < moves && n < rows;
            to[i] = there ? room + ((half >> 1) * 4 + q) * CHUNK + (n >> 3) * 128 + (n & 7) * 16 + own * 4 : nullptr;
            got[i] = Quad{0, 0, 0, 0};
            if (there && slice * SLICE + k < WIDTH) got[i] = read_fresh(x + n * x_stride + slice * SLICE + k);
        }
        UNROLL for (int i = 0; i < 8; i++)
            if (to[i]) {
                *(u32*)to[i] = got[i].x, *(u32*)(to[i] + NT * 128) = got[i].y;
                *(u32*)(to[i] + 2 * NT * 128) = got[i].z, *(u32*)(to[i] + 3 * NT * 128) = got[i].w;
            }
    }
    show_tensor_cores();
    BARRIER();
    const u64 own_x = described(room + (APART ? 0 : sharer) * (OWN * 2) * CHUNK, NT * 128, 128);
#else
    // Of 128 inputs, the q-th 16 bytes of all four lanes lie side by side.
    u16* rows_of_x = (u16*)room;
#if BY_REGISTERS
    // Many loads are under way before the first is stored.
    const int moves = rows * (SLICE / 8), rotation = (int)(blockIdx.x * 5 % 16) * (moves / 16);
    for (int at = THREAD; at < moves; at += 8 * THREADS) {
        Quad got[8];
        UNROLL for (int i = 0; i < 8; i++) {
            const int turned = at + i * THREADS + rotation, move = turned < moves ? turned : turned - moves;
            const int row = move / (SLICE / 8), k = move % (SLICE / 8) * 8;
            got[i] = Quad{0, 0, 0, 0};
            if (at + i * THREADS < moves && slice * SLICE + k < WIDTH)
                got[i] = read_fresh(x + row * x_stride + slice * SLICE + k);
        }
        UNROLL for (int i = 0; i < 8; i++) {
            const int turned = at + i * THREADS + rotation, move = turned < moves ? turned : turned - moves;
            const int row = move / (SLICE / 8), k = move % (SLICE / 8) * 8, chunk = k / 8 & 15;
            if (at + i * THREADS < moves)
                *(Quad*)(rows_of_x + row * ROOM + (k & ~127) + ((chunk & 3) * 4 + (chunk >> 2)) * 8) = got[i];
        }
    }
#else
    const int begin = (int)(blockIdx.x * 5 % 16) * (rows * (SLICE / 8) / 16);
    for (int at = THREAD; at < rows * (SLICE / 8); at += THREADS) {
        const int i = at + begin < rows * (SLICE / 8) ? at + begin : at + begin - rows * (SLICE / 8);
        const int row = i / (SLICE / 8), k = i % (SLICE / 8) * 8, chunk = k / 8 & 15;
        const bool inside = slice * SLICE + k < WIDTH;
        copy16(rows_of_x + row * ROOM + (k & ~127) + ((chunk & 3) * 4 + (chunk >> 2)) * 8,
               inside ? x + row * x_stride + slice * SLICE + k : x, inside);
    }
    arrived();
#endif
    BARRIER();

    const u16* own_x[NT];  // rows past the last stand for the first: nobody reads what comes of them
    UNROLL for (int n = 0; n < NT; n++)
        own_x[n] = rows_of_x + (n * 8 + g < rows ? n * 8 + g : 0) * ROOM + (APART ? 0 : warp) * OWN * 64 + 8 * t;
#endif
    for (int tile = tile0; tile < tiles; tile += stride) {
        float total[MT][NT][4];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 4; i++)
            total[m][n][i] = 0.f;
        ROLLED for (int step = 0; step < STEPS; step++) {
            const bool same = step + 1 < STEPS;
            const int next = same ? tile : tile + stride;
            const int next_block = block0 + (same ? (step + 1) * KB : 0), row0 = next * R + lane_row;
            const u8* from = codes + (long long)row0 * (WIDTH / 2) + next_block * 32 + t * 16;
            if (next < tiles) {
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    read_scales(coming[m][h], scales, (u32)min(row0 + m * TILE + h * 8, out - 1), next_block);
            }
            UNROLL for (int p = 0; p < KB / 2; p++) {
                u32 factor[MT][2];
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    factor[m][h] = scale_of(scale[m][h], p, second);
                UNROLL for (int q = 0; q < 4; q++) {
#if !WGMMA
                    Quad given[NT];
                    UNROLL for (int n = 0; n < NT; n++)
                        given[n] = *(const Quad*)(own_x[n] + step * KB * 64 + p * 128 + q * 32);
#endif
                    UNROLL for (int m = 0; m < MT; m++) {
                        const Quad& upper = packed[m][0][p];
                        const Quad& lower = packed[m][1][p];
                        const u32 up = q == 0 ? upper.x : q == 1 ? upper.y : q == 2 ? upper.z : upper.w;
                        const u32 low = q == 0 ? lower.x : q == 1 ? lower.y : q == 2 ? lower.z : lower.w;
                        u32 a[2][4];
                        UNROLL for (int j = 0; j < 2; j++) {
                            a[j][0] = times(LOOK_UP(up, 2 * j), factor[m][0]);
                            a[j][1] = times(LOOK_UP(low, 2 * j), factor[m][1]);
                            a[j][2] = times(LOOK_UP(up, 2 * j + 1), factor[m][0]);
                            a[j][3] = times(LOOK_UP(low, 2 * j + 1), factor[m][1]);
#if !WGMMA
                            UNROLL for (int n = 0; n < NT; n++)
                                multiply(total[m][n], a[j][0], a[j][1], a[j][2], a[j][3], j ? given[n].z : given[n].x,
                                         j ? given[n].w : given[n].y);
#endif
                        }
#if WGMMA
                        begin_multiplying();
                        UNROLL for (int j = 0; j < 2; j++)
                            multiply_wide(total[m], a[j],
                                          own_x + (((step * KB / 2 + p) * 4 + q) * CHUNK + j * 2 * NT * 128) / 16);
                        let_run();
#endif
                    }
                }
                // What was used makes room for the same place of the next step: all of one is always on its way.
                UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++)
                    read_codes(packed[m][h][p], from + (m * TILE + h * 8) * (WIDTH / 2) + p * 64,
                               row0 + m * TILE + h * 8 < out && next_block + 2 * p + second < BLOCKS);
            }
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) scale[m][h] = coming[m][h];
        }

#if WGMMA
        finish_multiplying();
#endif
#if APART
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 4; i++) {
            const int c = n * 8 + 2 * t + (i & 1), r = m * TILE + (i >> 1) * 8 + lane_row;
            if (c >= rows) continue;
            if (SLICES > 1)
                parts[(((long long)tile * SLICES + slice) * ROWS + c) * R + r] = total[m][n][i];
            else if (tile * R + r < out)
                y[(long long)c * out + tile * R + r] = narrow(total[m][n][i] + (bias ? widen(bias[tile * R + r]) : 0.f));
        }
#else
        // The sharers' sums, joined in their order.
        UNROLL for (int n0 = 0; n0 < NT; n0 += NP) {
            if (n0) BARRIER();
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < NP; n++) UNROLL for (int i = 0; i < 4; i++)
                sums[(sharer * 8 * NP + n * 8 + 2 * t + (i & 1)) * SUMS + m * TILE + (i >> 1) * 8 + lane_row] =
                    total[m][n0 + n][i];
            BARRIER();
            for (int i = THREAD; i < min(rows - 8 * n0, 8 * NP) * (R / 4); i += THREADS) {
                const int own = i / (R / 4), c = 8 * n0 + own, r = i % (R / 4) * 4;
                Floats sum = *(const Floats*)(sums + own * SUMS + r);
                UNROLL for (int w = 1; w < SHARERS; w++) {
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
#endif
    }
    if (SLICES == 1) return;

    // Once for all tiles: whoever counts last sees everybody's parts, and adds them in the slices' order, so that it is
    // the same sum every time.
    FENCE();
    BARRIER();
    const int turns = ((tiles + WALK - 1) / WALK - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    const int walked = turns * WALK, first = (int)blockIdx.x * WALK;
    if (THREAD < walked) {
        const int tile = first + THREAD / WALK * stride + THREAD % WALK;
        const bool last = tile < tiles && COUNT(counters + tile) == SLICES - 1;
        joins[THREAD] = last;
        if (last) counters[tile] = 0;
    }
    BARRIER();
    FENCE();
    for (int i = THREAD; i < walked * rows * (R / 4); i += THREADS) {
        const int place = i / (rows * (R / 4)), c = i / (R / 4) % rows, r = i % (R / 4) * 4;
        if (!joins[place]) continue;
        const long long tile = first + place / WALK * stride + place % WALK;
        Floats part[SLICES], sum = {0.f, 0.f, 0.f, 0.f};
        UNROLL for (int s = 0; s < SLICES; s++)
            part[s] = read_uncached((const Floats*)(parts + ((tile * SLICES + s) * ROWS + c) * R + r));
        UNROLL for (int s = 0; s < SLICES; s++)
            sum.x += part[s].x, sum.y += part[s].y, sum.z += part[s].z, sum.w += part[s].w;
        finish(y, bias, sum, c, (int)tile * R + r, out);
    }
}
