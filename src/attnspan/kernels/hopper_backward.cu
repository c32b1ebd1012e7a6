// Backward of windowed and sparse attention on Hopper (sm_90a), compiled at run time by NVRTC.
//
// A work item is one tile of 128 keys of one KV head. It keeps K and V in shared memory and the
// sums of dK and dV in registers, and meets the query tiles that see it, of all the query heads of
// its KV head. For each: S^T = K Q^T and dP^T = V dO^T, so that P^T comes out of the registers as
// an operand of dV += P^T dO; dS goes through shared memory for dK += dS^T Q and for dQ = dS K,
// whose parts are added up in global memory by bulk reductions. Where few keys are seen by all
// queries, and where the work ends, an item is cut by queries and heads, so that nobody waits for
// a long one; the sums of its parts are added in one order.
//
// Two warpgroups compute, 64 keys each. A third makes dQ of what they leave, so that they need not
// wait for each other. Of a fourth, one thread loads, one warp adds up dQ, and two turn final rows
// of dQ into the result. Those fp32 sums lie in a ring of tiles that is only as long as the keys
// in flight and their windows need: items are taken in rising order, so the sums of a tile are
// final once the items that see it are done, and its place is free again. Parts are counted when
// an item is through with a head; in an order, each one before the next is added.
//
// Set by the compiler's options: HEAD_DIM 64 or 128, IS_BF16, RANGES (of keys a query sees),
// ORDERED (parts of dQ are added in one order), SHARED_BYTES.

#include "hopper_backward_serve.cuh"

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

__device__ __forceinline__ float4* moved(float4* at, float (&x)[NO], bool add, bool put) {
#pragma unroll
    for (int i = 0; i < NO; i += 4, at += 32) {
        if (add) {
            const float4 y = __ldcg(at);
            x[i] += y.x, x[i + 1] += y.y, x[i + 2] += y.z, x[i + 3] += y.w;
        }
        if (put) __stcg(at, make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    }
    return at;
}

// Adds the sums of the parts before this one, in their order, so that repeats are equal. Whether
// that is all of them; else they are left to the next part. Warps hold the same rows in all parts,
// and each meets its like alone. Earlier parts are earlier items: somebody is at work on them.
__device__ __forceinline__ bool joined(float (&dk)[NO], float (&dv)[NO], const Params& p,
                                       const Work& work, int warp, int lane) {
    const long long row = (long long)work.slot * WARPS + warp;
    int* turn = p.turns + row;
    float4* sums = (float4*)p.sums + row * (D / 4 * 32) + lane;
    const bool last = work.part == work.parts - 1;
    if (work.part > 0) {
        while (load_acquire(turn) != work.part) __nanosleep(200);
        moved(moved(sums, dk, true, false), dv, true, false);
    }
    if (!last) {
        moved(moved(sums, dk, false, true), dv, false, true);
        __threadfence();
        __syncwarp();
        if (lane == 0) atomicExch(turn, work.part + 1);
    }
    return last;
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
        const int item = __shfl_sync(~0u, sh.work[slot].item, 0);
        const int end = it + __shfl_sync(~0u, sh.pairs[slot], 0);
        if (item < 0) break;
        const Item at = unpacked(p, item);
        const int key = at.tile * BN + w * 64 + warp * 16 + lane / 4;
        float dk[NO], dv[NO];
#pragma unroll
        for (int i = 0; i < NO; i++) dk[i] = dv[i] = 0.0f;
        if (it < end) {
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
            if (lane == 0) barrier_arrive(shared_address(&sh.v_empty));
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
                barrier_arrive(shared_address(&sh.k_empty));
            }
            it++;
            keys_parity ^= 1;
        }
        const Work& work = sh.work[slot];
        if (work.slot < 0 || joined(dk, dv, p, work, w * 4 + warp, lane)) {
            store_keys(dk, p.dk, p.dk_strides, at, key, p.m, p.scale, lane);
            store_keys(dv, p.dv, p.dv_strides, at, key, p.m, 1.0f, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
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
        const int item = __shfl_sync(~0u, sh.work[slot].item, 0);
        const int end = it + __shfl_sync(~0u, sh.pairs[slot], 0);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&sh.item_empty[slot]));
        slot ^= 1;
        item_parity ^= slot == 0;
        if (item < 0) break;
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
                    if (it == end - 1) barrier_arrive(shared_address(&sh.k_empty));
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
        barrier_init(shared_address(&sh.k_empty), 12);  // those who compute, and make dQ
        barrier_init(shared_address(&sh.v_empty), 8);
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
    const bool last = tile == p.query_tiles - 1;
    float* stats = p.last_stats + ((long long)batch * p.heads + head) * (2 * BM);
    unsigned short* dq = (unsigned short*)p.dq + batch * p.dq_strides.batch +
                         head * p.dq_strides.head + (long long)tile * BM * p.dq_strides.row;
    // Number i of the statistics.
    const auto put = [&](int i, float x) {
        float* row = last ? stats : (float*)(dq + i * 4 / ROW_BYTES * p.dq_strides.row);
        row[last ? i : i % (ROW_BYTES / 4)] = x;
    };
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
            if (!empty) {
                put(within, blind ? INFINITY_F : lse * LOG2E);
                put(BM + within, blind ? 0.0f : sum);
            }
        }
        if (empty && row < p.n)
            *(uint4*)(dq + within * p.dq_strides.row + lane * 8) = make_uint4(0, 0, 0, 0);
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
            empty ? UNSEEN : -parts(p.row_ptr, p.rows, tile, 0).y;
    if (tile == 0 && head == 0 && batch == 0) {
        for (int i = threadIdx.x; i <= p.queues; i += 256) p.next[i] = 0;
        for (int i = threadIdx.x; i < p.slots * WARPS; i += 256) p.turns[i] = 0;
    }
}
