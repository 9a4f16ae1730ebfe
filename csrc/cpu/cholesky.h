// Batched Cholesky factor and solve of small systems: a lane is a system, so every operation is full width whatever n.
//
// FLOPs: batch·n³/3 for the factor, 2·batch·n²·k for the solve; bytes: batch·(n² + 2nk)·4, once in and out. VL systems
// are transposed into a packed lower triangle of vectors, n(n+1)/2 · 4·VL bytes, which should stay in the second-level
// cache: pyprune/ops/native.py sends larger n to LAPACK.
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

constexpr int CB = VL == 16 ? 4 : 2;  // the factor's register block, CB×CB vectors
constexpr int KB = VL;                // right-hand sides solved together

inline vf* row_of(vf* lower, int64_t i) { return lower + i * (i + 1) / 2; }

inline vf square_root(vf x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#else
    for (int i = 0; i < VL; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Calls put(j, lanes) for j in [0, count): element j of VL systems, system s at source + s·step (absent ones are 0).
template <typename Put>
inline void gather_lanes(const float* source, int64_t step, int64_t systems, int64_t count, Put put) {
    for (int64_t j = 0; j < count; j += VL) {
        vf block[VL];
        for (int s = 0; s < VL; ++s)
            block[s] = s >= systems        ? vf{}
                       : j + VL <= count ? load(source + s * step + j)
                                         : load_some(source + s * step + j, count - j);
        transpose(block);
        for (int64_t i = 0; i < least(VL, count - j); ++i) put(j + i, block[i]);
    }
}
template <typename Get>
inline void scatter_lanes(float* target, int64_t step, int64_t systems, int64_t count, Get get) {
    for (int64_t j = 0; j < count; j += VL) {
        vf block[VL];
        for (int64_t i = 0; i < VL; ++i) block[i] = j + i < count ? get(j + i) : vf{};
        transpose(block);
        for (int s = 0; s < systems; ++s) put_floats(target + s * step + j, block[s], count - j);
    }
}

// rows×columns block at (i0, j0) −= L[i0…, :j0] · L[j0…, :j0]ᵀ; only the lower part where it crosses the diagonal.
template <int R, int C>
inline void subtract_products(vf* lower, int64_t i0, int64_t j0) {
    vf sum[R][C] = {};
    for (int64_t k = 0; k < j0; ++k) {
        vf right[C];
        for (int c = 0; c < C; ++c) right[c] = row_of(lower, j0 + c)[k];
        for (int r = 0; r < R; ++r) {
            const vf left = row_of(lower, i0 + r)[k];
            for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            if (j0 + c <= i0 + r) row_of(lower, i0 + r)[j0 + c] -= sum[r][c];
}

// Factor in place, column blocks of CB; info: 1-based order of the first pivot that is not positive, per lane.
inline void factor_lanes(vf* lower, int64_t n, vi& info) {
    for (int64_t j0 = 0; j0 < n; j0 += CB) {
        const bool whole = j0 + CB <= n;
        const int64_t width = least(CB, n - j0);
        for (int64_t i0 = j0; i0 < n;) {
            if (whole && i0 + CB <= n) {
                subtract_products<CB, CB>(lower, i0, j0);
                i0 += CB;
            } else {
                for (int64_t c = 0; c < width; ++c)
                    if (j0 + c <= i0) {
                        vf sum = {};
                        for (int64_t k = 0; k < j0; ++k) sum += row_of(lower, i0)[k] * row_of(lower, j0 + c)[k];
                        row_of(lower, i0)[j0 + c] -= sum;
                    }
                ++i0;
            }
        }
        for (int64_t j = j0; j < j0 + width; ++j) {
            vf* pivot = row_of(lower, j) + j;
            const vi broken = ~(vi)(*pivot > 0.0f) & (info == 0);
            info |= broken & (vi{} + int32_t(j + 1));
            *pivot = square_root(*pivot);
            const vf inverse = 1.0f / *pivot;
            for (int64_t i = j + 1; i < n; ++i) {
                vf* row = row_of(lower, i);
                row[j] *= inverse;
                const vf x = row[j];
                for (int64_t l = j + 1; l < least(j0 + width, i + 1); ++l) row[l] -= x * row_of(lower, l)[j];
            }
        }
    }
}

// K right-hand sides x [n][K] in place: L y = b, then Lᵀ x = y.
template <int K>
inline void solve_lanes(vf* lower, int64_t n, vf* x) {
    for (int64_t i = 0; i < n; ++i) {
        const vf* row = row_of(lower, i);
        vf sum[K];
        for (int c = 0; c < K; ++c) sum[c] = x[i * K + c];
        for (int64_t j = 0; j < i; ++j)
            for (int c = 0; c < K; ++c) sum[c] -= row[j] * x[j * K + c];
        const vf inverse = 1.0f / row[i];
        for (int c = 0; c < K; ++c) x[i * K + c] = sum[c] * inverse;
    }
    for (int64_t i = n - 1; i >= 0; --i) {
        vf sum[K];
        for (int c = 0; c < K; ++c) sum[c] = x[i * K + c];
        for (int64_t j = i + 1; j < n; ++j) {
            const vf left = row_of(lower, j)[i];
            for (int c = 0; c < K; ++c) sum[c] -= left * x[j * K + c];
        }
        const vf inverse = 1.0f / row_of(lower, i)[i];
        for (int c = 0; c < K; ++c) x[i * K + c] = sum[c] * inverse;
    }
}

template <int K>
inline void solve_columns(vf* lower, int64_t n, vf* work, const float* b, float* x, int64_t k, int64_t first,
                          int64_t systems, vi failed) {
    for (int64_t i = 0; i < n; ++i)
        gather_lanes(b + i * k + first, n * k, systems, K, [&](int64_t c, vf v) { work[i * K + c] = v; });
    solve_lanes<K>(lower, n, work);
    const vf nan = splat(__builtin_nanf(""));
    for (int64_t i = 0; i < n; ++i)
        scatter_lanes(x + i * k + first, n * k, systems, K,
                      [&](int64_t c) { return failed ? nan : work[i * K + c]; });
}

void cholesky(const float* a, const float* damping, float* factor, const float* b, float* x, int32_t* info,
              int64_t batch, int64_t n, int64_t k, int threads) {
    threads = worth(threads, double(ceil_div(batch, VL) * n * n) * double(n + 4 * k + 60) / 6);
    const int64_t lower_size = n * (n + 1) / 2, work_size = lower_size + n * KB;
    Buffer<vf> scratch(int64_t(threads) * most(work_size, 1));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < batch; first += VL) {
        const int64_t systems = least(VL, batch - first);
        vf* lower = scratch.get() + int64_t(thread_number()) * work_size;
        vf* work = lower + lower_size;
        for (int64_t i = 0; i < n; ++i)
            gather_lanes(a + first * n * n + i * n, n * n, systems, i + 1,
                         [&](int64_t j, vf v) { row_of(lower, i)[j] = v; });
        if (damping) {
            const vf add = load_some(damping + first, systems);
            for (int64_t i = 0; i < n; ++i) row_of(lower, i)[i] += add;
        }
        vi broken = {};
        factor_lanes(lower, n, broken);
        for (int64_t s = 0; s < systems; ++s) info[first + s] = broken[s];
        const vi failed = broken != 0;
        const vf nan = splat(__builtin_nanf(""));
        if (factor)
            for (int64_t i = 0; i < n; ++i)
                scatter_lanes(factor + first * n * n + i * n, n * n, systems, n, [&](int64_t j) {
                    return j > i ? vf{} : failed ? nan : row_of(lower, i)[j];
                });
        if (b) {
            int64_t c = 0;
            const float* bs = b + first * n * k;
            float* xs = x + first * n * k;
            for (; c + KB <= k; c += KB) solve_columns<KB>(lower, n, work, bs, xs, k, c, systems, failed);
            for (; c < k; ++c) solve_columns<1>(lower, n, work, bs, xs, k, c, systems, failed);
        }
    }
}

}  // namespace
}  // namespace pyprune
