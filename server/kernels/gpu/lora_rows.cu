// Low-rank deltas of decode steps: few tokens share an adapter, so every number is read once and what counts is how
// many are under way.
//
//   EXPAND 0:  h[t, r] = x[t] . a[r]                        in SPLITS parts of the input
//   EXPAND 1:  y[t]   += sum over r of weight * h[t, r] * b[r]
//
// Numbers go from memory to registers as the tensor cores want them: the adapter's 16 rows are the long side of their
// tile, up to 8 tokens the short one. What is summed in which order depends on the layer alone. How work is planned is
// told in lora_plan.py, what the constants are in lora_cuda.py:
//   HALF    1: float16, 0: bfloat16
//   SITES   linears that share x
//   SPLITS  parts of the input, STEPS * 512 inputs each
//   STEPS   times 512 inputs
//   WARPS   of a thread group: 4
//   WIDTH   inputs
//   BLOCKS  times 64 columns: a tile of the expand
//   GROUPS  thread groups that are to fit a processor
#include "device.cuh"

#ifndef LORAPLEX_HOST
#define KERNEL extern "C" __global__ void __launch_bounds__(128, GROUPS)

// 16 bytes that nothing writes while a step runs, if they are wanted, else zeros.
DEVICE Quad read_constant(const u16* at, bool wanted) {
    Quad q = {0, 0, 0, 0};
    asm volatile("{ .reg .pred yes; setp.ne.s32 yes, %5, 0;\n"
                 "@yes ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)
                 : "l"(at), "r"((int)wanted));
    return q;
}

// 16 bytes of what kernels before this one wrote: not from the processor's own cache.
DEVICE Quad read_fresh(const void* at) {
    Quad q;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(at) : "memory");
    return q;
}

DEVICE Quad read_fresh_if(const void* at, bool wanted) {
    Quad q = {0, 0, 0, 0};
    asm volatile("{ .reg .pred yes; setp.ne.s32 yes, %5, 0;\n"
                 "@yes ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)
                 : "l"(at), "r"((int)wanted)
                 : "memory");
    return q;
}

DEVICE void write(void* at, const Quad& q) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
}

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

DEVICE u32 lower_halves(u32 low, u32 high) { return __byte_perm(low, high, 0x5410); }
DEVICE u32 upper_halves(u32 low, u32 high) { return __byte_perm(low, high, 0x7632); }
#endif

DEVICE u32 side_by_side(float low, float high) { return (u32)narrow(low) | (u32)narrow(high) << 16; }

#if !EXPAND
// A unit is one (piece, site, split); the four warps of a group share it, 128 inputs each at a time, and add up.
// x: rows x_stride elements apart; table: every site's address of a [rows, WIDTH]; h [pieces, SITES, SPLITS, 8, 16].
KERNEL lora_rows(const u16* x, int x_stride, const int* plan, int pieces_at, const u64* table, float* h) {
    SHARED_TABLE(float, sums, 2 * 4 * 160);  // of the warps, in turn; 20 from token to token: other banks
    let_next_begin();
    const int warp = THREAD >> 5, lane = THREAD & 31, g = lane >> 2, t = lane & 3;
    const int units = plan[1] * (SITES * SPLITS);
    float* own = sums;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const Quad row = *(const Quad*)(plan + pieces_at + unit / (SITES * SPLITS) * 8);
        const int first = row.x, tokens = row.y, rank = row.z, ranks = row.w;
        const u16* a = (const u16*)table[unit / SPLITS % SITES];
        const int k0 = unit % SPLITS * (STEPS * 512) + warp * 128 + t * 8;
        const u16* a_row = a + (long long)(rank + g) * WIDTH;
        // Past the last token and the last input something is read that adds nothing to what is kept.
        const u16* x_row = x + (long long)(first + (g < tokens ? g : 0)) * x_stride;
        float d[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
        UNROLL for (int step = 0; step < STEPS; step++) {
            Quad low[4], high[4], given[4];
            UNROLL for (int c = 0; c < 4; c++) {
                const int k = k0 + step * 512 + c * 32;
                low[c] = read_constant(a_row + k, g < ranks && k < WIDTH);
                high[c] = read_constant(a_row + 8 * WIDTH + k, g + 8 < ranks && k < WIDTH);
            }
            if (step == 0) wait_for_writes();
            UNROLL for (int c = 0; c < 4; c++) {
                const int k = k0 + step * 512 + c * 32;
                given[c] = read_fresh(x_row + (k < WIDTH ? k : 0));
            }
            // Which input is which of a tile's 16 does not matter, as long as a and x agree.
            UNROLL for (int c = 0; c < 4; c++) {
                multiply(d[0], low[c].x, high[c].x, low[c].y, high[c].y, given[c].x, given[c].y);
                multiply(d[1], low[c].z, high[c].z, low[c].w, high[c].w, given[c].z, given[c].w);
            }
        }
        UNROLL for (int i = 0; i < 4; i++) own[warp * 160 + (2 * t + (i & 1)) * 20 + (i >> 1) * 8 + g] = d[0][i] + d[1][i];
        BARRIER();
        const int token = THREAD >> 4, r = THREAD & 15;
        if (token < tokens) {
            float sum = 0.f;
            UNROLL for (int w = 0; w < 4; w++) sum += own[w * 160 + token * 20 + r];
            // As the expand wants them: ranks 2t, 2t + 1, 2t + 8, 2t + 9 for every t of four.
            h[(long long)unit * 128 + token * 16 + (r & 6) * 2 + (r >> 3) * 2 + (r & 1)] = sum;
        }
        own = own == sums ? sums + 4 * 160 : sums;
    }
    wait_for_writes();  // with no unit too: who waits for this kernel counts on all that came before it
}
#else
// A piece's numbers in a tile: rows 2t, 2t + 1, 2t + 8 and 2t + 9, eight columns of every 64. Rows that the piece lacks
// are zero. b: the lane's first column; left: columns from there to the end of a row.
DEVICE void fetch(Quad (&rows)[BLOCKS][4], const u16* b, u32 width, int left, int t, int rank, int ranks) {
    UNROLL for (int i = 0; i < 4; i++) {
        const int r = 2 * t + (i & 1) + (i >> 1) * 8;
        UNROLL for (int j = 0; j < BLOCKS; j++)
            rows[j][i] = read_constant(b + (u64)(u32)(rank + r) * width + 64 * j, r < ranks && 64 * j < left);
    }
}

// weight * h of a lane's four ranks, summed up, as a large and a small part, which together have twice the digits.
DEVICE void low(u32 (&large)[2], u32 (&small)[2], const float* part, float weight) {
    float four[4] = {0.f, 0.f, 0.f, 0.f};
    SOME_AT_A_TIME for (int s = 0; s < SPLITS; s++) {
        const Quad q = read_fresh(part + s * 128);
        four[0] += as_float(q.x), four[1] += as_float(q.y), four[2] += as_float(q.z), four[3] += as_float(q.w);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const float v = four[2 * i] * weight, w = four[2 * i + 1] * weight;
        large[i] = side_by_side(v, w);
        // Of infinity nothing is left over.
        const float v1 = v - widen((u16)large[i]), w1 = w - widen((u16)(large[i] >> 16));
        small[i] = side_by_side(v1 == v1 ? v1 : 0.f, w1 == w1 ? w1 : 0.f);
    }
}

// d[j][m]: columns 2m and 2m + 1 of the lanes' eights, tokens 2t and 2t + 1.
DEVICE void add(float (&d)[BLOCKS][4][4], const Quad (&rows)[BLOCKS][4], const u32 (&large)[2], const u32 (&small)[2]) {
    UNROLL for (int j = 0; j < BLOCKS; j++) UNROLL for (int m = 0; m < 4; m++) {
        u32 word[4];
        UNROLL for (int i = 0; i < 4; i++)
            word[i] = m == 0 ? rows[j][i].x : m == 1 ? rows[j][i].y : m == 2 ? rows[j][i].z : rows[j][i].w;
        const u32 a0 = lower_halves(word[0], word[1]), a1 = upper_halves(word[0], word[1]);
        const u32 a2 = lower_halves(word[2], word[3]), a3 = upper_halves(word[2], word[3]);
        multiply(d[j][m], a0, a1, a2, a3, large[0], large[1]);
        multiply(d[j][m], a0, a1, a2, a3, small[0], small[1]);
    }
}

// A unit is one (group, tile of columns), and one warp's: it does all pieces, so that y is read and rounded once.
// y: rows y_stride elements apart; tiles: see LoraSites.tiles; h as above.
KERNEL lora_rows(u16* y, int y_stride, const int* plan, int pieces_at, const u64* tiles, int tile_count, const float* h) {
    SHARED_TABLE(float, earlier, BLOCKS * 16 * 128);  // sums of all pieces but a group's last; rarely are there others
    let_next_begin();
    const int warp = THREAD >> 5, lane = THREAD & 31, g = lane >> 2, t = lane & 3;
    const int units = plan[0] * tile_count;
    for (int unit = blockIdx.x * 4 + warp; unit < units; unit += gridDim.x * 4) {
        const Quad* group = (const Quad*)(plan + 8 + unit / tile_count * 8);
        const Quad* tile = (const Quad*)(tiles + unit % tile_count * 4);
        const Quad span = group[0], where = tile[0], rest = tile[1];
        Quad own = group[1];  // of a piece: first row, rows, weight
        const int tokens = span.y, pieces = span.w - span.z, left = (int)rest.x - 8 * g;
        const u16* b = (const u16*)((u64)where.x | (u64)where.y << 32) + 8 * g;
        const float* part = h + (u32)(((int)span.z * SITES + (int)rest.w) * (SPLITS * 128) + (g < tokens ? g : 0) * 16 + 4 * t);
        Quad rows[BLOCKS][4];
        u32 large[2], small[2];
        if (pieces > 1) {
            float d[BLOCKS][4][4] = {};
            const Quad* next = (const Quad*)(plan + pieces_at + (int)span.z * 8);
            for (int piece = 1; piece < pieces; piece++) {
                fetch(rows, b, where.z, left, t, own.x, own.y);
                wait_for_writes();
                low(large, small, part, as_float(own.z));
                add(d, rows, large, small);
                part += SITES * SPLITS * 128, next += 2;
                own.x = next[0].z, own.y = next[0].w, own.z = next[1].x;
            }
            UNROLL for (int j = 0; j < BLOCKS; j++) UNROLL for (int m = 0; m < 4; m++) UNROLL for (int i = 0; i < 4; i++)
                earlier[((j * 4 + m) * 4 + i) * 128 + THREAD] = d[j][m][i];
        }
        fetch(rows, b, where.z, left, t, own.x, own.y);
        wait_for_writes();
        low(large, small, part, as_float(own.z));
        // The wait for y is within the longer one for b.
        Quad base[BLOCKS][2];
        UNROLL for (int e = 0; e < 2; e++) UNROLL for (int j = 0; j < BLOCKS; j++)
            base[j][e] = read_fresh_if(y + (long long)((int)span.x + 2 * t + e) * y_stride + (int)rest.z + 8 * g + 64 * j,
                                       2 * t + e < tokens && 64 * j < left);
        float d[BLOCKS][4][4] = {};
        add(d, rows, large, small);
        if (pieces > 1)
            UNROLL for (int j = 0; j < BLOCKS; j++) UNROLL for (int m = 0; m < 4; m++) UNROLL for (int i = 0; i < 4; i++)
                d[j][m][i] += earlier[((j * 4 + m) * 4 + i) * 128 + THREAD];
        UNROLL for (int e = 0; e < 2; e++) UNROLL for (int j = 0; j < BLOCKS; j++)
            if (2 * t + e < tokens && 64 * j < left) {
                u32 word[4] = {base[j][e].x, base[j][e].y, base[j][e].z, base[j][e].w};
                UNROLL for (int m = 0; m < 4; m++)
                    word[m] = side_by_side(widen((u16)word[m]) + d[j][m][e], widen((u16)(word[m] >> 16)) + d[j][m][2 + e]);
                const Quad sum = {word[0], word[1], word[2], word[3]};
                write(y + (long long)((int)span.x + 2 * t + e) * y_stride + (int)rest.z + 8 * g + 64 * j, sum);
            }
    }
    wait_for_writes();
}
#endif
