// What our CUDA kernels share: types, loads, the tensor cores' multiplication, and how one kernel follows another.
//
//   HALF    1: 16-bit numbers are float16, 0: bfloat16
#ifndef LORAPLEX_HOST  // there, host_cuda.h of the tests stands in for all of this
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct __align__(16) Quad { u32 x, y, z, w; };
struct __align__(16) Floats { float x, y, z, w; };

#define DEVICE __device__ __forceinline__
#define SHARED_TABLE(type, name, count) __shared__ type name[count]
#define SHARED_ROOM(name) extern __shared__ __align__(16) u8 name[]
#define BARRIER() __syncthreads()
#define FENCE() __threadfence()
#define COUNT(address) atomicAdd(address, 1)
#define THREAD ((int)threadIdx.x)
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define SOME_AT_A_TIME _Pragma("unroll 4")

// The kernel behind this one may take what room there is as soon as all groups of this one have begun.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all that was launched before has ended and is seen. Before it, only what no kernel writes may be read.
DEVICE void wait_for_writes() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// d += a b, one tile of 16 x 16 times 16 x 8.
DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE float from_half(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

DEVICE u16 narrow(float f) {
    u16 bits;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
    return bits;
}

DEVICE float widen(u16 bits) {
#if HALF
    return from_half(bits);
#else
    return __uint_as_float((u32)bits << 16);
#endif
}
#endif
