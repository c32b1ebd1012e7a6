// The attention that keys receive, on Hopper (sm_90a), compiled at run time by NVRTC.
//
// A thread block keeps 256 keys of one KV head in registers, 128 of each of two warpgroups, and the
// tiles of queries that see them stream by: 128 rows, which are the heads of a group at a few
// positions. Scores have keys as rows, S^T = K Q^T, so that a product reads only queries from
// shared memory, and a thread sums the weights of its own keys to the end: no exchange before, and
// results that repeat to the bit. A warpgroup's keys are two halves of 64 rows with scores of their
// own: the product of one goes on among the exponentials of the other.
//
// A third warpgroup loads: queries by bulk copies, what is beside them by hand, each of its warps
// one of the ranges of keys that a query sees. It tells which tiles are seen and which whole.
//
// Set by the compiler's options: HEAD_DIM 64 or 128, IS_BF16, RANGES (of keys a query sees),
// SHARED_BYTES.

#include "hopper_ptx.cuh"

constexpr int D = HEAD_DIM;
constexpr int ROWS = 128;  // of a tile of queries
constexpr int KEYS = 256;  // of a block
constexpr int HALF = 64;   // keys of a product
constexpr int STAGES = 4;
constexpr int TILE_BYTES = ROWS * D * 2;
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITY_F __int_as_float(0x7f800000)
constexpr int FAR = 0x7fffffff;
// Of a thread of each warpgroup: 504 for one thread of all three.
constexpr int SERVER_REGISTERS = 40, KEY_REGISTERS = 232;
constexpr int SEEN = 1, WHOLE = 16;  // of the first half of a block; shifted by h, of half h

struct Strides {
    long long batch, head, row;
};

struct Params {
    const void* k;
    const float* lse;      // (batch, Hq, n)
    const int *low, *high;  // (RANGES, n)
    const int* ptr;
    const int4* items;
    float* out;  // (parts, batch, Hkv, m)
    Strides k_strides;
    int n, m, kv_heads, group, pairs, tiles, period, log_positions;
    float scale_log2;
};

struct Shared {
    alignas(1024) unsigned char q[STAGES][TILE_BYTES];
    // Beside each row of queries, in the order of `place`: -lse in base 2; first key, and how many.
    alignas(16) float level[STAGES][ROWS];
    alignas(16) int bounds[STAGES][RANGES][2][ROWS];
    alignas(8) u64 full[STAGES], empty[STAGES];
    int marks[STAGES][RANGES];
};

static_assert(sizeof(Shared) <= SHARED_BYTES);

// What a block does: the tiles of queries of one block of keys, from `begin` to `end` of them all.
struct Work {
    int tile, batch, kv_head, first_range, last_range, begin, end;
    long long out;
};

__device__ __forceinline__ Work work_of(const Params& p) {
    Work x;
    const int item = blockIdx.x, pair = item % p.pairs;
    x.tile = item / p.pairs % p.tiles;
    x.batch = pair / p.kv_heads;
    x.kv_head = pair % p.kv_heads;
    x.first_range = p.ptr[x.tile];
    x.last_range = p.ptr[x.tile + 1];
    const int per_tile = p.pairs * p.tiles, part = item / per_tile, parts = gridDim.x / per_tile;
    x.out = ((long long)part * p.pairs + pair) * p.m;
    int total = 0;
    for (int r = x.first_range; r < x.last_range; r++) total += p.items[r].y - p.items[r].x;
    total *= p.group >> (7 - p.log_positions);
    x.begin = (long long)total * part / parts;
    x.end = (long long)total * (part + 1) / parts;
    return x;
}

// Products ----------------------------------------------------------------------------------------

// d = A B or d += A B with A in registers, B's rows over N.
template <bool ADD>
__device__ __forceinline__ void row_product(float (&d)[64], const u32* a, u32 b) {
    if constexpr (ADD)
        asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%68, %69};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16." KIND " " R64
                     ", {%64, %65, %66, %67}, b, 1, 1, 1, 0;\n}"
                     : D64("+f", d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(UPPER));
    else
        asm volatile("{\n.reg .pred none;\n.reg .b64 b;\nsetp.ne.b32 none, 0, 0;\n"
                     "mov.b64 b, {%68, %69};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16." KIND " " R64
                     ", {%64, %65, %66, %67}, b, none, 1, 1, 0;\n}"
                     : D64("=f", d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(UPPER));
}

// Step k of a product over 16 channels each.
__device__ __forceinline__ void score_step(float (&s)[64], const u32 (&keys)[D / 4],
                                           const unsigned char* queries, int k) {
    const u32 b = along(shared_address(queries)) + k / 4 * (ROWS * 8) + k % 4 * 2;
    k ? row_product<true>(s, keys + 4 * k, b) : row_product<false>(s, keys + 4 * k, b);
}

// Where a row of queries lies, for a thread of a product to find its own next to each other: it has
// columns 0 and 1 or 2 and 3, ..., of every eight; here those of two times eight are four.
__device__ __forceinline__ int place(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// Keys as an operand of products over 16 columns each. Zeros past the last key.
__device__ __forceinline__ void load_keys(u32 (&a)[D / 4], const Params& p, const Work& at, int key,
                                          int lane) {
    const unsigned short* base = (const unsigned short*)p.k + at.batch * p.k_strides.batch +
                                 at.kv_head * p.k_strides.head + lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = key + 8 * half;
#pragma unroll
        for (int c = 0; c < D / 32; c++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (row < p.m) x = *(const uint4*)(base + row * p.k_strides.row + 32 * c);
            x = quad_transposed(x.x, x.y, x.z, x.w, lane);
            a[8 * c + half] = x.x;
            a[8 * c + half + 2] = x.y;
            a[8 * c + half + 4] = x.z;
            a[8 * c + half + 6] = x.w;
        }
    }
}

// Adds exp(scale S - lse) to the sums of keys `key` and `key + 8`, those of a tile in parts first:
// rows 16 j to 16 j + 15 of a tile of queries.
template <bool WHOLE_TILE>
__device__ __forceinline__ void add_weights(float (&part)[4], const float (&s)[64],
                                            const Shared& sh, int stage, int j, int key, int quad,
                                            float scale_log2) {
    const int from = 16 * j + 4 * quad;
    const float4 x = *(const float4*)(sh.level[stage] + from);
    const float level[4] = {x.x, x.y, x.z, x.w};
    bool seen[2][4] = {};
    if (!WHOLE_TILE) {
#pragma unroll
        for (int r = 0; r < RANGES; r++) {
            const int4 a = *(const int4*)(sh.bounds[stage][r][0] + from);
            const int4 b = *(const int4*)(sh.bounds[stage][r][1] + from);
            const int low[4] = {a.x, a.y, a.z, a.w}, count[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                seen[0][c] |= (u32)(key - low[c]) < (u32)count[c];
                seen[1][c] |= (u32)(key + 8 - low[c]) < (u32)count[c];
            }
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float y = s[8 * j + c / 2 * 4 + row * 2 + c % 2] * scale_log2 + level[c];
            if (!WHOLE_TILE) y = seen[row][c] ? y : -INFINITY_F;
            y = exp2_fast(y);
            float& to = part[2 * row + c % 2];
            to = j == 0 && c < 2 ? y : to + y;
        }
    }
}

// Adds the weights of scores s while the product of the next, d, goes on. The product's steps lie
// between the exponentials, which measured faster than all of them before.
template <bool WHOLE_TILE>
__device__ __forceinline__ void advance(float (&d)[64], const u32 (&keys)[D / 4],
                                        const unsigned char* queries, float (&sum)[2],
                                        const float (&s)[64], const Shared& sh, int stage, int key,
                                        int quad, float scale_log2) {
    constexpr int STEPS = D / 16, EACH = ROWS / 16 / STEPS;
    float part[4];
    products_begin();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        score_step(d, keys, queries, k);
#pragma unroll
        for (int j = k * EACH; j < (k + 1) * EACH; j++)
            add_weights<WHOLE_TILE>(part, s, sh, stage, j, key, quad, scale_log2);
    }
    products_commit();
    sum[0] += part[0] + part[1];
    sum[1] += part[2] + part[3];
}

__device__ __forceinline__ void compute(const Params& p, Shared& sh, const Work& work, int w) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const int key = work.tile * KEYS + w * 2 * HALF + warp * 16 + lane / 4;
    u32 keys0[D / 4], keys1[D / 4];
    load_keys(keys0, p, work, key, lane);
    load_keys(keys1, p, work, key + HALF, lane);
    float sum0[2] = {0.0f, 0.0f}, sum1[2] = {0.0f, 0.0f};
    int left = work.end - work.begin, marks = 0;
    u32 stage = 0, parity = 0;
    const auto release = [&](u32 which) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.empty[which]));
    };
    const auto step = [&]() {
        left--;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        parity ^= stage == 0;
    };
    // Whether some row of the next tile sees some of these keys.
    const auto next_is_seen = [&]() {
        if (!left) return false;
        barrier_wait(shared_address(&sh.full[stage]), parity);
        marks = sh.marks[stage][0];
#pragma unroll
        for (int r = 1; r < RANGES; r++) marks |= sh.marks[stage][r];
        // The same in all lanes, and the compiler is to know it.
        marks = __shfl_sync(~0u, marks, 0) >> 2 * w;
        return (marks & (SEEN | SEEN << 1)) != 0;
    };
    for (;;) {
        // Tiles are passed over only where none is held: there may be more of them than stages.
        while (left && !next_is_seen()) {
            release(stage);
            step();
        }
        if (!left) break;
        float s0[64], s1[64];
        u32 at = stage;
        int here = marks;
        products_begin();
#pragma unroll
        for (int k = 0; k < D / 16; k++) score_step(s0, keys0, sh.q[at], k);
        products_commit();
        products_wait<0>();
        hold(s0);
        const auto first_half = [&]() {
            if (here & WHOLE)
                advance<true>(s1, keys1, sh.q[at], sum0, s0, sh, at, key, quad, p.scale_log2);
            else
                advance<false>(s1, keys1, sh.q[at], sum0, s0, sh, at, key, quad, p.scale_log2);
        };
        first_half();
        step();
        bool more = next_is_seen();
        products_wait<0>();
        hold(s1);
        // Nothing is in flight at the loop's edge: ptxas would serialise all products else.
#pragma unroll 1
        while (more) {
            const unsigned char* q = sh.q[stage];
            if (here & WHOLE << 1)
                advance<true>(s0, keys0, q, sum1, s1, sh, at, key + HALF, quad, p.scale_log2);
            else
                advance<false>(s0, keys0, q, sum1, s1, sh, at, key + HALF, quad, p.scale_log2);
            products_wait<0>();
            hold(s0);
            release(at);
            at = stage;
            here = marks;
            first_half();
            step();
            more = next_is_seen();
            products_wait<0>();
            hold(s1);
        }
        float part[4];
#pragma unroll
        for (int j = 0; j < ROWS / 16; j++)
            add_weights<false>(part, s1, sh, at, j, key + HALF, quad, p.scale_log2);
        sum1[0] += part[0] + part[1];
        sum1[1] += part[2] + part[3];
        release(at);
    }
    float* out = p.out + work.out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x = i < 2 ? sum0[i] : sum1[i - 2];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        const int j = key + i / 2 * HALF + i % 2 * 8;
        if (quad == 0 && j < p.m) out[j] = x;
    }
}

// Loads -------------------------------------------------------------------------------------------

// Calls `load(stage, parity, head, first position)` for each tile of queries of a block, in an
// order in which blocks that start together read the same queries together, where their windows
// overlap: downwards, from below a tile whose number is a multiple of the longest range's length.
template <class Load>
__device__ __forceinline__ void each_tile(const Params& p, const Work& work, const Load& load) {
    const int pack = ROWS >> p.log_positions;
    u32 stage = 0, parity = 1;
    int before = 0;
    for (int head = 0; head < p.group; head += pack) {
        for (int r = work.first_range; r < work.last_range; r++) {
            const int first = p.items[r].x, last = p.items[r].y, count = last - first;
            int top = last / p.period * p.period;
            top = top > first ? top : last;
            const int end = min(count, work.end - before);
            for (int i = max(0, work.begin - before); i < end; i++) {
                const int tile = top - 1 - i;
                load(stage, parity, work.kv_head * p.group + head,
                     (tile < first ? tile + count : tile) << p.log_positions);
                stage = stage == STAGES - 1 ? 0 : stage + 1;
                parity ^= stage == 0;
            }
            before += count;
        }
    }
}

// The bounds of one range, and which halves of the block it meets: some of, or all.
__device__ __forceinline__ void load_bounds(const Params& p, Shared& sh, const Work& work,
                                            u32 stage, u32 parity, int range, int start, int lane) {
    const int* lows = p.low + (long long)range * p.n;
    const int* highs = p.high + (long long)range * p.n;
    int low[ROWS / 32], high[ROWS / 32];
#pragma unroll
    for (int c = 0; c < ROWS / 32; c++) {
        const int i = start + (lane + 32 * c & (1 << p.log_positions) - 1);
        low[c] = i < p.n ? lows[i] : FAR;
        high[c] = i < p.n ? highs[i] : FAR;
    }
    barrier_wait(shared_address(&sh.empty[stage]), parity);
    int least_low = FAR, most_low = 0, least_high = FAR, most_high = 0;
#pragma unroll
    for (int c = 0; c < ROWS / 32; c++) {
        const bool some = low[c] < high[c];
        const int to = place(lane + 32 * c);
        sh.bounds[stage][range][0][to] = low[c];
        sh.bounds[stage][range][1][to] = some ? high[c] - low[c] : 0;
        if (some) {
            least_low = min(least_low, low[c]);
            most_high = max(most_high, high[c]);
        }
        // A row past the last query weighs nothing, so whether it sees keys is all the same.
        if (high[c] != FAR) {
            most_low = max(most_low, some ? low[c] : FAR);
            least_high = min(least_high, some ? high[c] : 0);
        }
    }
    least_low = __reduce_min_sync(~0u, least_low);
    most_low = __reduce_max_sync(~0u, most_low);
    least_high = __reduce_min_sync(~0u, least_high);
    most_high = __reduce_max_sync(~0u, most_high);
    int marks = 0;
#pragma unroll
    for (int half = 0; half < KEYS / HALF; half++) {
        const int from = work.tile * KEYS + half * HALF, to = min(from + HALF, p.m);
        if (least_low < to && from < most_high) marks |= SEEN << half;
        if (most_low <= from && to <= least_high) marks |= WHOLE << half;
    }
    if (lane == 0) sh.marks[stage][range] = marks;
}

__device__ __forceinline__ void serve(const Params& p, Shared& sh, const Work& work,
                                      const TensorMap* q, int warp, int lane) {
    each_tile(p, work, [&](u32 stage, u32 parity, int head, int start) {
        const u32 full = shared_address(&sh.full[stage]);
        if (warp == 0) {
            const float* lse =
                p.lse + ((long long)work.batch * p.kv_heads * p.group + head) * p.n;
            float level[ROWS / 32];
#pragma unroll
            for (int c = 0; c < ROWS / 32; c++) {
                const int row = lane + 32 * c, i = start + (row & (1 << p.log_positions) - 1);
                const float x =
                    i < p.n ? lse[(long long)(row >> p.log_positions) * p.n + i] : -INFINITY_F;
                // Minus infinity stays that: what sees nothing weighs nothing.
                level[c] = x == -INFINITY_F ? x : x * -LOG2E;
            }
            barrier_wait(shared_address(&sh.empty[stage]), parity);
            if (lane == 0) {
                barrier_expect(full, TILE_BYTES);
                for (int c = 0; c < D / 64; c++)
                    load_box(shared_address(sh.q[stage]) + c * ROWS * 128, q, full, c * 64, start,
                             head, work.batch);
            }
#pragma unroll
            for (int c = 0; c < ROWS / 32; c++) sh.level[stage][place(lane + 32 * c)] = level[c];
        }
        load_bounds(p, sh, work, stage, parity, warp, start, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    });
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_received(const __grid_constant__ TensorMap q, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& sh = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&sh.full[i]), 1 + RANGES);
            barrier_init(shared_address(&sh.empty[i]), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_shared();
    }
    __syncthreads();
    const Work work = work_of(p);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(SERVER_REGISTERS));
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (warp < RANGES) serve(p, sh, work, &q, warp, threadIdx.x % 32);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(KEY_REGISTERS));
        compute(p, sh, work, group - 1);
    }
}
