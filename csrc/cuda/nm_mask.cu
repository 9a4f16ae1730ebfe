// N:M mask of |w|·scale and, in the same pass, zeroing. A thread takes whole groups and ranks them in registers.
//
// Bytes: read w, write the mask and (apply) w: 5 per bfloat16 weight, nothing else; the bound is DRAM. Accesses are
// 16 bytes for M = 2, 4, 8, 16; any other M up to 16 takes one thread per group and scalar accesses.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256, LARGEST_M = 16;

template <class T>
struct NM {
    T* w;
    const float* scale;
    uint8_t* keep;
    int* fault;
    int64_t stride, units;  // units: pieces of one thread
    int columns, units_a_row, n, m;
    bool apply, whole;
};

// M = 0: a group of a.m ≤ 16 columns per thread. Else groups of M, as many as fill one 16-byte access.
template <class T, int M>
__global__ void __launch_bounds__(THREADS) nm_mask_kernel(const NM<T> a) {
    constexpr int VECTOR = 16 / sizeof(T);
    constexpr int HELD = M == 0 ? LARGEST_M : M > VECTOR ? M : VECTOR, GROUP = M == 0 ? LARGEST_M : M;
    const int64_t unit = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (unit >= a.units) return;
    const int64_t row = unit / a.units_a_row;
    const int m = M == 0 ? a.m : M, step = M == 0 ? m : HELD, column = int(unit % a.units_a_row) * step;
    const int count = M == 0 ? m : min(HELD, a.columns - column);
    T* w = a.w + row * a.stride + column;

    T held[HELD];
    uint32_t key[HELD];
    PYPRUNE_UNROLL
    for (int i = 0; i < HELD; i += VECTOR) {
        T part[VECTOR];
        load(part, w + i, count - i, M > 0 && a.whole);
        PYPRUNE_UNROLL
        for (int t = 0; t < VECTOR; ++t) held[i + t] = part[t];
    }
    bool bad = false;
    PYPRUNE_UNROLL
    for (int i = 0; i < HELD; i += 4) {
        float scale[4] = {1.f, 1.f, 1.f, 1.f};
        if (a.scale != nullptr) load(scale, a.scale + column + i, count - i, M > 0 && a.whole);
        PYPRUNE_UNROLL
        for (int t = 0; t < 4; ++t) key[i + t] = score_key(to_float(held[i + t]), scale[t]);
    }

    uint8_t kept[HELD];
    PYPRUNE_UNROLL
    for (int g = 0; g < HELD; g += GROUP) {
        uint32_t group[GROUP], nan = 0;
        PYPRUNE_UNROLL
        for (int i = 0; i < GROUP; ++i) {
            group[i] = key[g + i];
            nan |= i < m && group[i] > INFINITE_KEY;
        }
        const uint32_t chosen = nan ? FULL : keep_largest<GROUP>(group, m, a.n);
        bad |= nan != 0;
        PYPRUNE_UNROLL
        for (int i = 0; i < GROUP; ++i) {
            kept[g + i] = chosen >> i & 1;
            if (!kept[g + i]) held[g + i] = T{};
        }
    }
    if (bad) *a.fault = 1;

    uint8_t* keep = a.keep + row * a.columns + column;
    PYPRUNE_UNROLL
    for (int i = 0; i < HELD; i += VECTOR) {
        T part[VECTOR];
        uint8_t bits[VECTOR];
        PYPRUNE_UNROLL
        for (int t = 0; t < VECTOR; ++t) {
            part[t] = held[i + t];
            bits[t] = kept[i + t];
        }
        store(keep + i, bits, count - i, M > 0 && a.whole);
        if (a.apply) store(w + i, part, count - i, M > 0 && a.whole);
    }
}

template <class T, int M>
void launch_nm(const Launcher& launch, NM<T> a, int64_t rows) {
    constexpr int VECTOR = 16 / sizeof(T), HELD = M > VECTOR ? M : VECTOR;
    const int step = M == 0 ? a.m : HELD;
    a.units_a_row = (a.columns + step - 1) / step;
    a.units = rows * a.units_a_row;
    a.whole = a.columns % VECTOR == 0 && aligned(a.w, a.stride * int64_t(sizeof(T)), 16) && aligned(a.scale, 0, 16) &&
              aligned(a.keep, 0, VECTOR);
    launch(nm_mask_kernel<T, M>, (a.units + THREADS - 1) / THREADS, THREADS, 0, a);
}

void nm_mask(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t n,
             int64_t m, bool apply, uint8_t* keep, int* fault, void* stream) {
    if (rows == 0 || columns == 0) return;
    const Launcher launch{"nm_mask", {{"rows", rows}, {"columns", columns}, {"N", n}, {"M", m}},
                          static_cast<cudaStream_t>(stream)};
    if (m < 1 || m > LARGEST_M || columns % m != 0 || columns > 0x7fffffff)
        launch.refuse("M must be at most 16 and divide the columns");
    with_dtype(launch, dtype, [&](auto type) {
        using T = decltype(type);
        const NM<T> a{static_cast<T*>(w), scale, keep, fault, w_stride, 0, int(columns), 0, int(n), int(m), apply,
                      false};
        switch (m) {
            case 2: return launch_nm<T, 2>(launch, a, rows);
            case 4: return launch_nm<T, 4>(launch, a, rows);
            case 8: return launch_nm<T, 8>(launch, a, rows);
            case 16: return launch_nm<T, 16>(launch, a, rows);
            default: return launch_nm<T, 0>(launch, a, rows);
        }
    });
}

}  // namespace pyprune::cuda
