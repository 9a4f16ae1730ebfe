// What one weight, one group and one quadruple mean: the row-wise mathematics of the CPU and the CUDA kernels.
// Everything is static, so that translation units built for different instruction sets do not share a copy.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PYPRUNE_HD static __host__ __device__ __forceinline__
#define PYPRUNE_UNROLL _Pragma("unroll")
#define PYPRUNE_ROLL _Pragma("unroll 1")
#else
#define PYPRUNE_HD static inline
#define PYPRUNE_ROLL
#ifdef PYPRUNE_SIM
#define PYPRUNE_UNROLL
#else
#define PYPRUNE_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace pyprune {

enum DType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

PYPRUNE_HD uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

PYPRUNE_HD float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

PYPRUNE_HD float to_float(float x) { return x; }

PYPRUNE_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

PYPRUNE_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    // Exponent and mantissa moved to float32's places, then scaled by 2^112: exact, subnormals included.
    const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return bits_float(sign | 0x7f800000u | magnitude);  // inf, NaN
    return bits_float(sign | float_bits(bits_float(magnitude) * bits_float(0x77800000u)));
#endif
}

constexpr uint32_t INFINITE_KEY = 0x7f800000u;  // keys above it are NaN

// |w|·scale as an integer of the same order (scale ≥ 0). −0.0 and 0.0 are one key; every NaN lies above infinity.
PYPRUNE_HD uint32_t score_key(float w, float scale) { return float_bits(w * scale) & 0x7fffffffu; }

// Bit i set where the i-th of m scores is among the n largest; among equals the lower index is dropped first.
// Counts ranks instead of sorting: no branches, and the keys stay in registers.
template <int M>
PYPRUNE_HD uint32_t keep_largest(const uint32_t (&key)[M], int m, int n) {
    uint32_t kept = 0;
    PYPRUNE_UNROLL
    for (int i = 0; i < M; ++i) {
        int rank = 0;
        PYPRUNE_UNROLL
        for (int j = 0; j < M; ++j) rank += int(j < m) & int(j < i ? key[j] <= key[i] : key[j] < key[i]);
        kept |= uint32_t(i < m && rank >= m - n) << i;
    }
    return kept;
}

// Code of a quadruple from its non-zero bits: index of the first value | index of the second << 2. With fewer than two
// non-zeros a zero is named, with more the surplus is lost; the choices are those of torch's own converter.
PYPRUNE_HD uint32_t quadruple_code(uint32_t nonzero) {
    const uint32_t m0 = nonzero & 1, m1 = nonzero >> 1 & 1, m3 = nonzero >> 3 & 1;
    const uint32_t both = m0 & m1, second = (m0 ^ 1) & m1, neither = (m0 ^ 1) & (m1 ^ 1);
    return second | neither << 1 | (both | neither | m3) << 2 | (second | (m1 ^ 1)) << 3;
}

// Where the metadata word of (row, column of words) lies in the reordered array: rows are dealt in groups of 32, the
// 2×2 blocks transposed, and column pairs interleaved, so the number of word columns must be even.
PYPRUNE_HD int64_t metadata_offset(int64_t row, int64_t column, int64_t rows) {
    int64_t to = row / 32 * 32 + row % 8 * 4 + row % 32 / 8;
    const int64_t shift = int64_t(to % 2 == 0 && column % 2 == 1) - int64_t(to % 2 == 1 && column % 2 == 0);
    to += shift;
    column -= shift;
    return column / 2 * rows * 2 + to * 2 + column % 2;
}

}  // namespace pyprune
