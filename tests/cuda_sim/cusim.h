// cusim.h: runs a CUDA C++ kernel on the CPU, for tests on a machine without a GPU or a driver.
//
// Every CUDA thread of a block is a fiber (ucontext); barriers, shuffles and ballots are the points where it yields.
// Blocks run one after another. Included by csrc/cuda/device.cuh when PYPRUNE_SIM is defined:
//
//     g++ -std=c++17 -O1 -DPYPRUNE_SIM -Icsrc -Itests -x c++ csrc/cuda/obs_sweep.cu …
//
// What it finds, beside wrong results:
//   - a missing barrier: CUSIM_ORDER=1 and 2 run one warp as far as it can go before the next (first to last, last to
//     first, blocks too), so a warp that should have waited reads what the others have not written yet. CUSIM_ORDER=0,
//     round robin over threads, hides this and finds the opposite: reliance on a warp being ahead;
//   - reads of unwritten memory: shared memory starts as NaN in every block;
//   - reads of what an asynchronous copy has not brought yet: it happens when its thread waits for it; and, in order 2,
//     where it happens at once, of what it has overwritten too early;
//   - threads waiting at different barriers, shuffles without the whole warp, and deadlocks: std::runtime_error;
//   - accesses out of bounds, in shared memory too (its allocation is exact), under -fsanitize=address, with the line.
//
// Tensor core products (mma m16n8k16) are emulated by their layout, not by their rounding.
//
// What it cannot show: TMA, memory ordering between running blocks, and speed. Shared
// memory is the dynamic one only (static __shared__ is left undefined, and so does not compile).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define CUSIM_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define CUSIM_UNPOISON(p, n) (void)0
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

namespace cusim {

constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10;

// A barrier is a count of arrivals and a generation; a fiber waits until the generation moves on.
struct Barrier {
    int arrived = 0, line = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t context;
    dim3 index;
    int number = 0, shuffles = 0;
    size_t votes = 0;
    std::vector<std::pair<int, std::function<void()>>> copies;  // under way, with their group
    int group = 0;
    bool done = false;
    const uint64_t* waits_for = nullptr;
    uint64_t seen = 0;
    bool ready() const { return !done && (waits_for == nullptr || *waits_for != seen); }
};

struct State {
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block
    int current = 0;
    dim3 grid, block, index;
    std::unique_ptr<char[]> shared;
    std::vector<uint64_t> slots;  // two words per thread: what it shows to its warp, alternating
    Barrier block_barrier;
    std::vector<int> votes;
    std::vector<Barrier> warp_barriers;
    std::function<void()> body;
    std::string error;
};
inline State S;

inline Fiber& self() { return S.fibers[S.current]; }

inline void yield() { swapcontext(&self().context, &S.scheduler); }

// Ends the launch with an error. The fiber is left where it is and never resumed: exceptions do not cross contexts.
inline void fail(const std::string& what) {
    S.error = what + " (block " + std::to_string(S.index.x) + ", thread " + std::to_string(S.current) + ")";
    for (;;) yield();
}

inline void wait(Barrier& barrier, int members, int line, const char* what) {
    if (barrier.arrived == 0) barrier.line = line;
    if (barrier.line != line)
        fail(std::string("cusim: divergent ") + what + ": lines " + std::to_string(barrier.line) + " and " +
             std::to_string(line));
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    Fiber& fiber = self();
    fiber.waits_for = &barrier.generation;
    fiber.seen = barrier.generation;
    yield();
    fiber.waits_for = nullptr;
}

inline void block_barrier(int line) { wait(S.block_barrier, int(S.fibers.size()), line, "__syncthreads"); }

// Whether any thread of the block came with a value that is not zero.
inline int block_or(int value, int line) {
    const size_t turn = self().votes++;
    if (S.votes.size() <= turn) S.votes.resize(turn + 1);
    S.votes[turn] |= value != 0;
    block_barrier(line);
    return S.votes[turn];
}

inline int order() {
    const char* text = getenv("CUSIM_ORDER");
    return text ? atoi(text) : 0;
}

// An asynchronous copy happens as late as it may, when its thread waits: who reads before finds the NaN of shared memory.
// In order 2 it happens at once: who still reads what it overwrites finds the new.
template <int BYTES>
void copy_async(void* to, const void* from, int inside) {
    if (uintptr_t(to) % BYTES || uintptr_t(from) % BYTES) fail("cusim: an asynchronous copy is not aligned");
    if (inside < 0 || inside > BYTES) fail("cusim: an asynchronous copy of " + std::to_string(inside) + " bytes");
    const auto copy = [=] {
        memset(to, 0, BYTES);
        memcpy(to, from, inside);
    };
    if (order() == 2) return copy();
    self().copies.emplace_back(self().group, copy);
}

inline void close_copies() { self().group++; }

inline void wait_until(int group) {
    auto& copies = self().copies;
    while (!copies.empty() && copies.front().first <= group) {
        copies.front().second();
        copies.erase(copies.begin());
    }
}

inline void wait_for_copies() { wait_until(self().group); }

template <int GROUPS>
void wait_for_copies_but() {
    wait_until(self().group - 1 - GROUPS);
}

inline void warp_barrier(unsigned mask, int line) {
    if (mask != 0xffffffffu) fail("cusim: only the full warp mask is simulated, line " + std::to_string(line));
    wait(S.warp_barriers[self().number / WARP], WARP, line, "warp operation");
}

// Shows v to the warp and returns the warp's 32 words. Two sets of slots alternate, so one barrier is enough: nobody
// can write a set again before everybody has arrived at the exchange after it.
template <class T>
const uint64_t* exchange(T v, unsigned mask, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Fiber& fiber = self();
    const int set = fiber.shuffles++ & 1, first = fiber.number / WARP * WARP;
    uint64_t* slots = S.slots.data() + set * S.fibers.size();
    memcpy(&slots[fiber.number], &v, sizeof v);
    warp_barrier(mask, line);
    return slots + first;
}

template <class T>
T shuffle(T v, int source, int width, unsigned mask, int line) {
    const int lane = self().number % WARP;
    const uint64_t* words = exchange(v, mask, line);
    T r;
    memcpy(&r, &words[lane / width * width + (source & (width - 1))], sizeof r);
    return r;
}

// xor, up, down: outside the segment a lane reads its own value.
template <class T>
T shuffle_to(T v, int target, int width, unsigned mask, int line) {
    const int lane = self().number % WARP;
    const bool inside = target >= 0 && target < WARP && target / width == lane / width;
    return shuffle(v, inside ? target : lane, width, mask, line);
}

inline int lane() { return self().number % WARP; }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> 4 * i & 15;
        const uint32_t byte = uint32_t(bytes >> 8 * (nibble & 7)) & 0xff;
        out |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return out;
}

inline uint32_t shift_bits(uint32_t low, uint32_t high, uint32_t by) {
    return uint32_t((uint64_t(high) << 32 | low) >> (by < 32 ? by : 32));
}

inline uint32_t shift_bytes(uint32_t low, uint32_t high, uint32_t by) { return shift_bits(low, high, 8 * by % 32); }

// The product of a warp: every lane shows its part of a and b, then computes its own four sums.
template <class Value>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    uint64_t shown[3][WARP];
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    for (int i = 0; i < 3; ++i)
        memcpy(shown[i], exchange(uint64_t(mine[2 * i + 1]) << 32 | mine[2 * i], 0xffffffffu, __LINE__), sizeof shown[i]);
    const auto number = [&](int part, int of, int column) {
        const uint64_t pairs = shown[part / 2][of] >> 32 * (part % 2);
        return value(uint16_t(pairs >> 16 * (column % 2)));
    };
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
            d[i] += number(k / 8 * 2 + i / 2, row * 4 + k % 8 / 2, k) *
                    number(4 + k / 8, (column + i % 2) * 4 + k % 8 / 2, k);
}

inline void run(int i) {
    if (!S.fibers[i].ready()) return;
    S.current = i;
    swapcontext(&S.scheduler, &S.fibers[i].context);
    if (!S.error.empty()) throw std::runtime_error(S.error);
}

inline void entry() {
    S.body();
    if (!self().copies.empty()) fail("cusim: a thread has ended before the copies it started");
    self().done = true;
    for (;;) yield();
}

inline void start_block(int threads, size_t shared_bytes) {
    S.error.clear();
    S.shared.reset(new char[shared_bytes]);
    memset(S.shared.get(), 0xff, shared_bytes);  // NaN
    S.slots.assign(2 * threads, 0);
    S.block_barrier = {};
    S.votes.clear();
    S.warp_barriers.assign(threads / WARP, {});
    S.fibers.clear();
    S.fibers.resize(threads);
    while (int(S.stacks.size()) < threads) S.stacks.emplace_back(new char[STACK]);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = S.fibers[i];
        CUSIM_UNPOISON(S.stacks[i].get(), STACK);
        fiber.number = i;
        fiber.index = dim3(i % S.block.x, i / S.block.x % S.block.y, i / (S.block.x * S.block.y));
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = S.stacks[i].get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &S.scheduler;
        makecontext(&fiber.context, entry, 0);
    }
}

inline void finish_block() {
    const int threads = int(S.fibers.size()), how = order();
    for (;;) {
        bool moved = false;
        const auto step = [&](int i) {
            moved |= S.fibers[i].ready();
            run(i);
        };
        if (how == 0) {
            for (int i = 0; i < threads; ++i) step(i);
        } else {
            for (int k = 0; k < threads / WARP; ++k) {
                const int first = (how == 1 ? k : threads / WARP - 1 - k) * WARP;
                const auto ready = [&] {
                    return std::any_of(&S.fibers[first], &S.fibers[first] + WARP, [](auto& f) { return f.ready(); });
                };
                while (ready())
                    for (int j = 0; j < WARP; ++j) step(how == 1 ? first + j : first + WARP - 1 - j);
            }
        }
        if (!moved) break;
    }
    for (const Fiber& fiber : S.fibers)
        if (!fiber.done)
            throw std::runtime_error("cusim: deadlock: thread " + std::to_string(fiber.number) + " of block " +
                                     std::to_string(S.index.x) + " waits for threads that have ended or never come");
}

template <class Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Body body) {
    const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || threads % WARP) throw std::runtime_error("cusim: block size");
    if (blocks == 0) throw std::runtime_error("cusim: empty grid");
    S.grid = grid;
    S.block = block;
    S.body = body;
    for (unsigned b = 0; b < blocks; ++b) {
        const unsigned i = order() == 2 ? blocks - 1 - b : b;
        S.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
        start_block(int(threads), shared_bytes);
        finish_block();
    }
    S.shared.reset();
}

}  // namespace cusim

#define threadIdx (cusim::self().index)
#define blockIdx (cusim::S.index)
#define blockDim (cusim::S.block)
#define gridDim (cusim::S.grid)
#define __syncthreads() cusim::block_barrier(__LINE__)
#define __syncthreads_or(value) cusim::block_or(value, __LINE__)
#define __syncwarp() cusim::warp_barrier(0xffffffffu, __LINE__)
#define __shfl_sync(mask, v, source, width) cusim::shuffle(v, source, width, mask, __LINE__)
#define __shfl_xor_sync(mask, v, bits, width) cusim::shuffle_to(v, cusim::lane() ^ (bits), width, mask, __LINE__)
#define __shfl_up_sync(mask, v, n, width) cusim::shuffle_to(v, cusim::lane() - (n), width, mask, __LINE__)
#define __threadfence() (void)0

template <class T>
T atomicAdd(T* p, T v) {
    const T old = *p;
    *p = old + v;
    return old;
}
template <class T>
T atomicOr(T* p, T v) {
    const T old = *p;
    *p = old | v;
    return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorSystemDriverMismatch = 803 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorSystemDriverMismatch ? "system has unsupported display driver / cuda driver combination"
                                                   : "no error";
}

// The machine, by CUSIM_DRIVER (the CUDA version of the driver; 0 for none), CUSIM_DEVICES and CUSIM_STATUS, the code
// that counting devices returns.
namespace cusim {
inline int machine(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}
}  // namespace cusim
constexpr int CUSIM_TOOLKIT = 13000;
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUSIM_TOOLKIT;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = cusim::machine("CUSIM_DRIVER", CUSIM_TOOLKIT);
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = cusim::machine("CUSIM_DEVICES", 1);
    if (cusim::machine("CUSIM_DRIVER", CUSIM_TOOLKIT) / 1000 < CUSIM_TOOLKIT / 1000) return cudaErrorInsufficientDriver;
    return cudaError_t(cusim::machine("CUSIM_STATUS", cudaSuccess));
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}
