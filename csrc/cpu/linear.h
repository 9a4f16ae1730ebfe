// out = x wᵀ + bias in float32.
//
// FLOPs: 2·m·n·k. w is packed once per call into panels of NR outputs (n·k floats moved twice, worth it from about
// a hundred rows on); x is broadcast from where it lies. A thread takes ROWS rows at a time: their outputs
// stay in its L2 cache while the panels stream past once.
#pragma once

#include "cpu/gemm.h"

namespace pyprune {
namespace {

constexpr int64_t ROWS = 12 * MR, DEPTH = 320;

// panel [depth][NR] of outputs first … of w [n, k], columns k0 …
inline void pack_outputs(const float* w, int64_t stride, int64_t n, int64_t first, int64_t k0, int64_t depth,
                         float* panel) {
    for (int64_t i0 = 0; i0 < depth; i0 += 16)
        for (int64_t o = 0; o < NR; ++o) {
            const float* row = w + (first + o) * stride + k0;
            const bool inside = first + o < n;
            for (int64_t i = i0; i < least(i0 + 16, depth); ++i) panel[i * NR + o] = inside ? row[i] : 0.0f;
        }
}

void linear(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias, float* out,
            int64_t out_stride, int64_t m, int64_t n, int64_t k, bool accumulate, int threads) {
    const int64_t panels = ceil_div(n, NR);
    Buffer<float> packed(panels * NR * most(k, 1)), biases(panels * NR);
    for (int64_t o = 0; o < panels * NR; ++o) biases[o] = bias && o < n ? bias[o] : 0.0f;
    const int64_t rows_per_chunk = least(ROWS, most(MR, ceil_div(ceil_div(m, threads), MR) * MR));
    const int64_t chunks = ceil_div(m, rows_per_chunk);
    float* all = packed.get();
    const float* all_bias = biases.get();

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p)  // panel p: its depth blocks one after another, k·NR floats in all
            for (int64_t k0 = 0; k0 < k; k0 += DEPTH)
                pack_outputs(w, w_stride, n, p * NR, k0, least(DEPTH, k - k0), all + (p * k + k0) * NR);

#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t begin = chunk * rows_per_chunk, end = least(begin + rows_per_chunk, m);
            vf acc[MR][3];
            const float* rows[MR];
            for (int64_t k0 = 0; k0 < most(k, 1); k0 += DEPTH) {
                const int64_t depth = least(DEPTH, k - k0);
                const bool last = k0 + DEPTH >= k;
                for (int64_t p = 0; p < panels; ++p)
                    for (int64_t i = begin; i < end; i += MR) {
                        // Rows beyond the matrix repeat the last one; store_tile leaves them out.
                        for (int r = 0; r < MR; ++r) rows[r] = x + least(i + r, m - 1) * x_stride + k0;
                        tile<Dot32, 1>(rows, all + (p * k + k0) * NR, depth, acc);
                        float* target = out + i * out_stride + p * NR;
                        const float* b = last && bias ? all_bias + p * NR : nullptr;
                        if (k0 > 0 || accumulate)
                            store_tile<true>(acc, target, out_stride, end - i, n - p * NR, b);
                        else
                            store_tile<false>(acc, target, out_stride, end - i, n - p * NR, b);
                    }
            }
        }
    }
}

}  // namespace
}  // namespace pyprune
