// Count, mean and centred sum of squares of every column, merged by Chan's formula.
//
// Bytes: x once from memory (a chunk is read twice, the second time from the cache). Two passes over each chunk, so
// that a large mean does not cancel: the second is about the first's rounded mean and also sums the deviations, which
// corrects it. Chunks are merged in float64.
#pragma once

#include "cpu/gram.h"

namespace pyprune {
namespace {

constexpr int STRIPE = 4 * VL, BATCH = 128;

// One stripe of columns over one chunk of tokens: a rounded mean, then Σ(x − mean) and Σ(x − mean)² about it.
template <typename T>
inline void chunk_moments(const Tokens& x, const int64_t* rows, int64_t start, int64_t count, int64_t first,
                          int64_t width, float* mean, float* residual, float* m2) {
    const auto at = [&](int64_t t, int v) {
        const T* p = static_cast<const T*>(x.data) + (rows ? rows[start + t] : start + t) * x.stride + first + v * VL;
        const int64_t left = width - v * VL;
        return left >= VL ? load(p) : left > 0 ? load_some(p, left) : vf{};
    };
    for (int v = 0; v < STRIPE / VL; ++v) {
        vf sum = {}, rest = {}, squares = {};
        for (int64_t t = 0; t < count; ++t) sum += at(t, v);
        const vf center = sum / splat(float(count));
        for (int64_t t = 0; t < count; ++t) {
            const vf d = at(t, v) - center;
            rest += d;
            squares += d * d;
        }
        store(mean + v * VL, center);
        store(residual + v * VL, rest);
        store(m2 + v * VL, squares);
    }
}

int64_t column_moments(const Tokens& x, float* mean, float* m2, int threads) {
    threads = worth(threads, 4.0 * double(x.tokens * x.columns) / VL);
    Buffer<int64_t> list(x.mask ? x.tokens : 1);
    const int64_t* rows = x.mask ? list.get() : nullptr;
    const int64_t tokens = x.mask ? list_tokens(x.mask, x.tokens, list.get()) : x.tokens;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < x.columns; first += STRIPE) {
        const int64_t width = least(STRIPE, x.columns - first);
        double total_mean[STRIPE] = {}, total_m2[STRIPE] = {};
        for (int64_t start = 0; start < tokens; start += BATCH) {
            const int64_t count = least(BATCH, tokens - start);
            float part_mean[STRIPE], part_rest[STRIPE], part_m2[STRIPE];
            if (x.type == FLOAT32)
                chunk_moments<float>(x, rows, start, count, first, width, part_mean, part_rest, part_m2);
            else if (x.type == BFLOAT16)
                chunk_moments<bf16>(x, rows, start, count, first, width, part_mean, part_rest, part_m2);
            else
                chunk_moments<f16>(x, rows, start, count, first, width, part_mean, part_rest, part_m2);
            const double share = double(count) / double(start + count);
            for (int c = 0; c < STRIPE; ++c) {
                const double rest = part_rest[c], delta = part_mean[c] + rest / double(count) - total_mean[c];
                total_mean[c] += delta * share;
                total_m2[c] += part_m2[c] - rest * rest / double(count) + delta * delta * double(start) * share;
            }
        }
        for (int64_t c = 0; c < width; ++c) {
            mean[first + c] = float(total_mean[c]);
            m2[first + c] = float(total_m2[c]);
        }
    }
    return tokens;
}

}  // namespace
}  // namespace pyprune
