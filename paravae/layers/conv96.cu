// 3x3 same-padded convolution of 96 to 96 channels on Hopper (sm_90a), with bias, residual, RMS norm and SiLU as its
// epilogue. fused_conv.py defines RESIDUAL and NORM (0 or 1).
//
// One persistent block per multiprocessor keeps all nine taps' weights in shared memory and walks over tiles of 16 x 8
// output pixels. Warpgroup 0 loads each tile with its border (18 x 10 pixels) in three slices of 32 channels through
// a ring of five; warpgroups 1 and 2 take the tiles in turn, so that one's epilogue runs under the other's matrix
// instructions.
//
// All of shared memory is in wgmma's layout without swizzle: core matrices of 8 rows x 8 channels, a row 16 bytes,
// 128 bytes together. Of a slice, a chunk of 8 channels is the 180 pixels side by side, so that 8 pixels of a row are
// a core matrix wherever they begin, and a tap is no more than another start address.
// A warpgroup has two accumulators, of the tile's even and of its odd rows: 64 pixels x 96 channels each.
// The weights' columns are ordered so that a thread ends up with 8 neighbouring channels three times (see column()
// in fused_conv.py): residual and results pass between registers and memory 16 bytes at a time, through nothing else.

constexpr int C = 96;
constexpr int TILE_H = 16, TILE_W = 8, HALO_W = TILE_W + 2, HALO = (TILE_H + 2) * HALO_W;
constexpr int SLICES = 3, RING = 5;
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr u32 CHUNK = 186 * 16;  // 8 channels of 180 pixels; 186: the 4 chunks of 2 pixels are in different banks
constexpr u32 SLICE = 4 * CHUNK;
// Weights, outermost first: slice 3, half of it 2 (16 channels, one wgmma), kx 3, chunk 2, ky 3 (descending), column
// 96, channel 8.
constexpr u32 W_TAP = C * 16, W_CHUNK = 3 * W_TAP, W_KX = 2 * W_CHUNK, W_HALF = 3 * W_KX, W_SLICE = 2 * W_HALF;
constexpr u32 AT_RING = SLICES * W_SLICE;
constexpr u32 AT_BIAS = AT_RING + RING * SLICE;
constexpr u32 AT_GAMMA = AT_BIAS + C * 4;
constexpr u32 AT_FULL = AT_GAMMA + C * 4;     // mbarriers: slice loaded
constexpr u32 AT_EMPTY = AT_FULL + RING * 8;  // slice used up
constexpr u32 AT_WEIGHTS = AT_EMPTY + RING * 8;
constexpr u32 SHARED = AT_WEIGHTS + SLICES * 8;
static_assert(SHARED == SHARED_BYTES, "fused_conv.py asks for another size");

#define R48(d) R8(d, 0), R8(d, 8), R8(d, 16), R8(d, 24), R8(d, 32), R8(d, 40)
#define D48 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47"

// d (+)= 64 pixels x 16 channels, times 16 channels x 96 columns.
__device__ __forceinline__ void mma(float (&d)[48], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %50, 0;"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE " {" D48 "}, %48, %49, p, 1, 1, 0, 0; }"
        : R48(d)
        : "l"(a), "l"(b), "r"(int(add)));
}

struct Tile {
    int x, y;      // its first pixel
    size_t image;  // that of its image, among all pixels
    __device__ __forceinline__ Tile(int index, int H, int W) {
        int across = (W + TILE_W - 1) / TILE_W, down = (H + TILE_H - 1) / TILE_H;
        int band = index / across, n = band / down;
        x = (index - band * across) * TILE_W;
        y = (band - n * down) * TILE_H;
        image = size_t(n) * H * W;
    }
};

// ---- warpgroup 0: x [N, H, W, 96] -> ring

__device__ __forceinline__ void produce(const unsigned char* x, u32 shared, int tiles, int H, int W) {
    const int thread = threadIdx.x, chunk = thread & 3;
    const u32 to = shared + AT_RING + chunk * CHUNK + (thread >> 2) * 16;
    u32 slot = 0, parity = 1;

    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(index, H, W);
        const unsigned char* from = x + tile.image * (C * 2);
        u32 at[6];  // of this thread's 16 bytes of 6 pixels, in 16 bytes; all ones: not in the image, to be zero
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            int pixel = i * 32 + (thread >> 2), row = pixel / HALO_W;
            int py = tile.y - 1 + row, px = tile.x - 1 + pixel - row * HALO_W;
            at[i] = (u32)py < (u32)H && (u32)px < (u32)W ? ((u32)py * W + px) * (C / 8) + chunk : ~0u;
        }
#pragma unroll 1
        for (int s = 0; s < SLICES; ++s) {
            wait(shared + AT_EMPTY + slot * 8, parity);
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                const bool inside = at[i] != ~0u;
                if (i * 32 + (thread >> 2) < HALO)
                    asm volatile(
                        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to + slot * SLICE + i * 512),
                        "l"(from + (inside ? size_t(at[i]) * 16 + s * 64 : 0)), "r"(inside ? 16 : 0)
                        : "memory");
            }
            // Arrives once this thread's copies have: nobody here waits for memory.
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared + AT_FULL + slot * 8)
                         : "memory");
            if (++slot == RING) slot = 0, parity ^= 1;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- warpgroups 1 and 2

// They take turns at issuing their matrix instructions, by a named barrier each. (An equivalent give_turn makes ptxas
// spill with RESIDUAL and NORM: look at its report after any change.)
__device__ __forceinline__ void wait_turn(int consumer) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
}
__device__ __forceinline__ void give_turn(int consumer) {
    asm volatile("bar.arrive %0, 256;" ::"r"(consumer == CONSUMERS - 1 ? 1 : 2 + consumer) : "memory");
}

__device__ __forceinline__ void consume(unsigned char* memory, u32 shared, uint4* residual, uint4* out, int tiles,
                                        int H, int W) {
    const int consumer = __shfl_sync(~0u, threadIdx.x >> 7, 0) - 1;  // the same in the warp, and known to be
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, quad = lane & 3;
    const u64 weights = descriptor(shared, W_CHUNK, 128);
    const u64 ring = descriptor(shared + AT_RING, CHUNK, 2 * HALO_W * 16);
    const size_t row = size_t(W) * (C / 8);
    float even[48], odd[48];  // rows 2j and 2j + 1 of the tile, 8 pixels each; see the epilogue for whose is what

    u32 count = consumer * SLICES;  // slices before this tile's
    int index = blockIdx.x + consumer * gridDim.x;
    Tile next(index, H, W);
    for (; index < tiles; index += CONSUMERS * gridDim.x, count += CONSUMERS * SLICES) {
        // This thread's pixels: 4 rows of a column; its channels: 32 b + 8 quad + (0 to 7) for b = 0, 1, 2.
        const int x = next.x + (lane >> 2), y = next.y + 4 * warp;
        const size_t at = (next.image + size_t(y) * W + x) * (C / 8) + quad;
        const int rows = x < W ? H - y : 0;  // that are in the image, from its first
#if RESIDUAL
        uint4 more[4][3];
        auto load_residual = [&] {
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int b = 0; b < 3; ++b)
                    more[m][b] = m < rows ? residual[at + m * row + b * 4] : make_uint4(0, 0, 0, 0);
        };
        if (NORM) load_residual();  // early: with the norm the epilogue is long enough
#endif

        u32 slots[SLICES];
        u64 a[SLICES];
#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
            slots[s] = (count + s) % RING;
            a[s] = ring + slots[s] * (SLICE / 16);
        }
        // What cp.async wrote is ordinary writing: the matrix unit sees it only past a proxy fence.
        auto await = [&](int s) {
            wait(shared + AT_FULL + slots[s] * 8, (count + s) / RING & 1);
            wait(shared + AT_WEIGHTS + s * 8, 0);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        };
        auto release = [&](int s) {
            if (lane == 0) arrive(shared + AT_EMPTY + slots[s] * 8);
        };
        const bool another = index + (long long)gridDim.x < tiles;
        await(0);
        if (index != blockIdx.x) wait_turn(consumer);
#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
            if (s) await(s);
            mma_fence();
#pragma unroll
            for (int i = 0; i < 18; ++i) {
                const int half = i / 9, kx = i / 3 % 3, ky = i % 3;
                if (s == 2 && i == 14 && another) give_turn(consumer);  // early: the unit must not run dry
                const u64 pixels = a[s] + half * (2 * CHUNK / 16) + ky * HALO_W + kx;
                const u64 tap = weights + (s * W_SLICE + half * W_HALF + kx * W_KX + (2 - ky) * W_TAP) / 16;
                mma(even, pixels, tap, s | i);
                mma(odd, pixels + HALO_W, tap, s | i);
            }
            mma_commit();
            if (s) mma_wait<1>(), release(s - 1);
        }
        next = Tile(index + CONSUMERS * gridDim.x, H, W);
#if RESIDUAL
        if (!NORM) load_residual();
#endif
        mma_wait<0>();
        release(SLICES - 1);
        pin(even);
        pin(odd);

        // Epilogue. Row m of the four: accumulator m % 2, its registers with bit 1 equal to m / 2.
        float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int b = 0; b < 3; ++b) {
            const float* bias = reinterpret_cast<const float*>(memory + AT_BIAS) + b * 32 + quad * 8;
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                float(&d)[48] = m & 1 ? odd : even;
                u32 total[4];
#if RESIDUAL
                const u32 pairs[4] = {more[m][b].x, more[m][b].y, more[m][b].z, more[m][b].w};
#endif
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = b * 16 + e * 4 + (m >> 1) * 2;
                    d[i] += bias[2 * e];
                    d[i + 1] += bias[2 * e + 1];
#if RESIDUAL
                    float low, high;
                    unpack(pairs[e], low, high);
                    d[i] += low;
                    d[i + 1] += high;
#endif
                    squares[m] += d[i] * d[i] + d[i + 1] * d[i + 1];
                    total[e] = pack(d[i], d[i + 1]);
                }
                uint4* const to = RESIDUAL ? residual : out;
                if ((RESIDUAL || !NORM) && m < rows)
                    to[at + m * row + b * 4] = make_uint4(total[0], total[1], total[2], total[3]);
            }
        }
#if NORM
        float scale[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) scale[m] = rms_scale(quad_sum(squares[m]), 9.797958971132712f);
#pragma unroll
        for (int b = 0; b < 3; ++b) {
            const float* gamma = reinterpret_cast<const float*>(memory + AT_GAMMA) + b * 32 + quad * 8;
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                float(&d)[48] = m & 1 ? odd : even;
                u32 result[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = b * 16 + e * 4 + (m >> 1) * 2;
                    result[e] = silu(d[i] * scale[m] * gamma[2 * e], d[i + 1] * scale[m] * gamma[2 * e + 1]);
                }
                if (m < rows) out[at + m * row + b * 4] = make_uint4(result[0], result[1], result[2], result[3]);
            }
        }
#endif
    }
}

// x, residual, out: [N, H, W, 96]; weights: [82944], as fused_conv.pack_weight orders them; bias, gamma: fp32 [96].
// residual is not touched without RESIDUAL, gamma not read without NORM, out not written with only RESIDUAL.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv96(const unsigned char* x, const unsigned char* weights, const float* bias, const float* gamma,
           uint4* residual, uint4* out, int N, int H, int W) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int tiles = N * ((H + TILE_H - 1) / TILE_H) * ((W + TILE_W - 1) / TILE_W);

    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) {
            barrier_init(shared + AT_FULL + i * 8, 128);  // the producer's threads
            barrier_init(shared + AT_EMPTY + i * 8, 4);   // a consumer's warps
        }
        for (int s = 0; s < SLICES; ++s) barrier_init(shared + AT_WEIGHTS + s * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (u32 s = 0; s < SLICES; ++s) {
            expect(shared + AT_WEIGHTS + s * 8, W_SLICE);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    shared + s * W_SLICE),
                "l"(weights + s * W_SLICE), "r"(W_SLICE), "r"(shared + AT_WEIGHTS + s * 8)
                : "memory");
        }
    }
    if (threadIdx.x < C) {
        reinterpret_cast<float*>(memory + AT_BIAS)[threadIdx.x] = bias[threadIdx.x];
        if (NORM) reinterpret_cast<float*>(memory + AT_GAMMA)[threadIdx.x] = gamma[threadIdx.x];
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        produce(x, shared, tiles, H, W);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(memory, shared, residual, out, tiles, H, W);
    }
}
