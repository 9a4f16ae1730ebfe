// Vectors and conversions for the instruction set this translation unit is compiled for.
// GCC/Clang vector types, so that one source serves AVX-512, AVX2, SSE2 and NEON; intrinsics only where
// the language has no word (bfloat16 dot products, half conversions).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "common.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyprune {
namespace {  // internal linkage: another instruction set's copy must never be linked in its place

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 8;  // MR×3 accumulators, 3 operands and a broadcast fit the registers
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 4;
#else
constexpr int VL = 4, MR = 4;
#endif
constexpr int NR = 3 * VL;  // width of a packed panel; MR divides it

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }  // a broadcast alone: x + 0 would be an addition, for −0 + 0 is not −0

inline uint16_t round_bf16(float x) {  // nearest even, NaN stays NaN
    const uint32_t bits = float_bits(x);
    const uint16_t rounded = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t((bits >> 16) | 0x40) : rounded;
}

inline uint16_t round_f16(float x) {  // nearest even, NaN stays NaN
    const uint32_t sign = float_bits(x) >> 16 & 0x8000u, magnitude = float_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // from 65,520 on the nearest is infinity
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves multiples of 2^-24 in the mantissa
        return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

// Threads worth waking for so many cycles of work. Where other programs compete for the cores, every parallel region can
// cost a time slice, so one that saves less than about 30 µs runs alone.
inline int worth(int threads, double cycles) {
    const double most_useful = cycles / 150e3;
    return most_useful < 2 ? 1 : most_useful < threads ? int(most_useful) : threads;
}

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Scratch memory, 64-byte aligned, freed at the end of the scope. Allocate outside parallel regions: throws.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }
    T& operator[](int64_t i) { return data_[i]; }

  private:
    T* data_;
};

// Shuffles with constant lanes: lane I of the result is lane I of a, or lane I − VL of b.
#if defined(__clang__)
template <int... I>
inline vf pick(vf a, vf b) { return __builtin_shufflevector(a, b, I...); }
#else
template <int... I>
inline vf pick(vf a, vf b) { return __builtin_shuffle(a, b, vi{I...}); }
#endif
template <int S, int... L>
inline void exchange(vf& a, vf& b, std::integer_sequence<int, L...>) {
    const vf low = pick<((L & S) ? VL + L - S : L)...>(a, b);
    b = pick<((L & S) ? VL + L : L + S)...>(a, b);
    a = low;
}
template <int S>
inline void exchange_all(vf* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, VL>{});
}
// VL×VL in registers: swap the off-diagonal blocks of size 1, 2, 4, …
inline void transpose(vf* rows) {
    exchange_all<1>(rows);
    exchange_all<2>(rows);
    if constexpr (VL > 4) exchange_all<4>(rows);
    if constexpr (VL > 8) exchange_all<8>(rows);
}

// VL values as float32.
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef int8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));
inline vf load(const bf16* p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vi) << 16);
}
inline vf load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf x;
    for (int i = 0; i < VL; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}
template <typename T>
inline vf load_some(const T* p, int64_t count) {  // lanes from count on are 0
    T tail[VL] = {};
    for (int64_t i = 0; i < least(count, VL); ++i) tail[i] = p[i];
    return load(tail);
}
inline void put_floats(float* p, vf x, int64_t count) {  // the first count lanes
    if (count >= VL) return store(p, x);
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}
inline vf greater(vf a, vf b) { return a > b ? a : b; }  // b where a is NaN
inline float add_lanes(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float sum[VL];
    store(sum, x);
    for (int step = VL / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
    return sum[0];
#endif
}
inline float largest_lane(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    float most[VL];
    store(most, x);
    for (int step = VL / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) most[i] = most[i + step] > most[i] ? most[i + step] : most[i];
    return most[0];
#endif
}
inline vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
inline bool any(vi lanes) {
    int32_t seen = 0;
    for (int i = 0; i < VL; ++i) seen |= lanes[i];
    return seen != 0;
}
inline void store_bool(uint8_t* p, vi keep) {  // keep lanes are 0 or −1
    *reinterpret_cast<vb_any*>(p) = __builtin_convertvector(keep, vb) & 1;
}
// Zero the dropped lanes where they lie: the kept bits do not change, the dropped become +0.
inline void zero_dropped(float* p, vi keep) { store(p, (vf)((vi)load(p) & keep)); }
template <typename T>
inline void zero_dropped(T* p, vi keep) {
    vh_any* bits = reinterpret_cast<vh_any*>(p);
    *bits &= (vh_any)__builtin_convertvector(keep, vh);
}


}  // namespace
}  // namespace pyprune
