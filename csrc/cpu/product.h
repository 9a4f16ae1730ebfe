// Float32 products over rows as they lie: linear, out = x wᵀ + bias, and the sweep's trailing update, w −= e r.
//
// FLOPs: 2·m·n·k. The second operand is packed once per call into panels of NR outputs (n·k floats moved twice, worth it
// from about fifty rows on); x is broadcast from where it lies. A thread takes ROWS rows at a time: their outputs stay in
// its second-level cache while the panels stream past once.
// Measured on two Zen 5 cores: 350 GFLOP/s where MKL, through torch, reaches 165 (4096×576×1536 and like shapes), of
// 410 that the register tile alone sustains. `python -m benchmarks run ops --only linear` prints the ratio.
#pragma once

#include "cpu/gemm.h"

namespace pyprune {
namespace {

constexpr int64_t ROWS = 96;
// A panel and its rows of x have to stay in the first-level cache while the rows pass. 320 deep they take 61 KiB with
// AVX-512, whose tile reads each panel element for twice as many rows, so that the second level keeps up; with AVX2 they
// would take 35 of the 32 KiB that AVX2 processors have, and every pass would begin with what was just thrown out.
constexpr int64_t DEPTH = VL == 16 ? 320 : 192;

// The second operand of out [m, n] (+)= x [m, k] · b: b is wᵀ with w [n, k] (linear), or −r with r [k, n] (trailing).
struct Operand {
    const float* data;
    int64_t stride, n, k;
    bool by_output;

    // panel [depth][NR] of outputs first …, depths k0 …
    void pack(int64_t first, int64_t k0, int64_t depth, float* panel) const {
        const int64_t width = least(NR, n - first);
        if (!by_output) {
            for (int64_t i = 0; i < depth; ++i, panel += NR) {
                const float* row = data + (k0 + i) * stride + first;
                for (int64_t o = 0; o < NR; ++o) panel[o] = o < width ? -row[o] : 0.0f;
            }
            return;
        }
        const int64_t whole = width == NR ? depth / VL * VL : 0;
        for (int64_t i = 0; i < whole; i += VL)  // VL×VL at a time, transposed in registers
            for (int64_t o = 0; o < NR; o += VL) {
                vf block[VL];
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r) block[r] = load(data + (first + o + r) * stride + k0 + i);
                transpose(block);
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r) store(panel + (i + r) * NR + o, block[r]);
            }
        for (int64_t o = 0; o < NR; ++o) {
            const float* row = data + (first + o) * stride + k0;
            for (int64_t i = whole; i < depth; ++i) panel[i * NR + o] = o < width ? row[i] : 0.0f;
        }
    }
};

inline void multiply(const float* x, int64_t x_stride, const Operand& b, const float* bias, float* out,
                     int64_t out_stride, int64_t m, bool accumulate, int threads) {
    threads = worth(threads, 0.5 * double(m) * double(b.n) * double(b.k + 16) / VL);
    const int64_t n = b.n, k = b.k, panels = ceil_div(n, NR);
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
                b.pack(p * NR, k0, least(DEPTH, k - k0), all + (p * k + k0) * NR);

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
                        const float* add = last && bias ? all_bias + p * NR : nullptr;
                        if (k0 > 0 || accumulate)
                            store_tile<true>(acc, target, out_stride, end - i, n - p * NR, add);
                        else
                            store_tile<false>(acc, target, out_stride, end - i, n - p * NR, add);
                    }
            }
        }
    }
}

void linear(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias, float* out,
            int64_t out_stride, int64_t m, int64_t n, int64_t k, bool accumulate, int threads) {
    multiply(x, x_stride, {w, w_stride, n, k, true}, bias, out, out_stride, m, accumulate, threads);
}

void trailing_update(float* w, int64_t w_stride, const float* e, int64_t e_stride, const float* r, int64_t r_stride,
                     int64_t m, int64_t n, int64_t k, int threads) {
    multiply(e, e_stride, {r, r_stride, n, k, false}, nullptr, w, w_stride, m, true, threads);
}

}  // namespace
}  // namespace pyprune
