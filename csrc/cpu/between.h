// What a block does between its products: RMSNorm, rotary embedding, SiLU gate. One pass each.
//
// Bytes: every operand once. Sums and products are float32, rounded to the tensors' type at the places where PyTorch
// rounds when the same is written out operator by operator, so that results differ by the order of a sum at most.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/simd.h"

namespace pyprune {
namespace {

// x as it is after a round trip through T, and its store there; the last argument only names T.
inline vf rounded(vf x, const float*) { return x; }
#if defined(__AVX512BF16__)  // numbers below 1.2e-38 become zero, as that instruction has it
inline __m256i upper(vf x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline vf rounded(vf x, const bf16*) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper(x)), 16); }
inline void put(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper(x)); }
#else
inline vf rounded(vf x, const bf16*) {
    const vi bits = (vi)x, up = bits + 0x7fff + ((bits >> 16) & 1), nan = (bits & 0x7fffffff) > 0x7f800000;
    return (vf)(((up & ~nan) | ((bits | 0x400000) & nan)) & int32_t(0xffff0000u));
}
inline void put(bf16* p, vf x) {
    const vi bits = (vi)rounded(x, p);
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)bits, 16)));
#elif defined(__AVX2__)
    const __m256i words = _mm256_srli_epi32((__m256i)bits, 16), packed = _mm256_packus_epi32(words, words);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
    *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bits >> 16, vh);
#endif
}
#endif
#if defined(__AVX512F__)
inline __m256i halves(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf rounded(vf x, const f16*) { return _mm512_cvtph_ps(halves(x)); }
inline void put(f16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(x)); }
#elif defined(__F16C__)
inline __m128i halves(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline vf rounded(vf x, const f16*) { return _mm256_cvtph_ps(halves(x)); }
inline void put(f16* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(x)); }
#else
inline vf rounded(vf x, const f16*) {
    for (int i = 0; i < VL; ++i) x[i] = to_float(f16{round_f16(x[i])});
    return x;
}
inline void put(f16* p, vf x) {
    for (int i = 0; i < VL; ++i) p[i].bits = round_f16(x[i]);
}
#endif
inline void put(float* p, vf x) { store(p, x); }
template <typename T>
inline void put_some(T* p, vf x, int64_t count) {  // the first count lanes
    if (count >= VL) return put(p, x);
    T lanes[VL];
    put(lanes, x);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
template <typename T>
inline vf take(const T* p, int64_t count) { return count >= VL ? load(p) : load_some(p, count); }

template <typename F>
inline void with_type(int type, const F& f) {
    if (type == FLOAT32) return f((float*)nullptr);
    if (type == BFLOAT16) return f((bf16*)nullptr);
    f((f16*)nullptr);
}

inline float sum_of(vf x) {
    float sum = 0;
    for (int i = 0; i < VL; ++i) sum += x[i];
    return sum;
}

// eˣ within 2 units in the last place: x = n ln 2 + r, |r| ≤ ln 2 / 2, a polynomial in r, n into the exponent.
inline vf exponential(vf x) {
    const vi high = x > splat(88.72f), low = x < splat(-87.3f);
    vf y = (vf)(((vi)x & ~(high | low)) | ((vi)splat(88.72f) & high) | ((vi)splat(-87.3f) & low));
    const vf shifted = y * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: the nearest integer is in the low bits
    const vf n = shifted - 12582912.0f;
    y = y - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    const vi half = ((vi)shifted - 0x4b400000) >> 1, rest = (vi)shifted - 0x4b400000 - half;  // 2¹²⁸ is two factors
    p = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    return (vf)(((vi)p & ~(high | low)) | (0x7f800000 & high));
}

// out [rows, columns] = x / sqrt(mean x² + eps), times the weight: rounded before (NARROW), after (WIDE), or as 1 + w
// (OFFSET, which rounds after as well).
enum NormForm { NARROW = 0, WIDE = 1, OFFSET = 2 };

template <typename T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t columns, float eps, int form) {
    vf sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * VL <= columns; c += 4 * VL)
        for (int i = 0; i < 4; ++i) {
            const vf v = load(x + c + i * VL);
            sums[i] += v * v;
        }
    for (; c < columns; c += VL) {
        const vf v = take(x + c, columns - c);
        sums[0] += v * v;
    }
    const float mean = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(columns);
    const float scale = 1 / std::sqrt(mean + eps);
    for (c = 0; c < columns; c += VL) {
        const int64_t left = columns - c;
        vf y = take(x + c, left) * scale, w = take(weight + c, left);
        if (form == NARROW) y = rounded(y, x);
        if (form == OFFSET) w += 1.0f;
        put_some(out + c, y * w, left);
    }
}

void rms_norm(const void* x, int64_t stride, int64_t rows, int64_t columns, int type, const void* weight, float eps,
              int form, void* out, int threads) {
    with_type(type, [&](auto* kind) {
        typedef typename std::remove_pointer<decltype(kind)>::type T;
#pragma omp parallel for schedule(static) num_threads(worth(threads, double(rows) * columns))
        for (int64_t i = 0; i < rows; ++i)
            norm_row(static_cast<const T*>(x) + i * stride, static_cast<const T*>(weight),
                     static_cast<T*>(out) + i * columns, columns, eps, form);
    });
}

// out = gate · sigmoid(gate) · up, all of count numbers
void swiglu(const void* gate, const void* up, void* out, int64_t count, int type, int threads) {
    constexpr int64_t PART = 4096;
    with_type(type, [&](auto* kind) {
        typedef typename std::remove_pointer<decltype(kind)>::type T;
        const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
        T* o = static_cast<T*>(out);
#pragma omp parallel for schedule(static) num_threads(worth(threads, 2.0 * count))
        for (int64_t start = 0; start < count; start += PART) {
            const int64_t stop = least(start + PART, count);
            for (int64_t i = start; i < stop; i += VL) {
                const int64_t left = stop - i;
                const vf x = take(g + i, left), silu = rounded(x / (1.0f + exponential(-x)), g);
                put_some(o + i, silu * take(u + i, left), left);
            }
        }
    });
}

// out = x · cos + rotated · sin, where rotated is (−second half, first half) of the d numbers of a token and a head
void rotary(const HeadsView& x, const HeadsView& out, const void* cos, const void* sin, const int64_t* cos_strides,
            const int64_t* sin_strides, int type, int threads) {
    const int64_t half = x.d / 2;
    with_type(type, [&](auto* kind) {
        typedef typename std::remove_pointer<decltype(kind)>::type T;
#pragma omp parallel for schedule(static) num_threads(worth(threads, double(x.batch) * x.tokens * x.heads * x.d))
        for (int64_t i = 0; i < x.batch * x.tokens; ++i) {
            const int64_t b = i / x.tokens, t = i % x.tokens;
            const T* c = static_cast<const T*>(cos) + b * cos_strides[0] + t * cos_strides[1];
            const T* s = static_cast<const T*>(sin) + b * sin_strides[0] + t * sin_strides[1];
            for (int64_t h = 0; h < x.heads; ++h) {
                const T* p = static_cast<const T*>(x.data) + b * x.strides[0] + h * x.strides[1] + t * x.strides[2];
                T* q = static_cast<T*>(out.data) + b * out.strides[0] + h * out.strides[1] + t * out.strides[2];
                for (int64_t k = 0; k < half; k += VL) {
                    const int64_t left = half - k;
                    const vf first = take(p + k, left), second = take(p + half + k, left);
                    const vf a = rounded(first * take(c + k, left), p), z = rounded(second * take(s + k, left), p);
                    const vf e = rounded(second * take(c + half + k, left), p);
                    const vf f = rounded(first * take(s + half + k, left), p);
                    put_some(q + k, a - z, left);
                    put_some(q + half + k, e + f, left);
                }
            }
        }
    });
}

}  // namespace
}  // namespace pyprune
