// The small vocabulary of the CUDA kernels: launches that are checked, vector loads, block and warp sums.
// With PYPRUNE_SIM the same text runs on the CPU (tests/cuda_sim/cusim.h); nothing else in csrc/cuda knows about it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef PYPRUNE_SIM
#include "cusim.h"
#define PYPRUNE_SHARED(T, name) T* name = reinterpret_cast<T*>(cusim::S.shared.get())
#else
#include <cuda_runtime.h>
#define PYPRUNE_SHARED(T, name)                             \
    extern __shared__ __align__(16) unsigned char shared_pool[]; \
    T* name = reinterpret_cast<T*>(shared_pool)
#endif

#include "common.h"

namespace pyprune::cuda {

constexpr unsigned FULL = 0xffffffffu;  // every kernel keeps whole warps together
constexpr int WARP = 32;

struct Size {
    const char* name;
    int64_t value;
};

// The calls of one op: its name, sizes and stream are said once; each launch is followed by its error check.
// Asynchronous: an error of an earlier kernel can surface here, as with every CUDA call.
struct Launcher {
    const char* op;
    Size sizes[6];
    cudaStream_t stream;

    std::string where() const {
        std::string text = std::string(op) + " on the cuda back-end (";
        for (const Size& s : sizes)
            if (s.name)
                text += (text.back() == '(' ? "" : ", ") + std::string(s.name) + " = " + std::to_string(s.value);
        return text + "): ";
    }

    [[noreturn]] void refuse(const std::string& why) const { throw std::invalid_argument(where() + why); }

    void check(cudaError_t status) const {
        if (status != cudaSuccess) throw std::runtime_error(where() + cudaGetErrorString(status));
    }

    template <class... Parameters, class... Arguments>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                    Arguments... arguments) const {
        if (blocks == 0) return;
        if (blocks > 0x7fffffff) refuse("more than 2^31 - 1 thread blocks");
        const dim3 grid(static_cast<unsigned>(blocks)), block(threads);
#ifdef PYPRUNE_SIM
        cusim::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#else
        kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
        check(cudaGetLastError());
#endif
    }
};

// Calls body with a value of the element type that `dtype` names.
template <class Body>
void with_dtype(const Launcher& launch, int dtype, Body body) {
    if (dtype == FLOAT32) return body(float{});
    if (dtype == BFLOAT16) return body(bf16{});
    if (dtype == FLOAT16) return body(f16{});
    launch.refuse("unknown element type " + std::to_string(dtype));
}

// Whether vectors of `bytes` may be read at p and at every multiple of `stride` bytes from it.
inline bool aligned(const void* p, int64_t stride, int bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride % bytes == 0;
}

template <int BYTES>
struct Word;
template <>
struct Word<2> {
    using type = uint16_t;
};
template <>
struct Word<4> {
    using type = uint32_t;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

// N elements from p: one access when `whole` (aligned and all inside), else the first `count`, the rest zero.
template <int N, class T>
__device__ __forceinline__ void load(T (&to)[N], const T* p, int count, bool whole) {
    if (whole && count >= N) {
        const auto word = *reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(p);
        memcpy(to, &word, sizeof to);
    } else {
        PYPRUNE_UNROLL
        for (int i = 0; i < N; ++i) to[i] = i < count ? p[i] : T{};
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const T (&from)[N], int count, bool whole) {
    if (whole && count >= N) {
        typename Word<N * sizeof(T)>::type word;
        memcpy(&word, from, sizeof word);
        *reinterpret_cast<typename Word<N * sizeof(T)>::type*>(p) = word;
    } else {
        PYPRUNE_UNROLL
        for (int i = 0; i < N; ++i)
            if (i < count) p[i] = from[i];
    }
}

#ifdef PYPRUNE_SIM
using cusim::close_copies;
using cusim::copy_async;
using cusim::wait_for_copies;
using cusim::wait_for_copies_but;
#else
// BYTES (4, 8 or 16, both sides aligned to it) from global to shared memory without a register or a wait; only the first
// `inside` of them are read, if any, the rest become zero. cp.async, compute capability 8.0.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, int inside) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if (BYTES == 16)  // past the first-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(inside), "n"(BYTES)
                     : "memory");
}

// The calling thread's own copies have arrived; those of others have after a barrier behind their wait.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The copies that the calling thread has started since the last call are a group; all groups but the latest GROUPS
// have arrived.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#endif

// Exclusive prefix sum over the block and its total; `scratch` holds one word per warp and one more.
__device__ inline uint32_t block_prefix(uint32_t v, uint32_t* scratch, uint32_t* total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    uint32_t sum = v;
    PYPRUNE_UNROLL
    for (int d = 1; d < WARP; d *= 2) {
        const uint32_t below = __shfl_up_sync(FULL, sum, d, WARP);
        if (lane >= d) sum += below;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (int i = 0; i < warps; ++i) {
        if (i == warp) before = all;
        all += scratch[i];
    }
    __syncthreads();  // scratch may be used again
    *total = all;
    return before + sum - v;
}

}  // namespace pyprune::cuda
