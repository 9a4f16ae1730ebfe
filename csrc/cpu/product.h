// Float32 products over rows as they lie: linear, out = x wᵀ + bias, and the sweep's trailing update, w −= e r.
//
// FLOPs: 2·m·n·k. The second operand is packed into panels of NR outputs, GROUP panels and DEPTH of their depth at a time:
// they are multiplied with SHARE rows of x while they lie in the second-level cache, so that a packed weight is never in
// memory. That packs it once for every SHARE rows, 2 % of their time. x is broadcast from where it lies.
#pragma once

#include "cpu/gemm.h"

namespace pyprune {
namespace {

constexpr int64_t ROWS = 96;
// A panel and its rows of x have to stay in the first-level cache while the rows pass. 320 deep they take 61 KiB with
// AVX-512, whose tile reads each panel element for twice as many rows, so that the second level keeps up; with AVX2 they
// would take 35 of the 32 KiB that AVX2 processors have, and every pass would begin with what was just thrown out.
constexpr int64_t DEPTH = VL == 16 ? 320 : 192;
constexpr int64_t GROUP = VL == 16 ? 4 : 8;  // 240 and 144 KiB of packed panels, 192 outputs
constexpr int64_t SHARE = 4 * ROWS;         // rows whose outputs of a group stay there too, 288 KiB

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

// Rows begin … end − 1 of out (+)= x · panel, NR columns of them at most; x and out begin at the panel's depth and column
inline void add_product(const float* x, int64_t x_stride, const float* panel, int64_t depth, const float* bias,
                        bool add, float* out, int64_t out_stride, int64_t columns, int64_t begin, int64_t end) {
    vf acc[MR][3];
    const float* rows[MR];
    for (int64_t i = begin; i < end; i += MR) {
        // Rows beyond the matrix repeat the last one; store_tile leaves them out.
        for (int r = 0; r < MR; ++r) rows[r] = x + least(i + r, end - 1) * x_stride;
        tile<Dot32, 1>(rows, panel, depth, acc);
        if (add)
            store_tile<true>(acc, out + i * out_stride, out_stride, end - i, columns, bias);
        else
            store_tile<false>(acc, out + i * out_stride, out_stride, end - i, columns, bias);
    }
}

inline void multiply(const float* x, int64_t x_stride, const Operand& b, const float* bias, float* out,
                     int64_t out_stride, int64_t m, bool accumulate, int threads) {
    threads = worth(threads, 0.5 * double(m) * double(b.n) * double(b.k + 16) / VL);
    const int64_t n = b.n, k = b.k, panels = ceil_div(n, NR), groups = ceil_div(panels, GROUP);
    // Fewer rows for each where many threads share few groups.
    const int64_t wanted = threads == 1 ? 1 : least(ceil_div(m, ROWS), ceil_div(4 * threads, most(1, groups)));
    const int64_t parts = most(most(1, wanted), ceil_div(m, SHARE));
    const int64_t share = ceil_div(ceil_div(m, parts), MR) * MR;
    const int64_t size = least(GROUP, panels) * NR * least(DEPTH, most(k, 1));
    Buffer<float> packed(threads * size), biases(panels * NR);
    for (int64_t o = 0; o < panels * NR; ++o) biases[o] = bias && o < n ? bias[o] : 0.0f;

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t job = 0; job < groups * parts; ++job) {
        const int64_t first = job / parts * GROUP, last = least(first + GROUP, panels);
        const int64_t top = job % parts * share, bottom = least(top + share, m);
        float* own = packed.get() + thread_number() * size;
        for (int64_t k0 = 0; k0 < most(k, 1); k0 += DEPTH) {
            const int64_t depth = least(DEPTH, k - k0);
            for (int64_t p = first; p < last; ++p) b.pack(p * NR, k0, depth, own + (p - first) * depth * NR);
            for (int64_t begin = top; begin < bottom; begin += ROWS)
                for (int64_t p = first; p < last; ++p)
                    add_product(x + k0, x_stride, own + (p - first) * depth * NR, depth,
                                bias && k0 + DEPTH >= k ? biases.get() + p * NR : nullptr, k0 > 0 || accumulate,
                                out + p * NR, out_stride, n - p * NR, begin, least(begin + ROWS, bottom));
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
