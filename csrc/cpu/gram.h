// gram += xᵀx and cross += yᵀx.
//
// FLOPs: tokens·c² (the lower tiles only; the library computes 2·tokens·c²). Bytes: x once, gram/(CHUNK tokens) twice.
// Chunks of CHUNK tokens are packed into panels of NR columns, then every lower panel pair adds its NR×NR tile;
// the upper triangle is copied at the end, so the result is symmetric to the bit. Each chunk sums in registers and is
// then added to gram: a blocked sum, more accurate than one long one.
#pragma once

#include "cpu/gemm.h"

namespace pyprune {
namespace {

constexpr int64_t CHUNK = 512;
constexpr int64_t STEPS = VL == 16 ? CHUNK : 128;  // both panels' parts fit a first-level cache of 32 KiB (see product.h)

inline void pack(const Tokens& x, const int64_t* rows, int64_t start, int64_t count, int64_t first, bool pairs,
                 bool round, float* panel) {
    uint32_t* packed = reinterpret_cast<uint32_t*>(panel);
    if (x.type == FLOAT32)
        pairs ? pack_pairs<float>(x, rows, start, count, first, packed)
              : pack_float<float>(x, rows, start, count, first, round, panel);
    else if (x.type == BFLOAT16)
        pairs ? pack_pairs<bf16>(x, rows, start, count, first, packed)
              : pack_float<bf16>(x, rows, start, count, first, false, panel);
    else
        pairs ? pack_pairs<f16>(x, rows, start, count, first, packed)
              : pack_float<f16>(x, rows, start, count, first, round, panel);
}

// sums [NR] (float64) += column sums of a panel.
inline void add_sums(const float* panel, int64_t count, bool pairs, int64_t width, double* sums) {
    float total[NR] = {};
    const uint32_t* packed = reinterpret_cast<const uint32_t*>(panel);
    for (int64_t t = 0; t < (pairs ? ceil_div(count, 2) : count); ++t)
        for (int c = 0; c < NR; ++c)
            total[c] += pairs ? bits_float(packed[t * NR + c] << 16) + bits_float(packed[t * NR + c] & 0xffff0000u)
                              : panel[t * NR + c];
    for (int64_t c = 0; c < width; ++c) sums[c] += total[c];
}

template <typename Dot>
inline void add_panel(const float* a, const float* b, int64_t steps, float* out, int64_t stride, int64_t rows,
                      int64_t columns) {
    vf acc[MR][3];
    for (int64_t start = 0; start < steps; start += STEPS)
        for (int64_t i = 0; i < least(rows, NR); i += MR) {
            const float* lanes[MR];
            for (int r = 0; r < MR; ++r) lanes[r] = a + start * NR + i + r;
            tile<Dot, NR>(lanes, b + start * NR, least(STEPS, steps - start), acc);
            store_tile<true>(acc, out + i * stride, stride, rows - i, columns, nullptr);
        }
}

inline void add_panels(bool pairs, const float* a, const float* b, int64_t count, float* out, int64_t stride,
                       int64_t rows, int64_t columns) {
#if defined(__AVX512BF16__)
    if (pairs) return add_panel<Dot16>(a, b, ceil_div(count, 2), out, stride, rows, columns);
#endif
    add_panel<Dot32>(a, b, count, out, stride, rows, columns);
}

inline bool use_pairs(int type, bool round) {
#if defined(__AVX512BF16__)
    return type == BFLOAT16 || round;
#else
    return (void)type, (void)round, false;
#endif
}

// Token numbers that count; returns how many.
inline int64_t list_tokens(const uint8_t* mask, int64_t tokens, int64_t* rows) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t)
        if (mask[t]) rows[count++] = t;
    return count;
}

// out [ca, cb] += aᵀb over the counted tokens; lower tiles only if the operands are the same.
inline void accumulate(float* out, const Tokens& a, const Tokens& b, bool symmetric, bool round, double* sums,
                       int64_t* counted, int threads) {
    threads = worth(threads, 0.5 * double(a.columns) * double(b.columns) * double(b.tokens) / VL);
    Buffer<int64_t> list(b.mask ? b.tokens : 1);
    const int64_t* rows = b.mask ? list.get() : nullptr;
    const int64_t tokens = b.mask ? list_tokens(b.mask, b.tokens, list.get()) : b.tokens;
    *counted = tokens;
    const bool pairs = use_pairs(b.type, round);
    const int64_t na = ceil_div(a.columns, NR), nb = ceil_div(b.columns, NR), size = NR * least(CHUNK, most(tokens, 1));
    Buffer<float> panels_b(nb * size), panels_a(symmetric ? 1 : na * size);
    float* pb = panels_b.get();
    float* pa = symmetric ? pb : panels_a.get();

#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        const int64_t count = least(CHUNK, tokens - start);
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < nb + (symmetric ? 0 : na); ++p) {
            float* panel = p < nb ? pb + p * size : pa + (p - nb) * size;
            const int64_t first = (p < nb ? p : p - nb) * NR;
            pack(p < nb ? b : a, rows, start, count, first, pairs, round, panel);
            if (sums && p < nb) add_sums(panel, count, pairs, least(NR, b.columns - first), sums + first);
        }
        // Longest rows of tiles first, so that the threads finish together.
#pragma omp for schedule(dynamic, 1)
        for (int64_t q = 0; q < na; ++q) {
            const int64_t i = na - 1 - q;
            for (int64_t j = 0; j < (symmetric ? i + 1 : nb); ++j)
                add_panels(pairs, pa + i * size, pb + j * size, count, out + i * NR * b.columns + j * NR, b.columns,
                           a.columns - i * NR, b.columns - j * NR);
        }
    }
}

inline void mirror(float* gram, int64_t c, int threads) {
    constexpr int64_t B = 32;
    threads = worth(threads, double(c) * double(c));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < c; i += B)
        for (int64_t j = 0; j <= i; j += B)
            for (int64_t r = i; r < least(i + B, c); ++r)
                for (int64_t s = j; s < least(j + B, r); ++s) gram[s * c + r] = gram[r * c + s];
}

void gram(float* out, const Tokens& x, float* sums, int64_t* count, bool round, int threads) {
    Buffer<double> totals(x.columns);
    for (int64_t c = 0; c < x.columns; ++c) totals[c] = 0;
    int64_t counted = 0;
    accumulate(out, x, x, true, round, sums ? totals.get() : nullptr, &counted, threads);
    mirror(out, x.columns, threads);
    if (sums)
        for (int64_t c = 0; c < x.columns; ++c) sums[c] = float(sums[c] + totals[c]);
    if (count) *count += counted;
}

void cross_gram(float* out, const Tokens& y, const Tokens& x, int threads) {
    int64_t counted = 0;
    accumulate(out, y, x, false, false, nullptr, &counted, threads);
}

}  // namespace
}  // namespace pyprune
