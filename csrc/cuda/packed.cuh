// A packed weight (pyprune/ops/packed.py has the layout) as the kernels of its products read it.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int WORD = 64;  // columns of a word of the mask

template <class T>
struct PackedRows {
    const uint8_t* mask;
    int64_t width;  // bytes of a row's mask
    const T* values;
    const int64_t* offsets;
    int64_t rows;
    int columns;
    bool whole;  // 8-byte loads of the mask
};

// The bits of columns 64·word … of a row, 0 behind the last.
template <class T>
__device__ __forceinline__ uint64_t row_word(const PackedRows<T>& w, int64_t row, int word) {
    const uint8_t* p = w.mask + row * w.width + int64_t(word) * 8;
    const int64_t left = w.width - int64_t(word) * 8;
    uint64_t bits = 0;
    if (left <= 0) return bits;
    if (w.whole) {
        const uint2 both = *reinterpret_cast<const uint2*>(p);  // memcpy would read bytes
        return uint64_t(both.y) << 32 | both.x;
    }
    PYPRUNE_ROLL
    for (int i = 0; i < 8; ++i)
        if (i < left) bits |= uint64_t(p[i]) << (8 * i);
    return bits;
}

__device__ __forceinline__ float from_float(float x, float*) { return x; }
#ifdef PYPRUNE_SIM
inline bf16 from_float(float x, bf16*) {
    const uint32_t bits = float_bits(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline f16 from_float(float x, f16*) {
    const _Float16 y = static_cast<_Float16>(x);
    f16 bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#else
__device__ __forceinline__ bf16 from_float(float x, bf16*) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
__device__ __forceinline__ f16 from_float(float x, f16*) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#endif

template <class T>
struct Product {
    PackedRows<T> w;
    const T* x;
    int64_t x_stride;
    const T* bias;
    T* out;
    bool whole;  // x in loads of two columns, of eight by the tensor cores
};

// Tensor core products of 2 to 16 tokens; the values lie on 16 bytes. T is bf16 or f16.
template <class T>
void sparse_linear_mma(const Launcher& launch, const Product<T>& a, int tokens);

template <class T>
PackedRows<T> packed_rows(const Packed& w) {
    return {w.mask, w.width, static_cast<const T*>(w.values), w.offsets, w.rows, int(w.columns),
            w.width % 8 == 0 && aligned(w.mask, 0, 8)};
}

}  // namespace pyprune::cuda
