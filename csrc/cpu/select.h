// Exact k-th value selection behind unstructured masks: no sort, ties by index.
//
// A score |w|·scale is mapped to an integer key of the same order (−0 = +0). Rows: the keys of one row lie in the
// cache and the k-th is found by bisection on its bits, a vector compare-and-count per step. Matrices: one histogram
// of the upper 11 bits, then the few candidates in the bin of rank k, 11 and 10 bits more. Bytes: w and the mask once (rows),
// w three times and the mask once (matrix).
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

inline vi to_key(vf score) {
    const vi bits = (vi)(score + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// keys of VL columns starting at c; lanes beyond the row are the largest key. nan collects lanes that are NaN.
template <typename T>
inline vi row_keys(const T* w, const float* scale, int64_t c, int64_t columns, vi& nan) {
    const bool whole = c + VL <= columns;
    vf score = abs(whole ? load(w + c) : load_some(w + c, columns - c));
    if (scale) score *= whole ? load(scale + c) : load_some(scale + c, columns - c);
    nan |= (vi)(score != score);
    vi key = to_key(score);
    if (!whole)
        for (int64_t i = columns - c; i < VL; ++i) key[i] = INT32_MAX;
    return key;
}

// Appends the lanes of key where hit is set; returns the new end.
inline int32_t* append(int32_t* end, vi key, vi hit) {
#if defined(__AVX512F__)
    const __mmask16 lanes = _mm512_movepi32_mask((__m512i)hit);
    const int count = __builtin_popcount(lanes);  // compress in a register: the form that stores is microcoded on AMD
    _mm512_mask_storeu_epi32(end, __mmask16((1u << count) - 1), _mm512_maskz_compress_epi32(lanes, (__m512i)key));
    return end + count;
#else
    if (any(hit))
        for (int i = 0; i < VL; ++i)
            if (hit[i]) *end++ = key[i];
    return end;
#endif
}

inline int64_t count_up_to(const vi* keys, int64_t vectors, int32_t pivot) {
    vi count[4] = {};
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
        for (int u = 0; u < 4; ++u) count[u] -= keys[v + u] <= pivot;
    for (; v < vectors; ++v) count[0] -= keys[v] <= pivot;
    const vi sum = (count[0] + count[1]) + (count[2] + count[3]);
    int64_t total = 0;
    for (int i = 0; i < VL; ++i) total += sum[i];
    return total;
}

struct Threshold {
    int32_t key;   // drop every key below it
    int64_t ties;  // and the first `ties` equal to it
};

// The k-th smallest key, 1 ≤ k ≤ number of columns.
inline Threshold row_threshold(const vi* keys, int64_t vectors, int64_t k) {
    vi low = keys[0], high = vi{} + INT32_MIN;
    for (int64_t v = 0; v < vectors; ++v) {
        low = keys[v] < low ? keys[v] : low;
        const vi real = keys[v] == INT32_MAX ? high : keys[v];
        high = real > high ? real : high;
    }
    int64_t lo = low[0], hi = high[0];
    for (int i = 1; i < VL; ++i) lo = least(lo, low[i]), hi = most(hi, high[i]);
    while (lo < hi) {
        const int64_t middle = lo + (hi - lo) / 2;
        const int64_t count = count_up_to(keys, vectors, int32_t(middle));
        if (count == k) return {int32_t(middle) + 1, 0};  // exactly these
        if (count > k)
            hi = middle;
        else
            lo = middle + 1;
    }
    return {int32_t(lo), k - count_up_to(keys, vectors, int32_t(lo - 1))};
}

// Writes the mask of a row; the first `ties` keys equal to the threshold are dropped too, and counted off.
template <typename T>
inline void finish_row(T* w, const vi* keys, int64_t columns, Threshold& at, bool apply, uint8_t* mask) {
    for (int64_t c = 0; c < columns; c += VL) {
        vi keep = keys[c / VL] >= at.key;
        if (at.ties > 0) {
            const vi equal = keys[c / VL] == at.key;
            for (int64_t i = 0; i < least(VL, columns - c) && at.ties > 0; ++i)
                if (equal[i]) keep[i] = 0, --at.ties;
        }
        if (c + VL <= columns) {
            store_bool(mask + c, keep);
            if (apply) zero_dropped(w + c, keep);
        } else {
            for (int64_t i = 0; i < columns - c; ++i) {
                mask[c + i] = uint8_t(keep[i] & 1);
                if (apply && !keep[i]) w[c + i] = T{};
            }
        }
    }
}

template <typename T>
bool select_rows(T* w, int64_t stride, int64_t rows, int64_t columns, const float* scale, int64_t k, bool apply,
                 uint8_t* mask, int threads) {
    const int64_t vectors = ceil_div(columns, VL);
    threads = worth(threads, 24.0 * double(rows * vectors));
    Buffer<vi> scratch(threads * most(vectors, 1));
    int bad = 0;
    // NaN is looked for in all rows before any is written.
    for (int pass = 0; pass < 2 && !bad; ++pass) {
        if (pass == 0 && !apply) continue;
#pragma omp parallel for schedule(static) reduction(| : bad) num_threads(threads)
        for (int64_t i = 0; i < rows; ++i) {
            vi* keys = scratch.get() + thread_number() * vectors;
            vi nan = {};
            for (int64_t v = 0; v < vectors; ++v) keys[v] = row_keys(w + i * stride, scale, v * VL, columns, nan);
            if (any(nan)) bad = 1;
            if (pass == 0 || bad) continue;
            Threshold at = k > 0 ? row_threshold(keys, vectors, k) : Threshold{INT32_MIN, 0};
            finish_row(w + i * stride, keys, columns, at, apply, mask + i * columns);
        }
    }
    return !bad;
}

constexpr int BINS = 2048, COPIES = 4;  // four copies: equal neighbours do not wait for one another's store

// Which bin the 0-based rank falls into; rank becomes the rank inside it.
inline int64_t find_bin(const int64_t* histogram, int64_t bins, int64_t& rank) {
    int64_t bin = 0;
    while (bin < bins - 1 && rank >= histogram[bin]) rank -= histogram[bin++];
    return bin;
}

// The key of that rank among keys that agree above the lowest 21 bits; rank becomes the rank among its equals.
inline int32_t rank_among(const int32_t* keys, int64_t count, int32_t prefix, int64_t& rank) {
    for (int shift : {10, 0}) {
        const int width = shift ? 11 : 10;
        int64_t histogram[BINS] = {};
        for (int64_t i = 0; i < count; ++i)
            if (keys[i] >> (shift + width) == prefix >> (shift + width))
                ++histogram[(keys[i] >> shift) & ((1 << width) - 1)];
        prefix |= int32_t(find_bin(histogram, int64_t(1) << width, rank)) << shift;
    }
    return prefix;
}

// Rows are cut into `threads` parts, so that the candidates of a part lie in row-major order and ties are counted there.
template <typename T>
bool select_matrix(T* w, int64_t stride, int64_t rows, int64_t columns, const float* scale, int64_t k, bool apply,
                   uint8_t* mask, int threads) {
    const int64_t vectors = ceil_div(columns, VL);
    threads = worth(threads, 48.0 * double(rows * vectors));
    const int64_t parts = threads;
    Buffer<vi> scratch(parts * most(vectors, 1));
    Buffer<int64_t> first(parts + 1), ties(parts);
    Buffer<uint32_t> copies(parts * BINS * COPIES);
    std::memset(copies.get(), 0, size_t(parts) * BINS * COPIES * 4);
    int bad = 0;
#pragma omp parallel for schedule(static, 1) reduction(| : bad) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        uint32_t* bins = copies.get() + part * BINS * COPIES;
        vi nan = {};
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i)
            for (int64_t c = 0; c < columns; c += VL) {
                const vi bin = (row_keys(w + i * stride, scale, c, columns, nan) >> 21) + 1024;
                for (int l = 0; l < VL; ++l) ++bins[(l % COPIES) * BINS + bin[l]];  // padding falls into the last bin
            }
        bad |= any(nan);
    }
    if (bad) return false;

    Threshold at{INT32_MIN, 0};
    for (int64_t part = 0; part < parts; ++part) ties[part] = 0;
    if (k > 0) {
        int64_t histogram[BINS] = {}, rank = k - 1;
        for (int64_t i = 0; i < parts * COPIES * BINS; ++i) histogram[i % BINS] += copies[i];
        const int64_t bin = find_bin(histogram, BINS, rank);
        const int32_t prefix = int32_t(bin - 1024) * (1 << 21);
        first[0] = 0;
        for (int64_t part = 0; part < parts; ++part) {
            first[part + 1] = first[part];
            for (int64_t copy = part * COPIES; copy < (part + 1) * COPIES; ++copy)
                first[part + 1] += copies[copy * BINS + bin];
        }
        Buffer<int32_t> candidates(first[parts] + VL);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int64_t part = 0; part < parts; ++part) {
            int32_t* next = candidates.get() + first[part];
            vi nan = {};
            for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i)
                for (int64_t c = 0; c < columns; c += VL) {
                    const vi key = row_keys(w + i * stride, scale, c, columns, nan);
                    next = append(next, key, (key >> 21) == (prefix >> 21));
                }
        }
        at.key = rank_among(candidates.get(), first[parts], prefix, rank);
        at.ties = rank + 1;
        int64_t left = at.ties;
        for (int64_t part = 0; part < parts; ++part) {
            int64_t equal = 0;
            for (int64_t i = first[part]; i < first[part + 1]; ++i) equal += candidates[i] == at.key;
            ties[part] = least(equal, left);
            left -= ties[part];
        }
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        vi* keys = scratch.get() + part * vectors;
        vi nan = {};
        Threshold here{at.key, ties[part]};
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
            for (int64_t v = 0; v < vectors; ++v) keys[v] = row_keys(w + i * stride, scale, v * VL, columns, nan);
            finish_row(w + i * stride, keys, columns, here, apply, mask + i * columns);
        }
    }
    return true;
}

bool select_mask(void* w, int64_t stride, int64_t rows, int64_t columns, int type, const float* scale, int64_t k,
                 bool by_row, bool apply, uint8_t* mask, int threads) {
    const auto run = [&](auto* data) {
        return by_row ? select_rows(data, stride, rows, columns, scale, k, apply, mask, threads)
                      : select_matrix(data, stride, rows, columns, scale, k, apply, mask, threads);
    };
    return type == FLOAT32    ? run(static_cast<float*>(w))
           : type == BFLOAT16 ? run(static_cast<bf16*>(w))
                               : run(static_cast<f16*>(w));
}

}  // namespace
}  // namespace pyprune
