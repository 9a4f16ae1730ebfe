// N:M keep masks (and the zeroing) in one pass: rank counting in registers, no sort.
//
// Bytes: w read, mask written, w written if applied: the floor is memory bandwidth. A weight is kept when fewer than n of
// its group beat it; among equals the lower index is dropped.
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

// Every group of M lanes rotated by S within itself.
template <int M, int S, int... L>
inline vf rotate(vf x, std::integer_sequence<int, L...>) {
    return pick<(L / M * M + (L % M + S) % M)...>(x, x);
}
// Lanes whose partner under that rotation has the higher index.
template <int M, int S, int... L>
inline vi partner_is_later(std::integer_sequence<int, L...>) {
    return vi{((L % M + S) < M ? -1 : 0)...};
}
template <int M, int S>
inline vi count_above(vf score) {
    if constexpr (S == M) {
        return vi{};
    } else {
        constexpr auto lanes = std::make_integer_sequence<int, VL>{};
        const vf other = rotate<M, S>(score, lanes);
        const vi beats = (vi)(other > score) | ((vi)(other == score) & partner_is_later<M, S>(lanes));
        return count_above<M, S + 1>(score) - beats;
    }
}

template <typename T>
inline vf scores(const T* w, const float* scale, int64_t c) {
    const vf score = abs(load(w + c));
    return scale ? score * load(scale + c) : score;
}

// Whole vectors of groups of M = 2, 4, 8, 16; returns the first column not done.
template <int M, typename T>
inline int64_t groups_in_lanes(T* w, const float* scale, int64_t columns, int n, bool apply, uint8_t* mask) {
    int64_t c = 0;
    if constexpr (M <= VL)
        for (; c + VL <= columns; c += VL) {
            const vi keep = count_above<M, 1>(scores(w, scale, c)) < n;
            store_bool(mask + c, keep);
            if (apply) zero_dropped(w + c, keep);
        }
    return c;
}

// Any M, one group at a time.
template <typename T>
inline void group_alone(T* w, const float* scale, int n, int m, bool apply, uint8_t* mask) {
    float score[16];
    for (int i = 0; i < m; ++i) {
        const float x = to_float(w[i]);
        score[i] = (x < 0 ? -x : x) * (scale ? scale[i] : 1.0f);
    }
    for (int i = 0; i < m; ++i) {
        int above = 0;
        for (int j = 0; j < m; ++j) above += j > i ? score[j] >= score[i] : score[j] > score[i];
        mask[i] = above < n;
    }
    if (apply)
        for (int i = 0; i < m; ++i)
            if (!mask[i]) w[i] = T{};
}

template <typename T>
inline bool row_has_nan(const T* w, const float* scale, int64_t columns) {
    vi nan = {};
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
        const vf score = scores(w, scale, c);
        nan |= (vi)(score != score);
    }
    bool found = any(nan);
    for (; c < columns; ++c) {
        const float score = to_float(w[c]) * (scale ? scale[c] : 1.0f);
        found |= score != score;
    }
    return found;
}

template <typename T>
bool nm_rows(T* w, int64_t stride, int64_t rows, int64_t columns, const float* scale, int n, int m, bool apply,
             uint8_t* mask, int threads) {
    // NaN is looked for in all rows before any is written. A second read: blocks of rows would leave w half done.
    threads = worth(threads, 12.0 * double(rows * columns) / VL);
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) bad |= row_has_nan(w + i * stride, scale, columns);
    if (bad) return false;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) {
        T* row = w + i * stride;
        uint8_t* out = mask + i * columns;
        int64_t c = m == 2    ? groups_in_lanes<2>(row, scale, columns, n, apply, out)
                    : m == 4  ? groups_in_lanes<4>(row, scale, columns, n, apply, out)
                    : m == 8  ? groups_in_lanes<8>(row, scale, columns, n, apply, out)
                    : m == 16 ? groups_in_lanes<16>(row, scale, columns, n, apply, out)
                              : 0;
        for (; c < columns; c += m) group_alone(row + c, scale ? scale + c : nullptr, n, m, apply, out + c);
    }
    return true;
}

bool nm_mask(void* w, int64_t stride, int64_t rows, int64_t columns, int type, const float* scale, int n, int m,
             bool apply, uint8_t* mask, int threads) {
    const auto run = [&](auto* data) {
        return nm_rows(data, stride, rows, columns, scale, n, m, apply, mask, threads);
    };
    return type == FLOAT32    ? run(static_cast<float*>(w))
           : type == BFLOAT16 ? run(static_cast<bf16*>(w))
                              : run(static_cast<f16*>(w));
}

}  // namespace
}  // namespace pyprune
