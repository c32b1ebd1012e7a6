// Backward of windowed and sparse attention on Hopper (sm_90a), compiled at run time by NVRTC.
//
// A work item is one tile of 128 keys of one KV head. It keeps K and V in shared memory and the
// sums of dK and dV in registers, and meets the query tiles that see it, of all the query heads of
// its KV head. For each: S^T = K Q^T and dP^T = V dO^T, so that P^T comes out of the registers as an
// operand of dV += P^T dO; dS goes through shared memory for dK += dS^T Q and for dQ = dS K, whose
// parts are added up in global memory by bulk reductions.
//
// Two warpgroups compute, 64 keys each. A third makes dQ of what they leave, so that they need not
// wait for each other. Of a fourth, one thread loads, one warp adds up dQ, and two turn final rows
// of dQ into the result. Those fp32 sums lie in a ring of tiles that is only as long as the keys in
// flight and their windows need: items are taken in rising order, so the sums of a tile are final
// once the items that see it are done, and its place is free again. Parts are counted when an item
// is through with a head; in an order, each one before the next is added.
//
// Set by the compiler's options: HEAD_DIM 64 or 128, IS_BF16, RANGES (of keys a query sees),
// ORDERED (parts of dQ are added in one order), SHARED_BYTES.

#include "hopper_ptx.cuh"

constexpr int D = HEAD_DIM;
constexpr int BN = 128;                      // keys of a tile
constexpr int BM = HEAD_DIM == 128 ? 64 : 128;  // queries of a tile
constexpr int BOX = 64;                      // columns of a box of 128 bytes, the swizzle's width
constexpr int Q_STAGES = HEAD_DIM == 64 && RANGES > 2 ? 2 : 3;
constexpr int DO_STAGES = 2;
constexpr int TILE_BYTES = BM * D * 2;       // of Q or dO
constexpr int KEYS_BYTES = BN * D * 2;       // of K or V
constexpr int DS_BYTES = BM * BN * 2;
constexpr int SUM_BYTES = BM * D * 4;        // of dQ in fp32
constexpr int STATS_BYTES = 2 * BM * 4;
constexpr int BOUNDS_BYTES = BM * 8;         // of one range
constexpr int PART_BYTES = 4 * 128 * 16;      // of a tile of dQ that is converted at a time
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITY_F __int_as_float(0x7f800000)
// Of a thread of each warpgroup: 512 for one thread of all four.
constexpr int SERVER_REGISTERS = 24, QUERY_REGISTERS = 72, KEY_REGISTERS = 208;
constexpr int DONE = 1;                      // state of a tile of dQ whose place is free again

struct Strides {
    long long batch, head, row;
};

struct Params {
    const float* stats;      // (batch, Hq, query tiles, 2, BM): LSE in base 2, delta
    const int2* bounds;      // (RANGES, query tiles * BM): first key, number of keys
    const int* column_ptr;
    const int4* columns;
    const int* row_ptr;
    const int4* rows;
    int* state;              // like the ring, but for all tiles: less the parts still due, or DONE
    int* next;               // the next work item, and the next tile of dQ to convert
    float* ring;             // (places, side * group, BM * D)
    void *dq, *dk, *dv;
    Strides dq_strides, dk_strides, dv_strides;
    int batch, n, m, kv_heads, group, query_tiles, key_tiles, places, side;
    float scale;
};

struct Prepare {
    const void *out, *grad_out;
    const float *lse, *grad_lse;
    const int *low, *high;
    float* stats;
    int2* bounds;
    const int* row_ptr;
    const int4* rows;
    int* state;
    int* next;
    void* dq;
    Strides out_strides, grad_strides, lse_strides, grad_lse_strides, dq_strides;
    int batch, heads, n, strip_heads, query_tiles;
};

// Shared memory -----------------------------------------------------------------------------------

struct Shared {
    alignas(1024) unsigned char k[KEYS_BYTES];
    alignas(1024) unsigned char v[KEYS_BYTES];
    alignas(1024) unsigned char q[Q_STAGES][TILE_BYTES];
    alignas(1024) unsigned char grad[DO_STAGES][TILE_BYTES];
    alignas(1024) unsigned char ds[2][DS_BYTES];  // dS^T: rows are keys
    alignas(1024) unsigned char sum[2][SUM_BYTES / 2];
    alignas(128) float4 part[4][128];
    alignas(128) float stats[Q_STAGES][2][BM];
    alignas(128) int2 bounds[Q_STAGES][RANGES][BM];
    alignas(8) u64 q_full[Q_STAGES], q_empty[Q_STAGES], grad_full[DO_STAGES], grad_empty[DO_STAGES];
    u64 k_full, v_full, keys_empty, item_full[2], item_empty[2];
    u64 ds_full[2], ds_empty[2], sum_full[2], sum_empty[2], part_full;
    int masked[Q_STAGES];
    int2 item[2];        // item, pairs of a query tile and a head; -1: no more
    int ready;           // a final tile of dQ, as in `state`; -1: no more
};

static_assert(sizeof(Shared) <= SHARED_BYTES);

// Items run over the key tiles of `side` KV heads at a time: `strip` counts those sets of heads, over
// the batch. A tile of dQ is numbered by strip, query tile and query head within the strip.
struct Item {
    int strip, tile, batch, head;
};

__device__ __forceinline__ Item unpacked(const Params& p, int item) {
    const int beside = item % p.side, rest = item / p.side, strip = rest / p.key_tiles;
    const int strips = p.kv_heads / p.side;
    return {strip, rest % p.key_tiles, strip / strips, strip % strips * p.side + beside};
}

// Consumers ---------------------------------------------------------------------------------------

constexpr int NS = BM / 2;  // registers of S^T: 64 keys x BM queries a warpgroup
constexpr int NO = D / 2;   // of dK and dV

__device__ __forceinline__ void scores(float (&s)[NS], u32 keys, u32 queries) {
    // Both operands along D: boxes of 64 columns, 16 columns (32 bytes) a step.
    products_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const u32 a = along(keys) + k / 4 * (BN * 8) + k % 4 * 2;
        const u32 b = along(queries) + k / 4 * (BM * 8) + k % 4 * 2;
        k ? product<true, 0, 0>(s, a, b) : product<false, 0, 0>(s, a, b);
    }
    products_commit();
}

__device__ __forceinline__ void sums(float (&d)[NO], const u32 (&a)[NS / 2], u32 queries) {
    // Over queries: 16 rows a step.
    products_begin();
#pragma unroll
    for (int k = 0; k < BM / 16; k++) product(d, a + 4 * k, across(queries, BM * 128) + k * 128);
    products_commit();
}

__device__ __forceinline__ void key_sums(float (&d)[NO], u32 ds, u32 queries) {
    products_begin();
#pragma unroll
    for (int k = 0; k < BM / 16; k++)
        product<true, 0, 1>(d, along(ds) + k / 4 * (BN * 8) + k % 4 * 2,
                            across(queries, BM * 128) + k * 128);
    products_commit();
}

__device__ __forceinline__ void query_sums(float (&d)[32], u32 ds, u32 keys) {
    products_begin();
#pragma unroll
    for (int k = 0; k < BN / 16; k++) {
        const u32 a = across(ds, 0) + k * 128, b = across(keys, 0) + k * 128;
        k ? product<true, 1, 1>(d, a, b) : product<false, 1, 1>(d, a, b);
    }
    products_commit();
}

__device__ __forceinline__ void store_keys(const float (&x)[NO], void* to, const Strides& strides,
                                           const Item& at, int key, int m, float factor, int lane) {
    unsigned short* base = (unsigned short*)to + at.batch * strides.batch + at.head * strides.head;
#pragma unroll
    for (int j = 0; j < D / 8; j += 4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                word[i] = pack(x[4 * (j + i) + 2 * half] * factor,
                               x[4 * (j + i) + 2 * half + 1] * factor);
            uint4 row = quad_transposed(word[0], word[1], word[2], word[3], lane);
            if (key + 8 * half < m)
                *(uint4*)(base + (key + 8 * half) * strides.row + (j + lane % 4) * 8) = row;
        }
    }
}

// P = exp(scale S - lse), rounded to words of two: in fp32 it would not fit beside dP and dQ.
__device__ __forceinline__ void weights(u32 (&weight)[NS / 2], const float (&s)[NS],
                                        const Shared& sh, int stage, int key, u32 pair,
                                        float scale_log2) {
    const u32 stats = shared_address(sh.stats[stage]) + pair * 4;
    if (sh.masked[stage]) {
        const u32 bounds = shared_address(sh.bounds[stage]) + pair * 8;
#pragma unroll
        for (int j = 0; j < BM / 8; j++) {
            const float2 lse = load_pair(stats + j * 32);
            bool seen[4] = {false, false, false, false};
#pragma unroll
            for (int r = 0; r < RANGES; r++) {
                const int4 b = load_four(bounds + r * BOUNDS_BYTES + j * 64);
                seen[0] |= (u32)(key - b.x) < (u32)b.y;
                seen[1] |= (u32)(key - b.z) < (u32)b.w;
                seen[2] |= (u32)(key + 8 - b.x) < (u32)b.y;
                seen[3] |= (u32)(key + 8 - b.z) < (u32)b.w;
            }
            float x[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                x[c] = s[4 * j + c] * scale_log2 - (c % 2 ? lse.y : lse.x);
                x[c] = exp2_fast(seen[c] ? x[c] : -INFINITY_F);
            }
            weight[2 * j] = pack(x[0], x[1]);
            weight[2 * j + 1] = pack(x[2], x[3]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < BM / 8; j++) {
            const float2 lse = load_pair(stats + j * 32);
            float x[4];
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[c] = exp2_fast(s[4 * j + c] * scale_log2 - (c % 2 ? lse.y : lse.x));
            weight[2 * j] = pack(x[0], x[1]);
            weight[2 * j + 1] = pack(x[2], x[3]);
        }
    }
}

// dS = P (dP - delta), rounded to words of two.
__device__ __forceinline__ void slopes(u32 (&ds)[NS / 2], const u32 (&weight)[NS / 2],
                                       const float (&dp)[NS], const Shared& sh, int stage,
                                       u32 pair) {
    const u32 stats = shared_address(sh.stats[stage]) + pair * 4 + BM * 4;
#pragma unroll
    for (int j = 0; j < BM / 8; j++) {
        const float2 delta = load_pair(stats + j * 32);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 p = unpack(weight[2 * j + half]);
            ds[2 * j + half] = pack(p.x * (dp[4 * j + 2 * half] - delta.x),
                                    p.y * (dp[4 * j + 2 * half + 1] - delta.y));
        }
    }
}

// dS^T of this warp to shared memory. The warpgroup meets there: its dK reads all of its own.
__device__ __forceinline__ void hand_over(const u32 (&ds)[NS / 2], Shared& sh, int it, u32 to,
                                          u32 row, u32 chunk, int lane, int w) {
    barrier_wait(shared_address(&sh.ds_empty[it & 1]), (it / 2 & 1) ^ 1);
    to += (it & 1) * DS_BYTES;
#pragma unroll
    for (int j = 0; j < BM / 16; j++)
        store_matrices(to + (j / 4) * (BN * 128) + (((2 * j + chunk) % 8 ^ (row & 7)) << 4),
                       ds[4 * j], ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
    fence_shared();
    asm volatile("bar.sync %0, 128;" ::"r"(w + 3) : "memory");
    if (lane == 0) barrier_arrive(shared_address(&sh.ds_full[it & 1]));
}

__device__ __forceinline__ void compute(const Params& p, Shared& sh, int w) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = threadIdx.x % 32;
    const float scale_log2 = p.scale * LOG2E;
    const u32 k = shared_address(sh.k), v = shared_address(sh.v);
    const u32 k_mine = k + w * 64 * 128, v_mine = v + w * 64 * 128;
    // Where this lane's row of 8 queries goes, matrices in the order of the registers.
    const u32 ds_row = w * 64 + warp * 16 + (lane / 8 % 2) * 8 + lane % 8, ds_chunk = lane / 16;
    const u32 ds_to = shared_address(sh.ds[0]) + ds_row * 128;
    const u32 ds_mine = shared_address(sh.ds[0]) + w * 64 * 128;
    const u32 pair = (lane % 4) * 2;
    int it = 0;
    u32 slot = 0, item_parity = 0, keys_parity = 0;
    for (;;) {
        barrier_wait(shared_address(&sh.item_full[slot]), item_parity);
        // The same in all lanes, and the compiler is to know it.
        const int2 message = make_int2(__shfl_sync(~0u, sh.item[slot].x, 0),
                                       __shfl_sync(~0u, sh.item[slot].y, 0));
        const int end = it + message.y;
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (message.x < 0) break;
        const Item at = unpacked(p, message.x);
        const int key = at.tile * BN + w * 64 + warp * 16 + lane / 4;
        float dk[NO], dv[NO];
#pragma unroll
        for (int i = 0; i < NO; i++) dk[i] = dv[i] = 0.0f;
        if (message.y > 0) {
            float s[NS], dp[NS];
            u32 weight[NS / 2], ds[NS / 2];
            barrier_wait(shared_address(&sh.k_full), keys_parity);
            barrier_wait(shared_address(&sh.q_full[it % Q_STAGES]), it / Q_STAGES & 1);
            scores(s, k_mine, shared_address(sh.q[it % Q_STAGES]));
            barrier_wait(shared_address(&sh.v_full), keys_parity);
            barrier_wait(shared_address(&sh.grad_full[it % DO_STAGES]), it / DO_STAGES & 1);
            scores(dp, v_mine, shared_address(sh.grad[it % DO_STAGES]));
            products_wait<1>();
            hold(s);
            weights(weight, s, sh, it % Q_STAGES, key, pair, scale_log2);
            products_wait<0>();
            hold(dp);
            // Nothing is in flight at the loop's edge: ptxas would serialise all products else.
#pragma unroll 1
            for (; it < end - 1; it++) {
                const int qs = it % Q_STAGES, os = it % DO_STAGES;
                const int qn = (it + 1) % Q_STAGES, on = (it + 1) % DO_STAGES;
                sums(dv, weight, shared_address(sh.grad[os]));
                slopes(ds, weight, dp, sh, qs, pair);
                hand_over(ds, sh, it, ds_to, ds_row, ds_chunk, lane, w);
                products_wait<0>();
                hold(dv);
                if (lane == 0) barrier_arrive(shared_address(&sh.grad_empty[os]));
                barrier_wait(shared_address(&sh.q_full[qn]), (it + 1) / Q_STAGES & 1);
                scores(s, k_mine, shared_address(sh.q[qn]));
                key_sums(dk, ds_mine + (it & 1) * DS_BYTES, shared_address(sh.q[qs]));
                products_wait<1>();
                hold(s);
                weights(weight, s, sh, qn, key, pair, scale_log2);
                products_wait<0>();
                hold(dk);
                if (lane == 0) barrier_arrive(shared_address(&sh.q_empty[qs]));
                barrier_wait(shared_address(&sh.grad_full[on]), (it + 1) / DO_STAGES & 1);
                scores(dp, v_mine, shared_address(sh.grad[on]));
                products_wait<0>();
                hold(dp);
            }
            const int qs = it % Q_STAGES, os = it % DO_STAGES;
            sums(dv, weight, shared_address(sh.grad[os]));
            slopes(ds, weight, dp, sh, qs, pair);
            hand_over(ds, sh, it, ds_to, ds_row, ds_chunk, lane, w);
            key_sums(dk, ds_mine + (it & 1) * DS_BYTES, shared_address(sh.q[qs]));
            products_wait<0>();
            hold(dk);
            hold(dv);
            if (lane == 0) {
                barrier_arrive(shared_address(&sh.q_empty[qs]));
                barrier_arrive(shared_address(&sh.grad_empty[os]));
                barrier_arrive(shared_address(&sh.keys_empty));
            }
            it++;
            keys_parity ^= 1;
        }
        store_keys(dk, p.dk, p.dk_strides, at, key, p.m, p.scale, lane);
        store_keys(dv, p.dv, p.dv_strides, at, key, p.m, 1.0f, lane);
    }
}

// dQ ----------------------------------------------------------------------------------------------

// A warpgroup of its own: those that compute go on as soon as their dS is stored, and its products
// fill the gaps between theirs.
__device__ __forceinline__ void multiply(const Params& p, Shared& sh) {
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const u32 k = shared_address(sh.k), ds = shared_address(sh.ds[0]);
    const u32 sum = shared_address(sh.sum[0]) + thread * 16;
    int it = 0;
    u32 slot = 0, item_parity = 0;
    for (;;) {
        barrier_wait(shared_address(&sh.item_full[slot]), item_parity);
        const int2 message = make_int2(__shfl_sync(~0u, sh.item[slot].x, 0),
                                       __shfl_sync(~0u, sh.item[slot].y, 0));
        const int end = it + message.y;
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (message.x < 0) break;
#pragma unroll 1
        for (; it < end; it++) {
            barrier_wait(shared_address(&sh.ds_full[it & 1]), it / 2 & 1);
            // Halves of the columns, or of 128 queries.
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
                float dq[32];
                query_sums(dq, ds + (it & 1) * DS_BYTES + (D == 64 ? half * BN * 128 : 0),
                           k + (D == 128 ? half * BN * 128 : 0));
                products_wait<0>();
                hold(dq);
                if (lane == 0 && half) {
                    barrier_arrive(shared_address(&sh.ds_empty[it & 1]));
                    if (it == end - 1) barrier_arrive(shared_address(&sh.keys_empty));
                }
                barrier_wait(shared_address(&sh.sum_empty[half]), (it & 1) ^ 1);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    store_four(sum + half * (SUM_BYTES / 2) + j * 2048, dq[4 * j], dq[4 * j + 1],
                               dq[4 * j + 2], dq[4 * j + 3]);
                fence_shared();
                __syncwarp();
                if (lane == 0) barrier_arrive(shared_address(&sh.sum_full[half]));
            }
        }
    }
}

// The warpgroup that serves the others ------------------------------------------------------------

__device__ void load(const Params& p, Shared& sh, const TensorMap* q, const TensorMap* grad,
                     const TensorMap* k, const TensorMap* v) {
    const int items = p.batch * p.key_tiles * p.kv_heads;
    int it = 0;
    u32 slot = 0, item_parity = 0, keys_parity = 0;
    for (;;) {
        const int item = atomicAdd(p.next, 1);
        const bool over = item >= items;
        const Item at = unpacked(p, over ? 0 : item);
        const int first = p.column_ptr[at.tile], last = p.column_ptr[at.tile + 1];
        int count = 0;
#pragma unroll 1
        for (int r = first; r < last; r++) count += p.columns[r].y - p.columns[r].x;
        barrier_wait(shared_address(&sh.item_empty[slot]), item_parity ^ 1);
        sh.item[slot] = over ? make_int2(-1, 0) : make_int2(item, count * p.group);
        barrier_arrive(shared_address(&sh.item_full[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (over) break;
        if (count == 0) continue;
        barrier_wait(shared_address(&sh.keys_empty), keys_parity ^ 1);
        keys_parity ^= 1;
        const u32 k_full = shared_address(&sh.k_full), v_full = shared_address(&sh.v_full);
        barrier_expect(k_full, KEYS_BYTES);
#pragma unroll 1
        for (int c = 0; c < D; c += BOX)
            load_box(shared_address(sh.k) + c * BN * 2, k, k_full, c, at.tile * BN, at.head,
                     at.batch);
        barrier_expect(v_full, KEYS_BYTES);
#pragma unroll 1
        for (int c = 0; c < D; c += BOX)
            load_box(shared_address(sh.v) + c * BN * 2, v, v_full, c, at.tile * BN, at.head,
                     at.batch);
        // Heads outside, query tiles inside: what neighbouring items load and add is near in time
        // then, and stays in the L2 cache.
#pragma unroll 1
        for (int g = 0; g < p.group; g++) {
            const int head = at.head * p.group + g;
#pragma unroll 1
            for (int r = last - 1; r >= first; r--) {
                const int4 range = p.columns[r];
#pragma unroll 1
                for (int tile = range.y - 1; tile >= range.x; tile--, it++) {
                    const bool masked = tile < range.z || tile >= range.w;
                    const int qs = it % Q_STAGES, os = it % DO_STAGES;
                    const u32 full = shared_address(&sh.q_full[qs]);
                    barrier_wait(shared_address(&sh.q_empty[qs]), (it / Q_STAGES & 1) ^ 1);
                    sh.masked[qs] = masked;
                    barrier_expect(full, TILE_BYTES + STATS_BYTES +
                                             (masked ? RANGES * BOUNDS_BYTES : 0));
#pragma unroll 1
                    for (int c = 0; c < D; c += BOX)
                        load_box(shared_address(sh.q[qs]) + c * BM * 2, q, full, c, tile * BM, head,
                                 at.batch);
                    const long long row =
                        ((long long)at.batch * p.kv_heads * p.group + head) * p.query_tiles + tile;
                    load_bytes(shared_address(sh.stats[qs]), p.stats + row * 2 * BM, STATS_BYTES,
                               full);
                    if (masked)
#pragma unroll 1
                        for (int k_range = 0; k_range < RANGES; k_range++)
                            load_bytes(
                                shared_address(sh.bounds[qs][k_range]),
                                p.bounds + ((long long)k_range * p.query_tiles + tile) * BM,
                                BOUNDS_BYTES, full);
                    const u32 grad_full = shared_address(&sh.grad_full[os]);
                    barrier_wait(shared_address(&sh.grad_empty[os]), (it / DO_STAGES & 1) ^ 1);
                    barrier_expect(grad_full, TILE_BYTES);
#pragma unroll 1
                    for (int c = 0; c < D; c += BOX)
                        load_box(shared_address(sh.grad[os]) + c * BM * 2, grad, grad_full, c,
                                 tile * BM, head, at.batch);
                }
            }
        }
    }
}

// How many items before that of `key_tile` add to this query tile, of how many.
__device__ __forceinline__ int2 parts(const int* row_ptr, const int4* rows, int tile,
                                      int key_tile) {
    int2 count = make_int2(0, 0);
#pragma unroll 1
    for (int r = row_ptr[tile]; r < row_ptr[tile + 1]; r++) {
        const int4 range = rows[r];
        count.x += max(0, min(range.y, key_tile) - range.x);
        count.y += range.y - range.x;
    }
    return count;
}

// A part of dQ that this thread has added is in memory.
__device__ __forceinline__ void count_part(int* state) {
    fence_global();
    __threadfence();
    atomicAdd(state, 1);
}

__device__ void add_up(const Params& p, Shared& sh, int lane) {
    const int heads = p.side * p.group;
    u32 slot = 0, item_parity = 0, parity = 0;
#pragma unroll 1
    for (;;) {
        barrier_wait(shared_address(&sh.item_full[slot]), item_parity);
        const int2 message = sh.item[slot];
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (message.x < 0) break;
        const Item at = unpacked(p, message.x);
        int* unsettled = nullptr;
        const int first = p.column_ptr[at.tile], last = p.column_ptr[at.tile + 1];
#pragma unroll 1
        for (int g = 0; g < p.group; g++) {
            const int head = at.head % p.side * p.group + g;
            int* of_head = p.state + (long long)at.strip * p.query_tiles * heads + head;
#pragma unroll 1
            for (int r = last - 1; r >= first; r--) {
                const int4 range = p.columns[r];
#pragma unroll 1
                for (int top = range.y - 1; top >= range.x; top -= 32) {
                    // Each lane watches one tile: that its place is free, and its turn come.
                    const int place = at.strip * p.query_tiles + top - lane;
                    bool clear = top - lane < range.x;
                    int2 count = make_int2(0, 0);
                    if (ORDERED && !clear) count = parts(p.row_ptr, p.rows, top - lane, at.tile);
                    int* state = of_head + (long long)(top - lane) * heads;
#pragma unroll 1
                    for (int j = 0; j < 32 && top - j >= range.x; j++) {
                        while (!(__ballot_sync(~0u, clear) >> j & 1))
                            if (!clear)
                                clear = (place < p.places ||
                                         load_acquire(state - (long long)p.places * heads) ==
                                             DONE) &&
                                        (!ORDERED || load_acquire(state) == count.x - count.y);
                        __syncwarp();  // what the lane that watched has seen, lane 0 sees as well
                        const bool start = ORDERED && __shfl_sync(~0u, count.x, j) == 0;
                        if (lane == 0) {
                            fence_global();
                            float* to = p.ring + ((long long)((place - j) % p.places) * heads +
                                                  head) * (BM * D);
#pragma unroll
                            for (int w = 0; w < 2; w++, to += BM * D / 2) {
                                barrier_wait(shared_address(&sh.sum_full[w]), parity);
                                if (start)
                                    store_bytes(to, shared_address(sh.sum[w]), SUM_BYTES / 2);
                                else
                                    add_bytes(to, shared_address(sh.sum[w]), SUM_BYTES / 2);
                            }
                            adds_read<1>();
                            barrier_arrive(shared_address(&sh.sum_empty[0]));
                            adds_read<0>();
                            barrier_arrive(shared_address(&sh.sum_empty[1]));
                            if (ORDERED) {
                                // The tile before has had time to reach memory.
                                if (unsettled) {
                                    adds_done<2>();
                                    count_part(unsettled);
                                }
                                unsettled = state - j * heads;
                            }
                        }
                        parity ^= 1;
                        __syncwarp();
                    }
                }
            }
            if (!ORDERED) {
                // Not for each tile: a fence takes a good part of the time of its products.
                if (lane == 0) {
                    adds_done<0>();
                    fence_global();
                }
                __syncwarp();
                __threadfence();
#pragma unroll 1
                for (int r = first; r < last; r++) {
                    const int4 range = p.columns[r];
#pragma unroll 1
                    for (int tile = range.x + lane; tile < range.y; tile += 32)
                        atomicAdd(of_head + (long long)tile * heads, 1);
                }
            }
        }
        // Not later: other blocks may wait for it while this one waits within its next item.
        if (ORDERED && unsettled) {
            adds_done<0>();
            count_part(unsettled);
        }
        __syncwarp();
    }
}

// Final sums, in the order of the registers that made them, to rows of the result. Blocks take tiles
// in the order in which they become final, whoever has made them so: that spreads the work.
__device__ void convert(const Params& p, Shared& sh, int thread) {
    const int lane = thread % 32, tiles = p.batch * p.query_tiles * p.kv_heads * p.group;
    u32 parity = 0;
#pragma unroll 1
    for (;;) {
        if (thread == 0) {
            int tile, state = DONE;
            while ((tile = atomicAdd(p.next + 1, 1)) < tiles) {
                while ((state = load_acquire(p.state + tile)) < 0) __nanosleep(500);
                if (state != DONE) break;  // else nothing is seen from it
            }
            sh.ready = tile < tiles ? tile : -1;
        }
        __syncwarp();
        asm volatile("bar.sync 2, 64;" ::: "memory");
        const int message = sh.ready;
        if (message < 0) break;
        const int heads = p.side * p.group, place = message / heads;
        const int strip = place / p.query_tiles, strips = p.kv_heads / p.side;
        const int first_row = (place - strip * p.query_tiles) * BM;
        const int batch = strip / strips, head = strip % strips * heads + message % heads;
        float* from =
            p.ring + ((long long)(place % p.places) * heads + message % heads) * (BM * D);
        unsigned short* to =
            (unsigned short*)p.dq + batch * p.dq_strides.batch + head * p.dq_strides.head;
#pragma unroll 1
        for (int part = 0; part < 4; part++, from += PART_BYTES / 4) {
            if (thread == 0) {
                fence_global();
                barrier_expect(shared_address(&sh.part_full), PART_BYTES);
                load_bytes(shared_address(sh.part), from, PART_BYTES,
                           shared_address(&sh.part_full));
            }
            barrier_wait(shared_address(&sh.part_full), parity);
            parity ^= 1;
            // The part holds four blocks of 8 columns, of half the columns or half the rows.
            const int half = part / 2, column = (part % 2 * 4 + lane % 4) * 8;
            unsigned short* rows = to + (D == 128 ? half * 64 : 0) + column;
#pragma unroll 1
            for (int i = 0; i < 4; i++) {
                // Registers of rows 0 to 7, then of rows 8 to 15, of one warp.
                const int source = thread + i / 2 * 64, second = i % 2;
                u32 word[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 x =
                        load_pair(shared_address(&sh.part[j][source]) + second * 8);
                    word[j] = pack(x.x * p.scale, x.y * p.scale);
                }
                const uint4 whole = quad_transposed(word[0], word[1], word[2], word[3], lane);
                const int row = first_row + (D == 64 ? half * 64 : 0) + source / 32 * 16 +
                                second * 8 + lane / 4;
                if (row < p.n) *(uint4*)(rows + row * p.dq_strides.row) = whole;
            }
            if (!ORDERED)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    __stcg((float4*)from + i * 64 + thread, make_float4(0, 0, 0, 0));
            asm volatile("bar.sync 2, 64;" ::: "memory");
        }
        // Zeros are there before the place is given on to bulk additions.
        if (!ORDERED) {
            fence_global();
            __threadfence();
            asm volatile("bar.sync 2, 64;" ::: "memory");
        }
        if (thread == 0) atomicExch(p.state + message, DONE);
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
    attention_backward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap grad,
                       const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                       const __grid_constant__ Params p) {
    // Aligned as the swizzle asks for; the addresses are constants then.
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& sh = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Q_STAGES; i++) {
            barrier_init(shared_address(&sh.q_full[i]), 1);
            barrier_init(shared_address(&sh.q_empty[i]), 8);
        }
        for (int i = 0; i < DO_STAGES; i++) {
            barrier_init(shared_address(&sh.grad_full[i]), 1);
            barrier_init(shared_address(&sh.grad_empty[i]), 8);
        }
        barrier_init(shared_address(&sh.k_full), 1);
        barrier_init(shared_address(&sh.v_full), 1);
        barrier_init(shared_address(&sh.keys_empty), 12);
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&sh.item_full[i]), 1);
            barrier_init(shared_address(&sh.item_empty[i]), 13);  // those who compute, and add up
            barrier_init(shared_address(&sh.ds_full[i]), 8);
            barrier_init(shared_address(&sh.ds_empty[i]), 4);
            barrier_init(shared_address(&sh.sum_full[i]), 4);
            barrier_init(shared_address(&sh.sum_empty[i]), 1);
        }
        barrier_init(shared_address(&sh.part_full), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_shared();
    }
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(SERVER_REGISTERS));
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp == 0) {
            if (lane == 0) load(p, sh, &q, &grad, &k, &v);
        } else if (warp == 1) {
            add_up(p, sh, lane);
        } else {
            convert(p, sh, threadIdx.x - 64);
        }
    } else if (group == 1) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(QUERY_REGISTERS));
        multiply(p, sh);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(KEY_REGISTERS));
        compute(p, sh, __shfl_sync(~0u, group - 2, 0));
    }
}

// delta = sum(out * grad_out) - grad_lse and the LSE in base 2, padded to whole tiles; bounds as a
// first key and a count; counters at their start; zeros where a query tile sees nothing.
extern "C" __global__ void __launch_bounds__(256) attention_backward_prepare(
    const __grid_constant__ Prepare p) {
    constexpr int LANES = D / 8, ROWS = 256 / LANES;  // 16 bytes a lane
    const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const int lane = threadIdx.x % LANES;
    const bool empty = p.row_ptr[tile] == p.row_ptr[tile + 1];
    const unsigned short* out =
        (const unsigned short*)p.out + batch * p.out_strides.batch + head * p.out_strides.head;
    const unsigned short* grad = (const unsigned short*)p.grad_out + batch * p.grad_strides.batch +
                                 head * p.grad_strides.head;
    float* stats =
        p.stats + (((long long)batch * p.heads + head) * p.query_tiles + tile) * (2 * BM);
#pragma unroll
    for (int start = 0; start < BM; start += ROWS) {
        const int within = start + threadIdx.x / LANES, row = tile * BM + within;
        float sum = 0.0f;
        if (row < p.n) {
            const uint4 a = *(const uint4*)(out + row * p.out_strides.row + lane * 8);
            const uint4 b = *(const uint4*)(grad + row * p.grad_strides.row + lane * 8);
            const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = unpack(x[i]), g = unpack(y[i]);
                sum += f.x * g.x + f.y * g.y;
            }
        }
#pragma unroll
        for (int i = LANES / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane == 0) {
            float lse = -INFINITY_F;
            if (row < p.n) {
                lse = p.lse[batch * p.lse_strides.batch + head * p.lse_strides.head +
                            row * p.lse_strides.row];
                if (p.grad_lse)
                    sum -= p.grad_lse[batch * p.grad_lse_strides.batch +
                                      head * p.grad_lse_strides.head +
                                      row * p.grad_lse_strides.row];
            }
            // A row that sees nothing has no weights: exp2(x - inf) is 0.
            const bool blind = lse == -INFINITY_F;
            stats[within] = blind ? INFINITY_F : lse * LOG2E;
            stats[BM + within] = blind ? 0.0f : sum;
        }
        if (empty && row < p.n)
            *(uint4*)((unsigned short*)p.dq + batch * p.dq_strides.batch +
                      head * p.dq_strides.head + row * p.dq_strides.row + lane * 8) =
                make_uint4(0, 0, 0, 0);
    }
    if (head == 0 && batch == 0)
        for (int i = threadIdx.x; i < RANGES * BM; i += 256) {
            const int range = i / BM, row = tile * BM + i % BM;
            int2 bounds = make_int2(0, 0);
            if (row < p.n) {
                const int low = p.low[(long long)range * p.n + row];
                const int high = p.high[(long long)range * p.n + row];
                bounds = make_int2(low, max(0, high - low));
            }
            p.bounds[(long long)range * p.query_tiles * BM + row] = bounds;
        }
    if (threadIdx.x == 0)
        p.state[((batch * (p.heads / p.strip_heads) + head / p.strip_heads) * p.query_tiles + tile) *
                    p.strip_heads +
                head % p.strip_heads] =
            empty ? DONE : -parts(p.row_ptr, p.rows, tile, 0).y;
    if (threadIdx.x < 2 && tile == 0 && head == 0 && batch == 0) p.next[threadIdx.x] = 0;
}
