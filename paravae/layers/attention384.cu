// Attention with one head of 384 channels on Hopper (sm_90a): out = softmax(Q K^T / sqrt(384)) V.
//
// A block computes a tile of 128 queries of one image over a run of key blocks of 64. Which: every block of the grid
// takes `waves` whole tiles; the key blocks of the tiles left over, put in a row, are cut into a run for each, so that
// all have as much to do. A run that holds a tile in part leaves its sums in `partial`, for attention384_combine to add
// up. hopper_attention.py makes the plan.
//
// Two warpgroups have 64 queries each, with all 384 sums of a query in registers: that takes every register there is,
// so that no third one can load. Queries stay in shared memory; keys and values pass through a ring of slots, each 64
// of them x 128 channels, and a thread of the second warpgroup has the copy engine refill a slot as soon as it is used
// up. The warpgroups take turns at starting on the scores of 64 keys, the second always after the first, so that one's
// softmax runs under the other's matrix products.
//
// Shared memory is in boxes of 64 rows x 64 channels with wgmma's 128-byte swizzle: a row is 128 bytes, and its 16-byte
// units are exchanged by the row's last three bits. As operand, queries and keys have their channels summed over
// ("K-major"), values their rows ("MN-major", the transposed form).

constexpr int C = 384, KEYS = 64, TILE = 128;
constexpr int PARTS = 3;  // of 128 channels, of a block's keys and then of its values: a slot each
constexpr u32 RING = 8;  // slots
constexpr int WARPGROUPS = 2, THREADS = 128 * WARPGROUPS;
constexpr u32 BOX = 64 * 128, SLOT = 2 * BOX;
constexpr u32 Q_BYTES = TILE * C * 2;
constexpr u32 AT_RING = Q_BYTES;  // before it the queries: 6 boxes of the first warpgroup, 6 of the second
constexpr u32 AT_MAP = AT_RING + RING * SLOT;
constexpr u32 MAP = 128;                      // two: of the queries, of keys and values
constexpr u32 AT_FULL = AT_MAP + 2 * MAP;     // mbarriers: slot loaded
constexpr u32 AT_EMPTY = AT_FULL + RING * 8;  // slot used up
constexpr u32 AT_Q_FULL = AT_EMPTY + RING * 8, AT_Q_EMPTY = AT_Q_FULL + 8;
constexpr u32 SHARED = AT_Q_EMPTY + 8;
static_assert(SHARED == SHARED_BYTES, "hopper_attention.py asks for another size");

constexpr float SCALE = 0.051031036307982884f * 1.4426950408889634f;  // 1 / sqrt(384), in powers of two
// The maximum that scores are taken relative to may lag behind by this, in powers of two: weights are then up to 2^8,
// and the division by their sum takes it back.
constexpr float LAG = 8.0f;
#define INFINITE __int_as_float(0x7f800000)

#define R32(d, i) R8(d, i), R8(d, i + 8), R8(d, i + 16), R8(d, i + 24)
#define D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define D64 \
    D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (+)= 64 queries x 16 channels, times 16 channels x 64 keys.
__device__ __forceinline__ void mma_scores(float (&d)[32], u64 q, u64 k, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" D32 "}, %32, %33, p, 1, 1, 0, 0; }"
        : R32(d, 0)
        : "l"(q), "l"(k), "r"(int(add)));
}
// d += 64 queries x 16 keys (p, in registers), times 16 keys x 128 channels.
__device__ __forceinline__ void mma_values(float (&d)[64], const u32* p, u64 v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" D64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : R32(d, 0), R32(d, 32)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
// Of an operand with the 128-byte swizzle; between_boxes is read only of MN-major ones wider than 64.
__device__ __forceinline__ u64 swizzled(u32 address, u32 between_boxes) {
    return descriptor(address, between_boxes, 1024) | 1ull << 62;
}

// ---- what a block computes

// Of so many rows, the last block in part. Unsigned, for a shift: a signed division costs a register too many.
__device__ __forceinline__ int count_of(int rows, u32 block) { return (rows + block - 1) / block; }

// The runs: the first `longer` ones have a key block more.
struct Runs {
    int blocks, length, longer;  // blocks: of a tile
    __device__ __forceinline__ Runs(int tiles, int blocks_, int runs) : blocks(blocks_) {
        length = tiles * blocks / runs;
        longer = tiles * blocks - length * runs;
    }
    __device__ __forceinline__ int start(int run) const { return run * length + min(run, longer); }
    __device__ __forceinline__ int run_of(int block) const {
        const int split = longer * (length + 1);
        return block < split ? block / (length + 1) : longer + (block - split) / length;
    }
};
struct Piece {
    int tile, first, last;  // key blocks first <= ... < last of the tile; none: no such piece
    int slot;               // of partial; -1: the tile is whole
    // The block's piece number `index`. Nothing of it is kept between pieces: registers are scarce.
    __device__ __forceinline__ Piece(int index, int tiles, int blocks, int waves) {
        const int grid = gridDim.x, self = blockIdx.x;
        tile = index * grid + self, first = 0, last = blocks, slot = -1;
        if (index < waves) return;
        const Runs runs(tiles - waves * grid, blocks, grid);
        const int start = runs.start(self), left_over = start / blocks + index - waves;
        tile = waves * grid + left_over;
        first = max(start - left_over * blocks, 0);
        last = min(runs.start(self + 1) - left_over * blocks, blocks);
        if (last - first < blocks) slot = 2 * self + (index > waves);
    }
    __device__ __forceinline__ bool some() const { return first < last; }
};

// ---- loading: query [N, queries, C], keys_values [N, tokens, 2 C] -> queries and ring

// Two boxes, side by side: 64 rows x 128 channels, the `part`th; what lies past the image's last row becomes zero.
__device__ __forceinline__ void load(u32 to, u64 map, int part, int row, int image, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(map), "r"(0), "r"(row), "r"(part * 2), "r"(image), "r"(bar)
        : "memory");
}

// A warp writes the copy engine's description of x [N, rows, channels], as [N, channels / 64, rows, 64], to `map`, by
// way of shared memory, `at`. Strides are in units of 16 bytes.
__device__ __forceinline__ void describe(u64 map, u32 at, const void* x, int N, int rows, int channels, int row_stride,
                                         int image_stride) {
    const u32 lane = threadIdx.x & 31;
    asm volatile("st.shared.b32 [%0], 0;" ::"r"(at + lane * 4) : "memory");
    __syncwarp();
    if (lane == 0) {
#define SET(field, size, ...) \
    asm volatile("tensormap.replace.tile." field ".shared::cta.b1024." size " [%0], " __VA_ARGS__ : "memory")
        SET("global_address", "b64", "%1;" ::"r"(at), "l"(x));
        SET("rank", "b32", "3;" ::"r"(at));  // less one
        SET("box_dim", "b32", "0, 64;" ::"r"(at));
        SET("box_dim", "b32", "1, 64;" ::"r"(at));
        SET("box_dim", "b32", "2, 2;" ::"r"(at));
        SET("box_dim", "b32", "3, 1;" ::"r"(at));
        SET("global_dim", "b32", "0, 64;" ::"r"(at));
        SET("global_dim", "b32", "1, %1;" ::"r"(at), "r"(rows));
        SET("global_dim", "b32", "2, %1;" ::"r"(at), "r"(channels / 64));
        SET("global_dim", "b32", "3, %1;" ::"r"(at), "r"(N));
        SET("global_stride", "b64", "0, %1;" ::"r"(at), "l"(u64(row_stride) * 16));  // bytes, from the second on
        SET("global_stride", "b64", "1, %1;" ::"r"(at), "l"(u64(128)));
        SET("global_stride", "b64", "2, %1;" ::"r"(at), "l"(u64(image_stride) * 16));
        SET("element_stride", "b32", "0, 1;" ::"r"(at));
        SET("element_stride", "b32", "1, 1;" ::"r"(at));
        SET("element_stride", "b32", "2, 1;" ::"r"(at));
        SET("element_stride", "b32", "3, 1;" ::"r"(at));
        SET("elemtype", "b32", "%1;" ::"r"(at), "n"(HALF ? 6 : 10));
        SET("interleave_layout", "b32", "0;" ::"r"(at));
        SET("swizzle_mode", "b32", "3;" ::"r"(at));  // 128 bytes
        SET("fill_mode", "b32", "0;" ::"r"(at));     // zeros
#undef SET
    }
    __syncwarp();
    asm volatile(
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
            map),
        "r"(at)
        : "memory");
}
// By the thread that loads, before it does.
__device__ __forceinline__ void acquire(u64 map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// The blocks of keys and values in the order that they pass through the ring.
struct Loader {
    int index = -1, left = 0, token, image;  // left: blocks of the piece from this one on; none: there are no more
    __device__ __forceinline__ void next(int queries, int tiles, int blocks, int waves) {
        token += KEYS;
        if (--left > 0) return;
        const Piece piece(++index, tiles, blocks, waves);
        left = piece.last - piece.first;
        token = piece.first * KEYS;
        image = piece.tile / count_of(queries, TILE);
    }
    // Part `part` of 6, the ring's `number`th, once its slot is free.
    __device__ __forceinline__ void load_part(u64 maps, u32 shared, u32 number, int part) const {
        if (left <= 0) return;
        const u32 slot = number % RING, full = shared + AT_FULL + slot * 8;
        wait(shared + AT_EMPTY + slot * 8, ~(number / RING) & 1);
        expect(full, SLOT);
        load(shared + AT_RING + slot * SLOT, maps + MAP, part, token, image, full);
    }
};
__device__ __forceinline__ void load_queries(u64 maps, u32 shared, int tile, int queries) {
    const int tiles_of_image = count_of(queries, TILE), image = tile / tiles_of_image;
    const int first = (tile - image * tiles_of_image) * TILE;
    expect(shared + AT_Q_FULL, Q_BYTES);
    for (int i = 0; i < 2 * PARTS; ++i)
        load(shared + i * SLOT, maps, i % PARTS, first + i / PARTS * 64, image, shared + AT_Q_FULL);
}

// ---- what a warpgroup does

// They take turns, by a named barrier each.
__device__ __forceinline__ void wait_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}

__device__ __forceinline__ void attend(u64 maps, u32 shared, u32* out, float* partial, float2* partial_weight,
                                       int queries, int tokens, int tiles, int blocks, int waves) {
    const int group = __shfl_sync(~0u, threadIdx.x >> 7, 0);  // the same in the warp, and known to be
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    const u64 own = swizzled(shared + group * (Q_BYTES / 2), 0);
    const u64 ring = swizzled(shared + AT_RING, BOX);

    u32 count = 0;  // slots used
    auto await = [&] { wait(shared + AT_FULL + count % RING * 8, count / RING & 1); };
    const bool loads = threadIdx.x == 128;
    Loader loader;
    // The ring's `number`th, part `part` of 6, is used up: its slot gets what comes RING later.
    auto release = [&](int part, u32 number) {
        if (lane == 0) arrive(shared + AT_EMPTY + number % RING * 8);
        if (loads) {
            const int next = (part + RING) % (2 * PARTS);
            if (next == 0) loader.next(queries, tiles, blocks, waves);
            loader.load_part(maps, shared, number + RING, next);
        }
        __syncwarp();
    };
    if (loads) {
        acquire(maps), acquire(maps + MAP);
        for (int number = 0; number < RING; ++number) {
            const int part = number % (2 * PARTS);
            if (part == 0) loader.next(queries, tiles, blocks, waves);
            if (number == 0 && loader.left > 0)
                load_queries(maps, shared, Piece(0, tiles, blocks, waves).tile, queries);
            loader.load_part(maps, shared, number, part);
        }
    }

    if (group == 1) give_turn(group);
#pragma unroll 1
    for (int index = 0;; ++index) {
        int left;
        {
            const Piece piece(index, tiles, blocks, waves);
            if (!piece.some()) break;
            left = piece.last - piece.first;
        }
        float o[PARTS][64], s[32];
        // Of this thread's two rows, lane / 4 and 8 more: the largest score that weights are relative to, in powers
        // of two, and the sum of its columns' weights.
        float largest[2] = {-INFINITE, -INFINITE}, weight[2] = {0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < 64; ++i) o[part][i] = 0.0f;
        wait(shared + AT_Q_FULL, index & 1);

#pragma unroll 1
        for (; left; --left) {
            wait_turn(group);
#pragma unroll
            for (int part = 0; part < PARTS; ++part, ++count) {
                await();
                const u64 keys = ring + count % RING * (SLOT / 16);
                mma_fence();
#pragma unroll
                for (int i = 0; i < 8; ++i)  // 16 channels, 32 bytes of a row
                    mma_scores(s, own + (part * 2 + i / 4) * (BOX / 16) + i % 4 * 2,
                               keys + i / 4 * (BOX / 16) + i % 4 * 2, part | i);
                mma_commit();
                if (part == PARTS - 1) give_turn(group);
                if (part) mma_wait<1>(), release(part - 1, count - 1);
            }
            mma_wait<0>();
            pin(s);
            if (left == 1 && lane == 0) arrive(shared + AT_Q_EMPTY);
            release(PARTS - 1, count - 1);
            if (left == 1 && loads) {
                const Piece piece(index + 1, tiles, blocks, waves);
                wait(shared + AT_Q_EMPTY, index & 1);
                if (piece.some()) load_queries(maps, shared, piece.tile, queries);
            }
            __syncwarp();

            // Softmax. Register i: key 8 (i / 4) + 2 (lane % 4) + i % 2, row i / 2 % 2.
            if (left == 1 && Piece(index, tiles, blocks, waves).last == blocks) {
                const int last_keys = tokens - (blocks - 1) * KEYS;
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= last_keys) s[i] = -INFINITE;
            }
            float top[2] = {s[0], s[2]};
#pragma unroll
            for (int i = 0; i < 32; ++i) top[i >> 1 & 1] = fmaxf(top[i >> 1 & 1], s[i]);
            const bool grown = top[0] * SCALE > largest[0] + LAG || top[1] * SCALE > largest[1] + LAG;
            if (__any_sync(~0u, grown)) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    top[row] = fmaxf(top[row], __shfl_xor_sync(~0u, top[row], 1));  // the quad has the row's other keys
                    top[row] = fmaxf(top[row], __shfl_xor_sync(~0u, top[row], 2));
                    const float now = fmaxf(largest[row], top[row] * SCALE);
                    const float factor = power(largest[row] - now);
                    largest[row] = now;
                    weight[row] *= factor;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part)
#pragma unroll
                        for (int i = 0; i < 64; ++i)
                            if ((i >> 1 & 1) == row) o[part][i] *= factor;
                }
            }
            u32 p[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float low = power(s[2 * i] * SCALE - largest[i & 1]);
                float high = power(s[2 * i + 1] * SCALE - largest[i & 1]);
                p[i] = pack(low, high);
                unpack(p[i], low, high);  // the sum has the weights as the product has them: rounding cancels
                weight[i & 1] += low + high;
            }

#pragma unroll
            for (int part = 0; part < PARTS; ++part, ++count) {
                await();
                const u64 values = ring + count % RING * (SLOT / 16);
                mma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) mma_values(o[part], p + 4 * i, values + i * (16 * 128 / 16));
                mma_commit();
                if (part) mma_wait<1>(), release(PARTS + part - 1, count - 1);
            }
            mma_wait<0>();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) pin(o[part]);
            release(2 * PARTS - 1, count - 1);
        }

        const Piece piece(index, tiles, blocks, waves);
        const int tiles_of_image = count_of(queries, TILE);
        const int image = piece.tile / tiles_of_image;
        const int row = group * 64 + warp * 16 + (lane >> 2);
        const int query = (piece.tile - image * tiles_of_image) * TILE + row;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            weight[r] = quad_sum(weight[r]);
            if (query + 8 * r >= queries) continue;
            if (piece.slot < 0) {
                const float share = inverse(weight[r]);
                u32* to = out + (size_t(image) * queries + query + 8 * r) * (C / 2) + (lane & 3);
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        to[part * 64 + i * 4] =
                            pack(o[part][4 * i + 2 * r] * share, o[part][4 * i + 2 * r + 1] * share);
            } else {
                const size_t at = size_t(piece.slot) * TILE + row + 8 * r;
                float2* to = reinterpret_cast<float2*>(partial + at * C) + (lane & 3);
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        to[part * 64 + i * 4] = make_float2(o[part][4 * i + 2 * r], o[part][4 * i + 2 * r + 1]);
                if ((lane & 3) == 0) partial_weight[at] = make_float2(largest[r], weight[r]);
            }
        }
    }
    if (group == 0) wait_turn(group);  // the last turn given
}

// query: [N, queries, C]; keys_values: [N, tokens, 2 C]; their strides are from row to row and from image to image, in
// units of 16 bytes. out: [N, queries, C]; partial: fp32 [2 blocks of the grid, TILE, C], sums of weighted values;
// partial_weight: fp32 [.., TILE, 2], the maximum that they are relative to and the sum of weights; maps: 256 bytes for
// each block of the grid, to be written here. Tiles times key blocks of an image must be less than 2^31.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention384(const void* query, const void* keys_values, u32* out, float* partial, float2* partial_weight,
                 unsigned char* all_maps, int N, int queries, int tokens, int query_stride, int query_image_stride,
                 int token_stride, int token_image_stride, int waves) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int tiles = N * count_of(queries, TILE), blocks = count_of(tokens, KEYS);
    const u64 maps = (u64)all_maps + blockIdx.x * (2 * MAP);

    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) {
            barrier_init(shared + AT_FULL + i * 8, 1);
            barrier_init(shared + AT_EMPTY + i * 8, WARPGROUPS * 4);
        }
        barrier_init(shared + AT_Q_FULL, 1);
        barrier_init(shared + AT_Q_EMPTY, WARPGROUPS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const int warp = threadIdx.x >> 5;
    if (warp == 4) describe(maps, shared + AT_MAP, query, N, queries, C, query_stride, query_image_stride);
    if (warp == 5)
        describe(maps + MAP, shared + AT_MAP + MAP, keys_values, N, tokens, 2 * C, token_stride, token_image_stride);
    __syncthreads();

    attend(maps, shared, out, partial, partial_weight, queries, tokens, tiles, blocks, waves);
}

// Adds up the tiles in parts; a warp a row, 8 rows a block. partial, partial_weight, out: as above.
extern "C" __global__ void __launch_bounds__(256)
    attention384_combine(const float4* partial, const float2* partial_weight, uint2* out, int N, int queries,
                         int tokens, int waves, int grid) {
    const int tiles_of_image = count_of(queries, TILE), tiles = N * tiles_of_image;
    const Runs runs(tiles - waves * grid, count_of(tokens, KEYS), grid);
    const int left_over = blockIdx.x / (TILE / 8), row = blockIdx.x % (TILE / 8) * 8 + (threadIdx.x >> 5);
    const int lane = threadIdx.x & 31, tile = waves * grid + left_over;
    const int image = tile / tiles_of_image, query = (tile - image * tiles_of_image) * TILE + row;
    const int first = runs.run_of(left_over * runs.blocks), last = runs.run_of((left_over + 1) * runs.blocks - 1);
    if (first == last || query >= queries) return;
    auto place = [&](int run) {
        return size_t(2 * run + (left_over > runs.start(run) / runs.blocks)) * TILE + row;
    };
    float largest = -INFINITE, weight = 0.0f;
    for (int run = first; run <= last; ++run) largest = fmaxf(largest, partial_weight[place(run)].x);
    float4 sum[3] = {};
    for (int run = first; run <= last; ++run) {
        const float2 own = partial_weight[place(run)];
        const float factor = power(own.x - largest);
        weight += own.y * factor;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const float4 more = partial[place(run) * (C / 4) + i * 32 + lane];
            sum[i].x += more.x * factor;
            sum[i].y += more.y * factor;
            sum[i].z += more.z * factor;
            sum[i].w += more.w * factor;
        }
    }
    const float share = inverse(weight);
#pragma unroll
    for (int i = 0; i < 3; ++i)
        out[(size_t(image) * queries + query) * (C / 4) + i * 32 + lane] =
            make_uint2(pack(sum[i].x * share, sum[i].y * share), pack(sum[i].z * share, sum[i].w * share));
}
