// A CUDA kernel of ours on the CPU: one block at a time, its threads as fibers that run until they wait for each other.
// Stands in for device.cuh and for what nf4_product.cu and lora_rows.cu define for the device; nothing here is fast.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
struct alignas(16) Quad { u32 x, y, z, w; };
struct alignas(16) Floats { float x, y, z, w; };
struct Three { int x, y, z; };

static Three gridDim, blockIdx;
static long long fetched_bytes;
static int THREAD;
static u8* host_room;

static ucontext_t scheduler, fibers[32 * WARPS];
static bool done[32 * WARPS];
static int block_waiting, block_turn;
static int warp_waiting[WARPS], warp_turn[WARPS];

static void pause_fiber() {
    const int me = THREAD;
    swapcontext(&fibers[me], &scheduler);
}

static void meet(int& waiting, int& turn, int all) {
    const int mine = turn;
    if (++waiting == all) {
        waiting = 0;
        turn++;
    } else {
        while (turn == mine) pause_fiber();
    }
}

#define KERNEL static void
#define DEVICE static inline
#define UNROLL
#define ROLLED
#define SOME_AT_A_TIME
#define SHARED_TABLE(type, name, count) alignas(16) static type name[count]
#define SHARED_ROOM(name) u8* name = host_room
#define BARRIER() meet(block_waiting, block_turn, 32 * WARPS)
#define FENCE() ((void)0)
#define COUNT(address) ((*(address))++)

static inline int min(int a, int b) { return a < b ? a : b; }

static inline void read_codes(Quad& q, const u8* at, int wanted) {
    if (wanted) memcpy(&q, at, 16);
}

static inline Quad read_constant(const u16* at, bool wanted) {
    Quad q = {0, 0, 0, 0};
    if (wanted) memcpy(&q, at, 16);
    return q;
}

static inline Quad read_fresh_if(const void* at, bool wanted) { return read_constant((const u16*)at, wanted); }
static inline Quad read_fresh(const void* at) { return read_constant((const u16*)at, true); }
static inline void write(void* at, const Quad& q) { memcpy(at, &q, 16); }

static inline float as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline u32 lower_halves(u32 low, u32 high) { return (low & 0xffff) | high << 16; }
static inline u32 upper_halves(u32 low, u32 high) { return low >> 16 | (high & 0xffff0000); }
static inline void let_next_begin() {}
static inline void wait_for_writes() {}

// What a card would fetch must be there, and begin and end where it can.
static inline void fetch_later(const u8* at, int bytes) {
    if ((u64)at % 16 || bytes % 16 || bytes <= 0) abort();
    volatile u8 seen = at[0];
    seen = at[bytes - 1];
    fetched_bytes += bytes;
}

static inline void copy16(void* to, const void* from, bool there) {
    if (there)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}

static inline void arrived() {}

static inline float from_half(u16 bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}

static inline float widen(u16 bits) {
#if HALF
    return from_half(bits);
#else
    u32 wide = (u32)bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
#endif
}

static inline u16 narrow(float f) {
#if HALF
    _Float16 h = (_Float16)f;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
#else
    u32 wide;
    memcpy(&wide, &f, 4);
    return (u16)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
#endif
}

static inline u32 twice(float f) { return narrow(f) * 0x10001u; }

static inline u32 times(u32 a, u32 b) {
    return narrow(widen((u16)a) * widen((u16)b)) | (u32)narrow(widen((u16)(a >> 16)) * widen((u16)(b >> 16))) << 16;
}

static inline Floats read_uncached(const Floats* at) { return *at; }

// What the lanes of a warp hold of a and b in one multiplication; two in turn, since no lane is two ahead of another.
static u32 held[2][32 * WARPS][6];
static int multiplied[32 * WARPS];

static inline void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int me = THREAD, warp = me / 32, lane = me % 32, first = warp * 32;
    u32(*now)[6] = held[multiplied[me]++ & 1];
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(now[me], own, sizeof own);
    meet(warp_waiting[warp], warp_turn[warp], 32);
    // By the PTX manual: a[row][k], b[k][column], d[row][column] of m16n8k16.
    const auto part = [](u32 word, int odd) { return widen((u16)(word >> (16 * odd))); };
    const auto a = [&](int row, int k) {
        return part(now[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k & 1);
    };
    const auto b = [&](int k, int column) { return part(now[first + column * 4 + k % 8 / 2][4 + k / 8], k & 1); };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; k++) sum += (double)a(row, k) * b(k, column);
        d[i] = (float)sum;
    }
}

// Four warps together, by the PTX manual: a[row][k] of 64 rows in their registers, x[k][column] in shared memory as the
// descriptor says: from `at` on, 8 columns by 8 k lie together, the next 8 k `across` bytes from there, the next 8
// columns `down` bytes. What a thread has written there is seen after `show_tensor_cores` and a barrier.
static bool shown[32 * WARPS];

static inline u32 entry(u32 word, int b, u32 low) { return (word >> 8 * b & 0xff) << 8 | low; }
static inline int alike(int value) { return value; }
static inline bool table_is_there(const void*) { return true; }
static inline u32 in_table(const void* table, u32 at) { return *(const u32*)((const u8*)table + at); }

static inline u64 described(const void* at, u32 across, u32 down) {
    const size_t offset = (const u8*)at - host_room;
    if (offset % 16 || across % 16 || down % 16 || offset >= 1 << 18) abort();
    return (u64)(offset >> 4) | (u64)(across >> 4) << 16 | (u64)(down >> 4) << 32;
}

static inline void show_tensor_cores() { shown[THREAD] = true; }
static inline void begin_multiplying() {}
static inline void let_run() {}
static inline void finish_multiplying() {}

template <int TILES>
static inline void multiply_wide(float (&d)[TILES][4], const u32 (&a)[4], u64 x) {
    const int me = THREAD, fours = me / 128, lane = me % 32, first = me / 32 * 32;
    u32(*now)[6] = held[multiplied[me]++ & 1];
    memcpy(now[me], a, sizeof a);
    for (bool one : shown)
        if (!one) abort();
    meet(warp_waiting[4 * fours], warp_turn[4 * fours], 128);
    const u8* at = host_room + (x & 0x3fff) * 16;
    const u32 across = (x >> 16 & 0x3fff) * 16, down = (x >> 32 & 0x3fff) * 16;
    const auto part = [](u32 word, int odd) { return widen((u16)(word >> (16 * odd))); };
    for (int n = 0; n < TILES; n++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = d[n][i];
            for (int k = 0; k < 16; k++) {
                u16 bits;
                memcpy(&bits, at + n * down + k / 8 * across + column * 16 + k % 8 * 2, 2);
                sum += (double)part(now[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k & 1) * widen(bits);
            }
            d[n][i] = (float)sum;
        }
}

// Runs `body` once for every thread of every block.
template <class Body>
static void launch(int columns, int rows, size_t room_bytes, const Body& body) {
    static const Body* current;
    current = &body;
    host_room = (u8*)aligned_alloc(16, (room_bytes + 15) / 16 * 16);
    std::vector<std::vector<u8>> stacks(32 * WARPS, std::vector<u8>(1 << 17));
    gridDim = {columns, rows, 1};
    for (int y = 0; y < rows; y++)
        for (int x = columns - 1; x >= 0; x--) {
            blockIdx = {x, y, 0};
            memset(host_room, 0xff, room_bytes);  // NaN
            memset(multiplied, 0, sizeof multiplied);
            memset(shown, 0, sizeof shown);
            for (int i = 0; i < 32 * WARPS; i++) {
                done[i] = false;
                getcontext(&fibers[i]);
                fibers[i].uc_stack = {stacks[i].data(), 0, stacks[i].size()};
                fibers[i].uc_link = &scheduler;
                makecontext(&fibers[i], (void (*)()) + [] {
                    const int me = THREAD;
                    (*current)();
                    done[me] = true;
                }, 0);
            }
            for (int left = 32 * WARPS; left;) {
                left = 0;
                for (int i = 0; i < 32 * WARPS; i++)
                    if (!done[i]) {
                        THREAD = i;
                        swapcontext(&scheduler, &fibers[i]);
                        left += !done[i];
                    }
            }
        }
    free(host_room);
}
