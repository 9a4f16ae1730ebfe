// What the register tile sustains from the first-level cache: the ceiling that benchmarks report shares of.
#pragma once

#include "cpu/gram.h"

namespace pyprune {
namespace {

// Runs repeats tiles on each thread; returns the FLOPs done. pairs: bfloat16 products where the processor has them.
double tile_flops(bool pairs, int64_t repeats, int threads) {
    constexpr int64_t STEPS = 128;
    pairs = pairs && use_pairs(BFLOAT16, true);
    Buffer<float> panels(int64_t(threads) * 2 * STEPS * NR), out(int64_t(threads) * NR * NR);
    for (int64_t i = 0; i < int64_t(threads) * 2 * STEPS * NR; ++i) panels[i] = 0;
    for (int64_t i = 0; i < int64_t(threads) * NR * NR; ++i) out[i] = 0;
    const int64_t count = pairs ? 2 * STEPS : STEPS;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t)
        for (int64_t i = 0; i < repeats; ++i) {
            const float* a = panels.get() + t * 2 * STEPS * NR;
            add_panels(pairs, a, a + STEPS * NR, count, out.get() + t * NR * NR, NR, MR, NR);
        }
    return 2.0 * double(count) * MR * NR * double(repeats) * threads;
}

}  // namespace
}  // namespace pyprune
