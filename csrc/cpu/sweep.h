// The OBS sweep of one column block (SparseGPT, arXiv 2301.00774), all columns in one pass over the rows.
//
// FLOPs: rows·b² (and the division); bytes: w twice, errors and mask once. A lane is a row: TILE rows are transposed
// into scratch that stays in the first-level cache, so every step is a full-width operation and rows never mix.
// Columns go in groups of `step`: first everything the finished columns owe to the group (left-looking,
// w_c −= Σ_j e_j·r_jc, W columns at a time in registers), then the group itself column by column.
// N:M masks are chosen when their group is reached, on the weights as updated by then.
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

constexpr int U = VL == 16 ? 2 : 1;  // vectors of rows in a tile
constexpr int TILE = U * VL;
constexpr int W = 8;                 // columns updated together: W·U sums in registers

// tile [columns rounded up to VL][TILE], rows beyond the matrix 0
template <typename T>
inline void load_transposed(const T* source, int64_t stride, int64_t rows, int64_t columns, float* tile) {
    for (int64_t c = 0; c < columns; c += VL)
        for (int u = 0; u < U; ++u) {
            vf block[VL];
            for (int r = 0; r < VL; ++r) {
                const T* p = source + (u * VL + r) * stride + c;
                block[r] = u * VL + r >= rows ? vf{} : c + VL <= columns ? load(p) : load_some(p, columns - c);
            }
            transpose(block);
            for (int i = 0; i < VL; ++i) store(tile + (c + i) * TILE + u * VL, block[i]);
        }
}

template <typename Put>
inline void store_transposed(const float* tile, int64_t rows, int64_t columns, Put put) {
    for (int64_t c = 0; c < columns; c += VL)
        for (int u = 0; u < U; ++u) {
            vf block[VL];
            for (int i = 0; i < VL; ++i) block[i] = load(tile + (c + i) * TILE + u * VL);
            transpose(block);
            for (int r = 0; r < VL && u * VL + r < rows; ++r) put(u * VL + r, c, block[r]);
        }
}

// A byte of 0 or 1 becomes a lane of 0 or −1.
struct KeepByte {
    uint8_t byte;
};
inline vf load(const KeepByte* p) {
    const vb bytes = *reinterpret_cast<const vb_any*>(p);
    return (vf)(__builtin_convertvector(bytes, vi) != 0);
}

// w columns first … first+C of the tile −= Σ_{j < done} e_j · panel[j][…]; panel has `width` columns per row.
template <int C>
inline void owe(float* w, const float* e, const float* panel, int64_t width, int64_t done) {
    vf sum[C][U];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int u = 0; u < U; ++u) sum[c][u] = load(w + c * TILE + u * VL);
    for (int64_t j = 0; j < done; ++j, e += TILE, panel += width) {
        vf x[U];
        for (int u = 0; u < U; ++u) x[u] = load(e + u * VL);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            for (int u = 0; u < U; ++u) sum[c][u] -= x[u] * splat(panel[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int u = 0; u < U; ++u) store(w + c * TILE + u * VL, sum[c][u]);
}

// Keep the n largest of w·inverse in each lane of m columns; ties drop the lower index.
inline void choose(const float* w, const float* inverse, int64_t n, int64_t m, float* keep) {
    for (int u = 0; u < U; ++u)
        for (int64_t i = 0; i < m; ++i) {
            const vf mine = abs(load(w + i * TILE + u * VL)) * splat(inverse[i]);
            vi above = {};
            for (int64_t j = 0; j < m; ++j) {
                const vf other = abs(load(w + j * TILE + u * VL)) * splat(inverse[j]);
                above -= j > i ? (vi)(other >= mine) : (vi)(other > mine);
            }
            store(keep + i * TILE + u * VL, (vf)(above < int32_t(n)));
        }
}

// The factor, cut into column groups: group g is [end of g][width of g], rows 0 … end, contiguous.
inline void pack_factor(const float* r, int64_t stride, int64_t b, int64_t step, float* packed) {
    for (int64_t g = 0; g < b; g += step) {
        const int64_t width = least(step, b - g);
        for (int64_t j = 0; j < g + width; ++j)
            for (int64_t c = 0; c < width; ++c) *packed++ = r[j * stride + g + c];
    }
}

inline void sweep_tile(float* w, float* e, float* keep, const float* packed, const float* diagonal,
                       const float* inverse, int64_t b, int64_t step, int64_t n, int64_t m, vf loss[U]) {
    for (int64_t g = 0; g < b; g += step) {
        const int64_t width = least(step, b - g);
        int64_t c = 0;
        for (; c + W <= width; c += W) owe<W>(w + (g + c) * TILE, e, packed + c, width, g);
        for (; c < width; ++c) owe<1>(w + (g + c) * TILE, e, packed + c, width, g);
        packed += g * width;
        for (int64_t i = 0; i < width; ++i, packed += width) {
            if (m > 0 && i % m == 0) choose(w + (g + i) * TILE, inverse + g + i, n, m, keep + (g + i) * TILE);
            for (int u = 0; u < U; ++u) {
                float* column = w + (g + i) * TILE + u * VL;
                const vi kept = (vi)load(keep + (g + i) * TILE + u * VL);
                const vf x = load(column), error = (vf)((vi)(x / splat(diagonal[g + i])) & ~kept);
                store(e + (g + i) * TILE + u * VL, error);
                store(column, (vf)((vi)x & kept));
                loss[u] += error * error;
                for (int64_t l = i + 1; l < width; ++l) {
                    float* later = w + (g + l) * TILE + u * VL;
                    store(later, load(later) - error * splat(packed[l]));
                }
            }
        }
    }
}

inline int64_t group_step(int64_t m) {
    int64_t step = most(m, W);
    while (m > 0 && step % m) ++step;  // a multiple of m, near W
    return step;
}

// mask: the keep mask in, or out if nm (m > 0). Returns false, w untouched, if w or r is not finite or a diagonal entry
// not positive.
bool obs_sweep(float* w, int64_t w_stride, const float* r, int64_t r_stride, int64_t rows, int64_t b, uint8_t* mask,
               int64_t n, int64_t m, float* errors, float* losses, int threads) {
    threads = worth(threads, 0.6 * double(rows * b) * double(b + 40) / VL);
    const int64_t step = group_step(m), groups = ceil_div(b, step), padded = ceil_div(b, VL) * VL;
    Buffer<float> packed(groups * (groups + 1) / 2 * step * step), diagonal(b), inverse(b);
    Buffer<float> scratch(int64_t(threads) * 3 * padded * TILE);
    float bad = 0;
    for (int64_t j = 0; j < b; ++j) {
        diagonal[j] = r[j * r_stride + j];
        inverse[j] = 1.0f / diagonal[j];
        if (!(diagonal[j] > 0)) bad = 1;
        for (int64_t l = 0; l < b; ++l) bad += r[j * r_stride + l] * 0.0f;  // 0·inf and 0·NaN are NaN
    }
#pragma omp parallel for reduction(+ : bad) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) {
        vf sum = {};
        int64_t c = 0;
        for (; c + VL <= b; c += VL) sum += load(w + i * w_stride + c) * 0.0f;
        for (; c < b; ++c) sum[0] += w[i * w_stride + c] * 0.0f;
        for (int l = 0; l < VL; ++l) bad += sum[l];
    }
    if (bad != 0) return false;
    pack_factor(r, r_stride, b, step, packed.get());

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < rows; first += TILE) {
        float* tile = scratch.get() + int64_t(thread_number()) * 3 * padded * TILE;
        float *e = tile + padded * TILE, *keep = e + padded * TILE;
        const int64_t count = least(TILE, rows - first);
        load_transposed(w + first * w_stride, w_stride, count, b, tile);
        if (m == 0) load_transposed(reinterpret_cast<KeepByte*>(mask) + first * b, b, count, b, keep);
        vf loss[U] = {};
        sweep_tile(tile, e, keep, packed.get(), diagonal.get(), inverse.get(), b, step, n, m, loss);
        store_transposed(tile, count, b, [&](int64_t i, int64_t c, vf x) {
            put_floats(w + (first + i) * w_stride + c, x, b - c);
        });
        store_transposed(e, count, b, [&](int64_t i, int64_t c, vf x) {
            put_floats(errors + (first + i) * b + c, x, b - c);
        });
        if (m > 0)
            store_transposed(keep, count, b, [&](int64_t i, int64_t c, vf x) {
                uint8_t bytes[VL];
                store_bool(bytes, (vi)x);
                std::memcpy(mask + (first + i) * b + c, bytes, size_t(least(VL, b - c)));
            });
        for (int64_t i = 0; i < count; ++i) losses[first + i] = loss[i / VL][i % VL];
    }
    return true;
}

}  // namespace
}  // namespace pyprune
