// What the warps of the Hopper backward share: sizes, parameters, shared memory, work items.

#pragma once

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
constexpr int ROW_BYTES = D * 2;             // of dQ
constexpr int BOUNDS_BYTES = BM * 8;         // of one range
constexpr int PART_BYTES = 4 * 128 * 16;      // of a tile of dQ that is converted at a time
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITY_F __int_as_float(0x7f800000)
// Of a thread of each warpgroup: 512 for one thread of all four.
constexpr int SERVER_REGISTERS = 32, QUERY_REGISTERS = 64, KEY_REGISTERS = 208;
constexpr int WARPS = 8;                     // that compute
// States of a tile of dQ, beside the parts that are due: its place is free again, or it needs
// none.
constexpr int DONE = 1, UNSEEN = 2;

struct Strides {
    long long batch, head, row;
};

// An item: which one (`unpacked`), which query tiles and which of its KV head's query heads. A
// part of a cut item is the `part`-th of `parts`, whose sums meet in a slot; `slot` is -1 for a
// whole one.
struct alignas(16) Work {
    int item, first_tile, last_tile, first_head, last_head, slot, part, parts;
};

struct Params {
    const Work* work;
    float* sums;             // (slots, WARPS, D, 32): dK and dV of the parts so far
    int* turns;              // (slots, WARPS): how many parts that are
    // LSE in base 2 and delta, (2, BM) a tile and query head, lie in the first rows of the tile's
    // dQ, which is not there yet; those of the last tile, that may have too few rows, in
    // `last_stats`.
    const float* last_stats;
    const int2* bounds;      // (RANGES, query tiles * BM): first key, number of keys
    const int* column_ptr;
    const int4* columns;
    const int* row_ptr;
    const int4* rows;
    int* state;              // like the ring, of all tiles: less the parts still due, DONE, UNSEEN
    int* next;               // the next work item, and the next tile of dQ of each queue
    float* ring;             // (places, side * group, BM * D)
    void *dq, *dk, *dv;
    Strides dq_strides, dk_strides, dv_strides;
    int batch, n, m, kv_heads, group, query_tiles, key_tiles, places, side, items, queues;
    float scale;
};

struct Prepare {
    const void *out, *grad_out;
    const float *lse, *grad_lse;
    const int *low, *high;
    float* last_stats;
    int2* bounds;
    const int* row_ptr;
    const int4* rows;
    int* state;
    int* next;
    int* turns;
    void* dq;
    Strides out_strides, grad_strides, lse_strides, grad_lse_strides, dq_strides;
    int batch, heads, n, strip_heads, query_tiles, queues, slots;
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
    u64 k_full, v_full, k_empty, v_empty, item_full[2], item_empty[2];
    u64 ds_full[2], ds_empty[2], sum_full[2], sum_empty[2], part_full;
    int masked[Q_STAGES];
    Work work[2];        // item -1: no more
    int pairs[2];        // of a query tile and a head
    int ready;           // a final tile of dQ, as in `state`; -1: no more
};

static_assert(sizeof(Shared) <= SHARED_BYTES);

// Items run over the key tiles of `side` KV heads at a time: `strip` counts those sets of heads,
// over the batch. A tile of dQ is numbered by strip, query tile and query head within the strip.
struct Item {
    int strip, tile, batch, head;
};

// Which tiles of a range a work item has.
__device__ __forceinline__ int2 within(const Work& work, const int4& range) {
    return make_int2(max(work.first_tile, range.x), min(work.last_tile, range.y));
}

__device__ __forceinline__ Item unpacked(const Params& p, int item) {
    const int beside = item % p.side, rest = item / p.side, strip = rest / p.key_tiles;
    const int strips = p.kv_heads / p.side;
    return {strip, rest % p.key_tiles, strip / strips, strip % strips * p.side + beside};
}

