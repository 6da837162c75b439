// 3x3 same-padded convolution of 192 to 192 channels on Hopper (sm_90a), with bias, residual, RMS norm and SiLU as its
// epilogue. fused_conv.py defines RESIDUAL and NORM (0 or 1). Tiles, layouts and columns are those of conv96.cu.
//
// Nine taps' weights are too many for shared memory: they stream through it, round and round in the same order, each
// block of a cluster fetching half for both. Warpgroups 1 and 2 have a tile each. A tile takes in one whole round,
// wherever that begins, and its epilogue lets SKIP slices of 32 channels go by; warpgroup 2 lags by half of both, so
// that one's epilogue runs under the other's matrix instructions, and for most of the time both use the same weights.
// Warpgroup 0: a thread streams the weights, a warp for each consumer loads its pixels through a ring of slices.

constexpr int C = 192;
constexpr int TILE_H = 16, TILE_W = 8, HALO_W = TILE_W + 2, HALO = (TILE_H + 2) * HALO_W;
constexpr int CLUSTER = 2, CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int SLICES = C / 32, SKIP = 2, PERIOD = SLICES + SKIP, LAG = PERIOD / 2;
constexpr int STEPS = 6;  // of a slice, three taps each: half of it (16 channels, one wgmma) and kx
constexpr int PIXEL_RING = 3, WEIGHT_RING = 8;
constexpr u32 CHUNK = 186 * 16;  // 8 channels of 180 pixels; 186: the 4 chunks of 2 pixels are in different banks
constexpr u32 SLICE = 4 * CHUNK;
// Weights of a step, outermost first: chunk 2, ky 3 (descending), column 192, channel 8.
constexpr u32 W_TAP = C * 16, W_CHUNK = 3 * W_TAP, W_STEP = 2 * W_CHUNK;
constexpr u32 AT_PIXELS = WEIGHT_RING * W_STEP;
constexpr u32 AT_BIAS = AT_PIXELS + CONSUMERS * PIXEL_RING * SLICE;
constexpr u32 AT_GAMMA = AT_BIAS + C * 4;
constexpr u32 AT_FULL = AT_GAMMA + C * 4;             // mbarriers: step of weights loaded
constexpr u32 AT_EMPTY = AT_FULL + WEIGHT_RING * 8;   // used up, in both blocks of the cluster
constexpr u32 AT_BEGIN = AT_EMPTY + WEIGHT_RING * 8;  // first weights of a consumer's next tile on their way
constexpr u32 AT_PIXELS_FULL = AT_BEGIN + CONSUMERS * 8;
constexpr u32 AT_PIXELS_EMPTY = AT_PIXELS_FULL + CONSUMERS * PIXEL_RING * 8;
constexpr u32 SHARED = AT_PIXELS_EMPTY + CONSUMERS * PIXEL_RING * 8;
static_assert(SHARED == SHARED_BYTES, "fused_conv.py asks for another size");

#define R48(d, i) R8(d, i), R8(d, i + 8), R8(d, i + 16), R8(d, i + 24), R8(d, i + 32), R8(d, i + 40)
#define D96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, " \
    "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
    "%90, %91, %92, %93, %94, %95"

// d += 64 pixels x 16 channels, times 16 channels x 192 columns.
__device__ __forceinline__ void mma(float (&d)[96], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0;"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {" D96 "}, %96, %97, p, 1, 1, 0, 0; }"
        : R48(d, 0), R48(d, 48)
        : "l"(a), "l"(b));
}

// The clusters take pairs of tiles, one for each block, and a cluster's consumers take its pairs in turn.
struct Work {
    int tiles, H, W;
    u32 rank;  // of this block in its cluster
    __device__ __forceinline__ int rounds_of(int consumer) const {
        const int clusters = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER + consumer * clusters;
        const int pairs = (tiles + CLUSTER - 1) / CLUSTER;
        return first < pairs ? (pairs - first - 1) / (CONSUMERS * clusters) + 1 : 0;
    }
    __device__ __forceinline__ int tile(int consumer, int round) const {
        const int clusters = gridDim.x / CLUSTER;
        return (blockIdx.x / CLUSTER + (round * CONSUMERS + consumer) * clusters) * CLUSTER + rank;
    }
};

struct Tile {
    int x, y;      // its first pixel
    size_t image;  // that of its image, among all pixels
    __device__ __forceinline__ Tile(int index, const Work& work) {
        int across = (work.W + TILE_W - 1) / TILE_W, down = (work.H + TILE_H - 1) / TILE_H;
        int band = index / across, n = band / down;
        x = (index - band * across) * TILE_W;
        y = index < work.tiles ? (band - n * down) * TILE_H : work.H + 1;  // a tile too many: all outside
        image = size_t(n) * work.H * work.W;
    }
};

// ---- warpgroup 0

__device__ __forceinline__ void stream_weights(const unsigned char* weights, u32 shared, const Work& work) {
    int rounds[CONSUMERS], slices = 0;
#pragma unroll
    for (int c = 0; c < CONSUMERS; ++c) {
        rounds[c] = work.rounds_of(c);
        if (rounds[c]) slices = max(slices, c * LAG + rounds[c] * PERIOD - SKIP);
    }
    u32 slot = 0, parity = 1, part = 0;
    for (int slice = 0; slice < slices; ++slice) {
        int absent = 0, begins = 0;  // of the consumers: how many let the slice go by, which ones begin a tile
#pragma unroll
        for (int c = 0; c < CONSUMERS; ++c) {
            const int since = slice - c * LAG;
            const bool at_work = since >= 0 && since < rounds[c] * PERIOD && since % PERIOD < SLICES;
            absent += !at_work;
            begins |= int(at_work && since % PERIOD == 0) << c;
        }
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            const u32 full = shared + AT_FULL + slot * 8, empty = shared + AT_EMPTY + slot * 8;
            wait(empty, parity);
            expect(full, W_STEP);
            const u32 half = W_STEP / CLUSTER, to = shared + slot * W_STEP + work.rank * half;
            const unsigned char* from = weights + (part * STEPS + step) * W_STEP + work.rank * half;
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                "l"(from), "r"(half), "r"(full), "h"((unsigned short)((1 << CLUSTER) - 1))
                : "memory");
            if (absent)
                asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(empty), "r"(absent * 4 * CLUSTER)
                             : "memory");
            if (step == 0)
#pragma unroll
                for (int c = 0; c < CONSUMERS; ++c)
                    if (begins >> c & 1) arrive(shared + AT_BEGIN + c * 8);
            if (++slot == WEIGHT_RING) slot = 0, parity ^= 1;
        }
        if (++part == SLICES) part = 0;
    }
}

__device__ __forceinline__ void load_pixels(const unsigned char* x, const unsigned char* residual, u32 shared,
                                            int consumer, const Work& work) {
    const int lane = threadIdx.x & 31, chunk = lane & 3, rounds = work.rounds_of(consumer);
    const u32 ring = shared + AT_PIXELS + consumer * PIXEL_RING * SLICE + chunk * CHUNK + (lane >> 2) * 16;
    u32 full = shared + AT_PIXELS_FULL + consumer * PIXEL_RING * 8;
    u32 empty = shared + AT_PIXELS_EMPTY + consumer * PIXEL_RING * 8;
    u32 slot = 0, parity = 1;
    for (int round = 0; round < rounds; ++round) {
        const Tile tile(work.tile(consumer, round), work);
        const unsigned char* from = x + tile.image * (C * 2) + chunk * 16;
#if RESIDUAL
        if (lane < TILE_H && tile.y + lane < work.H) {
            const u32 bytes = min(TILE_W, work.W - tile.x) * C * 2;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                             residual + (tile.image + size_t(tile.y + lane) * work.W + tile.x) * (C * 2)),
                         "r"(bytes)
                         : "memory");
        }
#endif
        int part = (consumer * LAG + round * PERIOD) % SLICES;
#pragma unroll 1
        for (int s = 0; s < SLICES; ++s) {
            wait(empty + slot * 8, parity);
#pragma unroll 4
            for (int i = 0; i < (HALO + 7) / 8; ++i) {
                const int pixel = i * 8 + (lane >> 2), row = pixel / HALO_W;
                const int py = tile.y - 1 + row, px = tile.x - 1 + pixel - row * HALO_W;
                const bool inside = (u32)py < (u32)work.H && (u32)px < (u32)work.W;
                if (pixel < HALO)
                    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(ring + slot * SLICE +
                                                                                                i * 128),
                                 "l"(from + (inside ? (size_t(py) * work.W + px) * (C * 2) + part * 64 : 0)),
                                 "r"(inside ? 16 : 0)
                                 : "memory");
            }
            // Arrives once this thread's copies have: nobody here waits for memory.
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + slot * 8) : "memory");
            if (++slot == PIXEL_RING) slot = 0, parity ^= 1;
            if (++part == SLICES) part = 0;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- warpgroups 1 and 2

__device__ __forceinline__ void consume(unsigned char* memory, u32 shared, uint4* residual, uint4* out,
                                        const Work& work) {
    const int consumer = __shfl_sync(~0u, threadIdx.x >> 7, 0) - 1;  // the same in the warp, and known to be
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, quad = lane & 3;
    const u32 own = shared & 0xffffff;  // without the block's rank in the cluster, which descriptors have no room for
    const u64 weights = descriptor(own, W_CHUNK, 128);
    const u64 pixels = descriptor(own + AT_PIXELS + consumer * PIXEL_RING * SLICE, CHUNK, 2 * HALO_W * 16);
    const u32 pixels_full = shared + AT_PIXELS_FULL + consumer * PIXEL_RING * 8;
    const u32 pixels_empty = shared + AT_PIXELS_EMPTY + consumer * PIXEL_RING * 8;
    const int rounds = work.rounds_of(consumer);
    const size_t row = size_t(work.W) * (C / 8);
    float even[96], odd[96];  // rows 2j and 2j + 1 of the tile, 8 pixels each

    u32 empty;  // lane r's: that of block r
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(empty) : "r"(shared + AT_EMPTY), "r"(lane & (CLUSTER - 1)));
    auto release = [&](u32 slot) {
        if (lane < CLUSTER)
            asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(empty + slot * 8) : "memory");
    };

    u32 pixel_slot = 0, pixel_parity = 0;
    for (int round = 0; round < rounds; ++round) {
        // This thread's pixels: 4 rows of a column; its channels: 32 b + 8 quad + (0 to 7) for b = 0 to 5.
        // Row m of the four: accumulator m % 2, its registers with bit 1 equal to m / 2.
        const Tile tile(work.tile(consumer, round), work);
        const int x = tile.x + (lane >> 2), y = tile.y + 4 * warp;
        const size_t at = (tile.image + size_t(y) * work.W + x) * (C / 8) + quad;
        const int rows = x < work.W ? work.H - y : 0;  // that are in the image, from its first

        // Bias and residual are what the sums begin with: no registers are free for them later.
#pragma unroll
        for (int b = 0; b < SLICES; ++b) {
            const float4* bias = reinterpret_cast<const float4*>(memory + AT_BIAS) + b * 8 + quad * 2;
            const float4 first = bias[0], last = bias[1];
            const float biases[8] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                float(&d)[96] = m & 1 ? odd : even;
#if RESIDUAL
                const uint4 more = m < rows ? residual[at + m * row + b * 4] : make_uint4(0, 0, 0, 0);
                const u32 pairs[4] = {more.x, more.y, more.z, more.w};
#endif
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float low = 0.0f, high = 0.0f;
#if RESIDUAL
                    unpack(pairs[e], low, high);
#endif
                    const int i = b * 16 + e * 4 + (m >> 1) * 2;
                    d[i] = biases[2 * e] + low;
                    d[i + 1] = biases[2 * e + 1] + high;
                }
            }
        }
        pin(even);
        pin(odd);

        const u32 first = u32(consumer * LAG + round * PERIOD) * STEPS;
        u32 slot = first % WEIGHT_RING, parity = first / WEIGHT_RING & 1;
        wait(shared + AT_BEGIN + consumer * 8, round & 1);  // before, FULL may be a whole ring behind
#pragma unroll 1
        for (int s = 0; s < SLICES; ++s) {
            // What cp.async wrote is ordinary writing: the matrix unit sees it only past a proxy fence.
            wait(pixels_full + pixel_slot * 8, pixel_parity);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            const u64 a = pixels + pixel_slot * (SLICE / 16);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                wait(shared + AT_FULL + slot * 8, parity);
                mma_fence();
#pragma unroll
                for (int ky = 0; ky < 3; ++ky) {
                    const u64 shifted = a + step / 3 * (2 * CHUNK / 16) + ky * HALO_W + step % 3;
                    const u64 tap = weights + slot * (W_STEP / 16) + (2 - ky) * (W_TAP / 16);
                    mma(even, shifted, tap);
                    mma(odd, shifted + HALO_W, tap);
                }
                mma_commit();
                mma_wait<1>();
                if (s | step) release((slot + WEIGHT_RING - 1) % WEIGHT_RING);
                if (s && step == 0 && lane == 0)
                    arrive(pixels_empty + (pixel_slot ? pixel_slot - 1 : PIXEL_RING - 1) * 8);
                if (++slot == WEIGHT_RING) slot = 0, parity ^= 1;
            }
            if (++pixel_slot == PIXEL_RING) pixel_slot = 0, pixel_parity ^= 1;
        }
        mma_wait<0>();
        release((slot + WEIGHT_RING - 1) % WEIGHT_RING);
        if (lane == 0) arrive(pixels_empty + (pixel_slot ? pixel_slot - 1 : PIXEL_RING - 1) * 8);
        pin(even);
        pin(odd);

        float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int b = 0; b < SLICES; ++b) {
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                float(&d)[96] = m & 1 ? odd : even;
                u32 total[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = b * 16 + e * 4 + (m >> 1) * 2;
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
        for (int m = 0; m < 4; ++m) scale[m] = rms_scale(quad_sum(squares[m]), 13.856406460551018f);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            float(&d)[96] = m & 1 ? odd : even;
            uint4* const to = out + at + m * row;
#pragma unroll
            for (int b = 0; b < SLICES; ++b) {
                const float4* gamma = reinterpret_cast<const float4*>(memory + AT_GAMMA) + b * 8 + quad * 2;
                asm volatile("" ::: "memory");
                const float4 first = gamma[0], last = gamma[1];
                const float gammas[8] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
                u32 result[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = b * 16 + e * 4 + (m >> 1) * 2;
                    result[e] = silu(d[i] * scale[m] * gammas[2 * e], d[i + 1] * scale[m] * gammas[2 * e + 1]);
                }
                if (m < rows) to[b * 4] = make_uint4(result[0], result[1], result[2], result[3]);
            }
        }
#endif
    }
}

// Among all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// x, residual, out: [N, H, W, 192]; weights: [331776], as fused_conv.pack_weight orders them; bias, gamma: fp32 [192].
// residual is not touched without RESIDUAL, gamma not read without NORM, out not written with only RESIDUAL.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    conv192(const unsigned char* x, const unsigned char* weights, const float* bias, const float* gamma,
            uint4* residual, uint4* out, int N, int H, int W) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const Work work{N * ((H + TILE_H - 1) / TILE_H) * ((W + TILE_W - 1) / TILE_W), H, W, blockIdx.x % CLUSTER};

    if (threadIdx.x == 0) {
        for (int i = 0; i < WEIGHT_RING; ++i) {
            barrier_init(shared + AT_FULL + i * 8, 1);
            barrier_init(shared + AT_EMPTY + i * 8, CLUSTER * CONSUMERS * 4);  // the consumers' warps
        }
        for (int c = 0; c < CONSUMERS; ++c) barrier_init(shared + AT_BEGIN + c * 8, 1);
        for (int i = 0; i < CONSUMERS * PIXEL_RING; ++i) {
            barrier_init(shared + AT_PIXELS_FULL + i * 8, 32);  // a warp of warpgroup 0
            barrier_init(shared + AT_PIXELS_EMPTY + i * 8, 4);  // a consumer's warps
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    if (threadIdx.x < C) {
        reinterpret_cast<float*>(memory + AT_BIAS)[threadIdx.x] = bias[threadIdx.x];
        if (NORM) reinterpret_cast<float*>(memory + AT_GAMMA)[threadIdx.x] = gamma[threadIdx.x];
    }
    __syncthreads();
    cluster_sync();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
        if (warp == 0) {
            if (threadIdx.x == 0) stream_weights(weights, shared, work);
        } else if (warp <= CONSUMERS) {
            load_pixels(x, reinterpret_cast<const unsigned char*>(residual), shared, warp - 1, work);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        consume(memory, shared, residual, out, work);
    }
    cluster_sync();  // until all that was sent to a block has come, and nothing more will be
}
