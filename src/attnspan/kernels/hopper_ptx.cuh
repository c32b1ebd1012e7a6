// Hopper's instructions (sm_90a) as functions: mbarriers, bulk copies, matrix products.
//
// A file that includes this sets IS_BF16 (else halves are IEEE's).

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// PTX ---------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(bar), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 bar, int c, int row,
                                         int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"((u64)map), "r"(bar), "r"(c), "r"(row),
        "r"(head), "r"(batch)
        : "memory");
}

// Into the L2 cache.
__device__ __forceinline__ void prefetch_box(const TensorMap* map, int c, int row, int head,
                                             int batch) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"((u64)map),
                 "r"(c), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

__device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"((u64)from), "r"(bytes), "r"(bar)
        : "memory");
}

__device__ __forceinline__ void store_bytes(void* to, u32 from, u32 bytes) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;" ::"l"((u64)to),
        "r"(from), "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void add_bytes(void* to, u32 from, u32 bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;" ::"l"((u64)to),
        "r"(from), "r"(bytes)
        : "memory");
}

template <int N>
__device__ __forceinline__ void adds_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

template <int N>
__device__ __forceinline__ void adds_done() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void fence_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void fence_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ int load_acquire(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void await(const int* p, int value) {
    while (load_acquire(p) != value) __nanosleep(64);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 x;
#if IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
    return x;
}

__device__ __forceinline__ float2 unpack(u32 x) {
    float2 y;
#if IS_BF16
    y.x = __uint_as_float(x << 16);
    y.y = __uint_as_float(x & 0xffff0000u);
#else
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
#endif
    return y;
}

__device__ __forceinline__ void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// Lane i of a quad holds word i of each of four rows, and gets row i whole; or the reverse.
__device__ __forceinline__ uint4 quad_transposed(u32 a, u32 b, u32 c, u32 d, int lane) {
    bool odd = lane & 1, upper = lane & 2;
    u32 x = __shfl_xor_sync(~0u, odd ? a : b, 1), y = __shfl_xor_sync(~0u, odd ? c : d, 1);
    u32 a2 = odd ? x : a, b2 = odd ? b : x, c2 = odd ? y : c, d2 = odd ? d : y;
    u32 z = __shfl_xor_sync(~0u, upper ? a2 : c2, 2), t = __shfl_xor_sync(~0u, upper ? b2 : d2, 2);
    return upper ? make_uint4(z, t, c2, d2) : make_uint4(a2, b2, z, t);
}

__device__ __forceinline__ float2 load_pair(u32 from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
}

__device__ __forceinline__ int4 load_four(u32 from) {
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from));
    return x;
}

__device__ __forceinline__ void store_four(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c),
                 "f"(d)
                 : "memory");
}

// Products ----------------------------------------------------------------------------------------
// Operands lie in boxes of 64 columns, 128 bytes a row, in the 128-byte swizzle; 8 rows are 1024
// bytes. `along` are descriptors of an operand whose rows run over M or N (its columns over the
// summed index), `across` of one whose rows run over the summed index; there `box` is the distance
// of the next 64 columns.

// Of a descriptor's 64 bits the upper half is the same for all: this swizzle, and 1024 bytes from 8
// rows to the next. In the lower half, offsets are added in units of 16 bytes.

constexpr u32 UPPER = (1u << 30) | 64;

__device__ __forceinline__ u32 along(u32 address) {
    return (address >> 4) | (1u << 16);
}

__device__ __forceinline__ u32 across(u32 address, u32 box) {
    return (address >> 4) | (box >> 4 << 16);
}

template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#if IS_BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif
#define D8(io, x, i)                                                                       \
    io(x[i]), io(x[i + 1]), io(x[i + 2]), io(x[i + 3]), io(x[i + 4]), io(x[i + 5]), io(x[i + 6]), \
        io(x[i + 7])
#define D32(io, x) D8(io, x, 0), D8(io, x, 8), D8(io, x, 16), D8(io, x, 24)
#define D64(io, x) D32(io, x), D8(io, x, 32), D8(io, x, 40), D8(io, x, 48), D8(io, x, 56)
#define R32                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define R64                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
    "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// d = A B or d += A B with both operands in shared memory. A sum that starts is an output alone:
// were it read too, its registers would stay occupied from its last use on.
template <bool ADD, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void product(float (&d)[32], u32 a, u32 b) {
    if constexpr (ADD)
        asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%32, %34};\nmov.b64 b, {%33, %34};\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16." KIND " " R32
                     ", a, b, 1, 1, 1, %35, %36;\n}"
                     : D32("+f", d)
                     : "r"(a), "r"(b), "n"(UPPER), "n"(TRANS_A), "n"(TRANS_B));
    else
        asm volatile("{\n.reg .pred none;\n.reg .b64 a, b;\nsetp.ne.b32 none, 0, 0;\n"
                     "mov.b64 a, {%32, %34};\nmov.b64 b, {%33, %34};\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16." KIND " " R32
                     ", a, b, none, 1, 1, %35, %36;\n}"
                     : D32("=f", d)
                     : "r"(a), "r"(b), "n"(UPPER), "n"(TRANS_A), "n"(TRANS_B));
}

template <bool ADD, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void product(float (&d)[64], u32 a, u32 b) {
    if constexpr (ADD)
        asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%64, %66};\nmov.b64 b, {%65, %66};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16." KIND " " R64
                     ", a, b, 1, 1, 1, %67, %68;\n}"
                     : D64("+f", d)
                     : "r"(a), "r"(b), "n"(UPPER), "n"(TRANS_A), "n"(TRANS_B));
    else
        asm volatile("{\n.reg .pred none;\n.reg .b64 a, b;\nsetp.ne.b32 none, 0, 0;\n"
                     "mov.b64 a, {%64, %66};\nmov.b64 b, {%65, %66};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16." KIND " " R64
                     ", a, b, none, 1, 1, %67, %68;\n}"
                     : D64("=f", d)
                     : "r"(a), "r"(b), "n"(UPPER), "n"(TRANS_A), "n"(TRANS_B));
}

// d += A B with A in registers, B's rows over the summed index.
__device__ __forceinline__ void product(float (&d)[32], const u32* a, u32 b) {
    asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%36, %37};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16." KIND " " R32
                 ", {%32, %33, %34, %35}, b, 1, 1, 1, 1;\n}"
                 : D32("+f", d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(UPPER));
}

__device__ __forceinline__ void product(float (&d)[64], const u32* a, u32 b) {
    asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%68, %69};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." KIND " " R64
                 ", {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"
                 : D64("+f", d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(UPPER));
}
