// Packed panels and the register tile behind gram, cross_gram and linear.
//
// A tile is MR×NR outputs, all in registers. Operand b is a packed panel [k][NR]; operand a is read by
// broadcasts, from a panel (gram: consecutive columns) or from rows of the matrix itself (linear).
// A bfloat16 panel holds two tokens per 32-bit lane, [k/2][NR]; vdpbf16ps adds both products to a float32 lane,
// so the loop is the same.
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

struct Dot32 {
    static inline vf step(vf sum, float a, vf b) { return sum + splat(a) * b; }
};

#if defined(__AVX512BF16__)
struct Dot16 {
    static inline vf step(vf sum, float a, vf b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)(splat(a)), (__m512bh)(b));
    }
};
#endif

// acc [MR][NV] = Σ_k a_r[k·a_step] · b[k][NV vectors], rows of b `stride` floats apart
template <typename Dot, int A_STEP, int NV = 3>
inline void tile(const float* const* a, const float* b, int64_t k, vf (*acc)[NV], int64_t stride = NR) {
    vf sum[MR][NV] = {};
    const float* row[MR];
    for (int r = 0; r < MR; ++r) row[r] = a[r];
    for (int64_t i = 0; i < k; ++i, b += stride) {
        vf lanes[NV];
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) lanes[v] = load(b + v * VL);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const float x = row[r][i * A_STEP];
#pragma GCC unroll 3
            for (int v = 0; v < NV; ++v) sum[r][v] = Dot::step(sum[r][v], x, lanes[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = sum[r][v];
}

// Adds a tile to out; rows and columns beyond the matrix stay unwritten. bias: null, or the NR values of the panel.
template <bool ADD>
inline void store_tile(const vf acc[MR][3], float* out, int64_t stride, int64_t rows, int64_t columns,
                       const float* bias) {
    if (rows >= MR && columns >= NR) {
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
            for (int v = 0; v < 3; ++v) {
                float* p = out + r * stride + v * VL;
                vf value = ADD ? load(p) + acc[r][v] : acc[r][v];
                store(p, bias ? value + load(bias + v * VL) : value);
            }
        return;
    }
    float edge[MR][NR];
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < 3; ++v) store(&edge[r][v * VL], bias ? acc[r][v] + load(bias + v * VL) : acc[r][v]);
    for (int64_t r = 0; r < least(rows, MR); ++r)
        for (int64_t c = 0; c < least(columns, NR); ++c) {
            float* p = out + r * stride + c;
            *p = ADD ? *p + edge[r][c] : edge[r][c];
        }
}

// panel [count][NR] of columns first … first+NR of the tokens listed in rows (null: start, start+1, …).
template <typename T>
inline void pack_float(const Tokens& x, const int64_t* rows, int64_t start, int64_t count, int64_t first, bool round,
                       float* panel) {
    const int64_t width = least(NR, x.columns - first);
    for (int64_t t = 0; t < count; ++t, panel += NR) {
        const T* source = static_cast<const T*>(x.data) + (rows ? rows[start + t] : start + t) * x.stride + first;
        if (width == NR) {
            for (int c = 0; c < NR; ++c) panel[c] = to_float(source[c]);
        } else {
            for (int64_t c = 0; c < NR; ++c) panel[c] = c < width ? to_float(source[c]) : 0.0f;
        }
        if (round)
            for (int c = 0; c < NR; ++c) panel[c] = bits_float(uint32_t(round_bf16(panel[c])) << 16);
    }
}

inline uint16_t as_bf16(bf16 x) { return x.bits; }
template <typename T>
inline uint16_t as_bf16(T x) { return round_bf16(to_float(x)); }

// panel [ceil(count/2)][NR] of pairs of tokens, the first in the low half; an odd last token pairs with zeros.
template <typename T>
inline void pack_pairs(const Tokens& x, const int64_t* rows, int64_t start, int64_t count, int64_t first,
                       uint32_t* panel) {
    const int64_t width = least(NR, x.columns - first);
    for (int64_t t = 0; t < count; t += 2, panel += NR) {
        const bool pair = t + 1 < count;
        const auto at = [&](int64_t i) {
            return static_cast<const T*>(x.data) + (rows ? rows[i] : i) * x.stride + first;
        };
        const T *low = at(start + t), *high = at(start + t + (pair ? 1 : 0));
        const uint32_t use = pair ? ~0u : 0u;
        if (width == NR) {
            for (int c = 0; c < NR; ++c) panel[c] = as_bf16(low[c]) | ((uint32_t(as_bf16(high[c])) << 16) & use);
        } else {
            for (int64_t c = 0; c < NR; ++c)
                panel[c] = c < width ? as_bf16(low[c]) | ((uint32_t(as_bf16(high[c])) << 16) & use) : 0;
        }
    }
}

}  // namespace
}  // namespace pyprune
