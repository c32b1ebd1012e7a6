// The warpgroup of the Hopper backward that serves the others: one thread loads, one warp adds up
// dQ, two turn its final rows into the result.

#pragma once

#include "hopper_backward.cuh"

__device__ __forceinline__ void load_stats(const Params& p, u32 to, int batch, int head, int tile,
                                           u32 full) {
    const bool last = tile == p.query_tiles - 1;
    const void* from = (const unsigned short*)p.dq + batch * p.dq_strides.batch +
                       head * p.dq_strides.head + tile * BM * p.dq_strides.row;
    if (last)
        from = p.last_stats + ((long long)batch * p.kv_heads * p.group + head) * (2 * BM);
    if (last || p.dq_strides.row == D) {
        load_bytes(to, from, STATS_BYTES, full);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < STATS_BYTES; i += ROW_BYTES) {
        load_bytes(to + i, from, ROW_BYTES, full);
        from = (const unsigned short*)from + p.dq_strides.row;
    }
}

__device__ void load(const Params& p, Shared& sh, const TensorMap* q, const TensorMap* grad,
                     const TensorMap* k, const TensorMap* v) {
    int it = 0;
    u32 slot = 0, item_parity = 0, keys_parity = 0;
    for (;;) {
        const int index = atomicAdd(p.next, 1);
        const bool over = index >= p.items;
        barrier_wait(shared_address(&sh.item_empty[slot]), item_parity ^ 1);
        Work& work = sh.work[slot];
        work = p.work[over ? 0 : index];
        const Item at = unpacked(p, work.item);
        const int first = p.column_ptr[at.tile], last = p.column_ptr[at.tile + 1];
        int count = 0;
#pragma unroll 1
        for (int r = first; r < last; r++) {
            const int2 range = within(work, p.columns[r]);
            count += max(0, range.y - range.x);
        }
        count *= work.last_head - work.first_head;
        if (over) work.item = -1;
        sh.pairs[slot] = count;
        barrier_arrive(shared_address(&sh.item_full[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (over) break;
        if (count == 0) continue;
        // The values, and then the first queries, come while the item before is at its last
        // products; the keys must wait for its last dQ, and do so in the L2.
        const u32 k_full = shared_address(&sh.k_full), v_full = shared_address(&sh.v_full);
#pragma unroll 1
        for (int c = 0; c < D; c += BOX) prefetch_box(k, c, at.tile * BN, at.head, at.batch);
        barrier_wait(shared_address(&sh.v_empty), keys_parity ^ 1);
        barrier_expect(v_full, KEYS_BYTES);
#pragma unroll 1
        for (int c = 0; c < D; c += BOX)
            load_box(shared_address(sh.v) + c * BN * 2, v, v_full, c, at.tile * BN, at.head,
                     at.batch);
        bool keys_due = true;
        // Heads outside, query tiles inside: what neighbouring items load and add is near in time
        // then, and stays in the L2 cache.
#pragma unroll 1
        for (int g = work.first_head; g < work.last_head; g++) {
            const int head = at.head * p.group + g;
#pragma unroll 1
            for (int r = last - 1; r >= first; r--) {
                const int4 range = p.columns[r];
                const int2 mine = within(work, range);
#pragma unroll 1
                for (int tile = mine.y - 1; tile >= mine.x; tile--, it++) {
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
                    load_stats(p, shared_address(sh.stats[qs]), at.batch, head, tile, full);
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
                    if (keys_due) {
                        barrier_wait(shared_address(&sh.k_empty), keys_parity ^ 1);
                        barrier_expect(k_full, KEYS_BYTES);
#pragma unroll 1
                        for (int c = 0; c < D; c += BOX)
                            load_box(shared_address(sh.k) + c * BN * 2, k, k_full, c,
                                     at.tile * BN, at.head, at.batch);
                        keys_parity ^= 1;
                        keys_due = false;
                    }
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
        const Work& work = sh.work[slot];
        if (work.item < 0) break;
        const Item at = unpacked(p, work.item);
        int* unsettled = nullptr;
        const int first = p.column_ptr[at.tile], last = p.column_ptr[at.tile + 1];
#pragma unroll 1
        for (int g = work.first_head; g < work.last_head; g++) {
            const int head = at.head % p.side * p.group + g;
            int* of_head = p.state + (long long)at.strip * p.query_tiles * heads + head;
#pragma unroll 1
            for (int r = last - 1; r >= first; r--) {
                const int2 range = within(work, p.columns[r]);
#pragma unroll 1
                for (int top = range.y - 1; top >= range.x; top -= 32) {
                    // Each lane watches one tile: that its place is free, and its turn come.
                    const int place = at.strip * p.query_tiles + top - lane;
                    int before = place - p.places;  // who had the place, if it needed one
                    bool clear = top - lane < range.x;
                    int2 count = make_int2(0, 0);
                    if (ORDERED && !clear) count = parts(p.row_ptr, p.rows, top - lane, at.tile);
                    int* state = of_head + (long long)(top - lane) * heads;
#pragma unroll 1
                    for (int j = 0; j < 32 && top - j >= range.x; j++) {
                        while (!(__ballot_sync(~0u, clear) >> j & 1))
                            if (!clear) {
                                const int was =
                                    before < 0 ? DONE
                                               : load_acquire(p.state + (long long)before * heads +
                                                              head);
                                if (was == UNSEEN) before -= p.places;
                                clear = was == DONE &&
                                        (!ORDERED || load_acquire(state) == count.x - count.y);
                            }
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
                    const int2 range = within(work, p.columns[r]);
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
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
    }
}

// Final sums, in the order of the registers that made them, to rows of the result. Blocks take
// tiles in the order in which they become final, whoever has made them so: that spreads the work.
// An item is through with its first head long before its last, so heads have queues of their own.
__device__ void convert(const Params& p, Shared& sh, int thread) {
    const int lane = thread % 32, heads = p.side * p.group, strips = p.kv_heads / p.side;
    const int queue = blockIdx.x % p.queues, of_queue = heads / p.queues;
    const int tiles = p.batch * strips * p.query_tiles * of_queue;
    u32 parity = 0;
#pragma unroll 1
    for (;;) {
        if (thread == 0) {
            int turn, tile = -1, state;
            while ((turn = atomicAdd(p.next + 1 + queue, 1)) < tiles) {
                tile = turn / of_queue * heads + turn % of_queue * p.queues + queue;
                while ((state = load_acquire(p.state + tile)) < 0) __nanosleep(500);
                if (state != UNSEEN) break;
            }
            sh.ready = turn < tiles ? tile : -1;
        }
        __syncwarp();
        asm volatile("bar.sync 2, 64;" ::: "memory");
        const int message = sh.ready;
        if (message < 0) break;
        const int place = message / heads, strip = place / p.query_tiles;
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
