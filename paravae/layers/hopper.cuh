// What the CUDA kernels of this folder share: names for Hopper's instructions. hopper.py puts it before each of them.
// The caller defines HALF (0: bfloat16, 1: float16).

typedef unsigned int u32;
typedef unsigned long long u64;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives, and awaits that many bytes of the copy engine's.
__device__ __forceinline__ void expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool passed(u32 bar, u32 parity) {
    u32 yes;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(yes)
        : "r"(bar), "r"(parity)
        : "memory");
    return yes;
}
__device__ __forceinline__ void wait(u32 bar, u32 parity) {
    while (!passed(bar, parity)) {
    }
}

// ---- wgmma

// Descriptor of a K-major operand without swizzle; to move it, add bytes / 16.
__device__ __forceinline__ u64 descriptor(u32 address, u32 between_chunks, u32 between_rows_of_8) {
    return u64(address >> 4) | u64(between_chunks >> 4) << 16 | u64(between_rows_of_8 >> 4) << 32;
}

// Eight of an accumulator's registers, as operands of an asm statement.
#define R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                 "+f"(d[i + 6]), "+f"(d[i + 7])

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from moving uses of accumulators over this point.
template <int SIZE>
__device__ __forceinline__ void pin(float (&d)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- arithmetic on pairs

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ void unpack(u32 pair, float& low, float& high) {
#if HALF
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
#else
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
#endif
}
__device__ __forceinline__ float power(float exponent) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(exponent));
    return y;
}
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 silu(float y, float z) {
    return pack(y * inverse(1.0f + power(y * -1.4426950408889634f)),
                z * inverse(1.0f + power(z * -1.4426950408889634f)));
}

// ---- a row of an accumulator, whose columns are spread over four neighbouring threads

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// root / max(norm, 1e-12), of the sum of squares and the root of their number.
__device__ __forceinline__ float rms_scale(float squares, float root) {
    float scale;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(scale) : "f"(fmaxf(squares, 1e-24f)));
    return scale * root;
}
