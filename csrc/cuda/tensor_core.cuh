// Tensor core products and what lays out their operands, one function per PTX instruction. Lane 4g + t is (g, t).
#pragma once

#include "cuda/device.cuh"

namespace pyprune::cuda {

#ifdef PYPRUNE_SIM
using cusim::permute_bytes;
using cusim::shift_bits;
using cusim::shift_bytes;
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    cusim::mma_16x8x16(d, a, b, [](uint16_t bits) { return to_float(T{bits}); });
}
#else
// Four bytes of high:low; each nibble of the selector names one, 0 the lowest of low, 4 that of high.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
    return out;
}

// The lower word of high:low >> by, for 0 to 32 bits.
__device__ __forceinline__ uint32_t shift_bits(uint32_t low, uint32_t high, uint32_t by) {
    uint32_t out;
    asm("shf.r.clamp.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(by));
    return out;
}

// The same by `by` modulo 4 bytes.
__device__ __forceinline__ uint32_t shift_bytes(uint32_t low, uint32_t high, uint32_t by) {
    uint32_t out;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(8 * by));
    return out;
}

// d [16, 8] += a [16, 16] b [16, 8]. a: rows g, g + 8 of columns 2t, 2t + 1, then of columns 2t + 8, 2t + 9; b: rows
// 2t, 2t + 1, then 2t + 8, 2t + 9, of column g; d: columns 2t, 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace pyprune::cuda
