// Products with packed weights: y [tokens, rows] = x [tokens, columns] Wᵀ + bias, W as a bitmask and its non-zero values
// (pyprune/ops/packed.py), and the expansion of some of its rows.
//
// Bytes: the packed weight, which is all that one token costs where the weight comes from memory. A step takes Unit's
// COLUMNS columns of a row: that many values are loaded, the bits of the mask spread them over the lanes, lanes without a
// bit become 0, and every token multiplies its x with the one register. The place of the next values depends on the
// bits by an addition alone: the counts of a 64-bit word are independent of it.
//
// A load takes up to REACH values although fewer may be left. Behind the last rows it would leave the array: their values
// are read from a copy with room behind it.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace pyprune {
namespace {

// The bits of one step of COLUMNS columns, shifted to the left by SCALE.
template <int COUNT, int SCALE = 0>
struct Steps {
    static constexpr int COLUMNS = COUNT;
    static inline uint64_t part(uint64_t bits, int step) {
        const int shift = step * COLUMNS - SCALE;
        return (shift >= 0 ? bits >> shift : bits << -shift) & ((uint64_t(1) << COLUMNS) - 1) << SCALE;
    }
};

// How one step of an instruction set works: COLUMNS, the type X that x is kept in, the expanded Weights, and multiply,
// which adds their products to the lanes of a sum. expand takes its bits as part gives them.
#if defined(__AVX512F__)
// Keeps a load out of the expanding instruction: with an operand in memory it is several times slower.
template <typename V>
inline V apart(V x) {
    asm("" : "+v"(x));
    return x;
}

template <typename T>
struct Unit : Steps<16> {
    typedef float X;
    typedef vf Weights;
    static inline Weights expand(const T* values, uint64_t bits) {
        return _mm512_maskz_expand_ps(__mmask16(bits), apart(load(values)));
    }
    static inline vf multiply(vf sum, Weights w, const float* x) { return sum + w * load(x); }
    static inline float as_x(T value) { return to_float(value); }
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <>
struct Unit<bf16> : Steps<32> {
    typedef bf16 X;
    typedef __m512i Weights;
    static inline Weights expand(const bf16* values, uint64_t bits) {
        return _mm512_maskz_expand_epi16(__mmask32(bits), apart(_mm512_loadu_si512(values)));
    }
    static inline vf multiply(vf sum, Weights w, const bf16* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)(_mm512_loadu_si512(x)), (__m512bh)(w));
    }
    static inline bf16 as_x(bf16 value) { return value; }
};
#endif
#elif defined(__AVX2__)
// Byte shuffles and lane permutations by a byte of the mask. A product uses one or two of the tables: they stay in the
// first-level cache. SCALE makes a byte the offset of its entry; shifted bits count the same.
struct Spread {
    alignas(64) uint8_t upper[256][32];   // vpshufb of eight 16-bit values, in both halves, to the upper half of each lane
    alignas(64) uint8_t halves[256][16];  // pshufb of eight 16-bit values; 0x80 makes a zero
    alignas(64) uint8_t words[256][8];    // vpermps of eight floats; 7, which is zero unless all are kept, for the others
    alignas(64) int32_t present[9][8];    // lanes below a count
    constexpr Spread() : upper(), halves(), words(), present() {
        for (int mask = 0; mask < 256; ++mask)
            for (int c = 0, next = 0; c < 8; ++c) {
                const bool kept = mask >> c & 1;
                for (int byte = 0; byte < 4; ++byte)
                    upper[mask][4 * c + byte] = uint8_t(kept && byte >= 2 ? 2 * next + byte - 2 : 0x80);
                halves[mask][2 * c] = uint8_t(kept ? 2 * next : 0x80);
                halves[mask][2 * c + 1] = uint8_t(kept ? 2 * next + 1 : 0x80);
                words[mask][c] = uint8_t(kept ? next : 7);
                next += kept;
            }
        for (int count = 0; count < 9; ++count)
            for (int c = 0; c < 8; ++c) present[count][c] = c < count ? -1 : 0;
    }
};
constexpr Spread SPREAD;

inline __m128i spread_halves(const void* values, uint64_t bits) {
    return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD.halves[0] + bits)));
}

template <typename T>
struct Unit;
template <>
struct Unit<float> : Steps<8, 3> {
    typedef float X;
    typedef vf Weights;
    static inline Weights expand(const float* values, uint64_t bits) {
        const __m256 present = _mm256_load_ps(reinterpret_cast<const float*>(SPREAD.present[_mm_popcnt_u64(bits)]));
        const __m256i lanes =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SPREAD.words[0] + bits)));
        return _mm256_permutevar8x32_ps(_mm256_and_ps(_mm256_loadu_ps(values), present), lanes);
    }
    static inline vf multiply(vf sum, Weights w, const float* x) { return sum + w * load(x); }
    static inline float as_x(float value) { return value; }
};
template <>
struct Unit<f16> : Steps<8, 4> {
    typedef float X;
    typedef vf Weights;
    static inline Weights expand(const f16* values, uint64_t bits) { return _mm256_cvtph_ps(spread_halves(values, bits)); }
    static inline vf multiply(vf sum, Weights w, const float* x) { return sum + w * load(x); }
    static inline float as_x(f16 value) { return to_float(value); }
};
template <>
struct Unit<bf16> : Steps<8, 5> {
    typedef float X;
    typedef vf Weights;
    static inline Weights expand(const bf16* values, uint64_t bits) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        return (vf)_mm256_shuffle_epi8(both, _mm256_load_si256(reinterpret_cast<const __m256i*>(SPREAD.upper[0] + bits)));
    }
    static inline vf multiply(vf sum, Weights w, const float* x) { return sum + w * load(x); }
    static inline float as_x(bf16 value) { return to_float(value); }
};
#else
template <typename T>
struct Unit : Steps<VL> {
    typedef float X;
    typedef vf Weights;
    static inline Weights expand(const T* values, uint64_t bits) {
        vf w = {};
        for (int c = 0; c < VL; ++c)
            if (bits >> c & 1) w[c] = to_float(*values++);
        return w;
    }
    static inline vf multiply(vf sum, Weights w, const float* x) { return sum + w * load(x); }
    static inline float as_x(T value) { return to_float(value); }
};
#endif

constexpr int WORD = 64;   // columns whose bits are read at once
constexpr int REACH = 32;  // values that one load takes at most
// Rows that pass together share a load of x and hide each other's waits. Each walks through memory of its own, in short
// pieces, which a processor's prefetching follows badly: asking LEAD bytes ahead takes a 4096×4096 from 1.3 to 0.6 ms.
constexpr int ROWS_AT_ONCE = 4;
constexpr int64_t LEAD = 8192;
constexpr int SUMS = VL == 16 ? 24 : 8, TOKENS = VL == 16 ? 8 : 4;  // sums and tokens that the registers hold

inline int count_bits(uint64_t bits) {
#if defined(__AVX2__)
    return int(_mm_popcnt_u64(bits));
#else
    return __builtin_popcountll(bits);
#endif
}

// Bits of columns 64·word …; a row's last word may be shorter.
inline uint64_t mask_word(const uint8_t* row, int64_t width, int64_t word) {
    uint64_t bits = 0;
    if (word * 8 + 8 <= width)
        std::memcpy(&bits, row + word * 8, 8);
    else
        std::memcpy(&bits, row + word * 8, size_t(width - word * 8));
    return bits;
}

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { p->bits = round_bf16(x); }
inline void put(f16* p, float x) { p->bits = round_f16(x); }

// Where the values of each row are read, so that REACH of them may be loaded at any place.
template <typename T>
class Values {
  public:
    explicit Values(const PackedView& w)
        : data_(static_cast<const T*>(w.values)), offsets_(w.offsets), tail_(w.rows), copy_(room(w)) {
        if (tail_ == w.rows) return;
        const int64_t count = w.offsets[w.rows] - w.offsets[tail_];
        if (count > 0) std::memcpy(copy_.get(), data_ + w.offsets[tail_], size_t(count) * sizeof(T));
        std::memset(copy_.get() + count, 0, sizeof(T) * REACH);
    }
    const T* row(int64_t i) const {
        return i < tail_ ? data_ + offsets_[i] : copy_.get() + (offsets_[i] - offsets_[tail_]);
    }

  private:
    int64_t room(const PackedView& w) {
        const int64_t safe = w.offsets[w.rows] - REACH;
        while (tail_ > 0 && w.offsets[tail_] > safe) --tail_;
        return w.offsets[w.rows] - w.offsets[tail_] + REACH;
    }
    const T* data_;
    const int64_t* offsets_;
    int64_t tail_;
    Buffer<T> copy_;
};

// sums [R][N] of R rows and N tokens, whose x lie together step by step: [step][N][COLUMNS], zeros behind their columns
template <typename T, int R, int N>
inline void rows_by_tokens(const uint8_t* const* masks, const T* const* starts, const int64_t* ahead, int64_t width,
                           const typename Unit<T>::X* x, vf (*sums)[N]) {
    typedef Unit<T> U;
    constexpr int STEPS = WORD / U::COLUMNS;
    vf sum[R][N] = {}, odd[R] = {};
    const T* values[R];
    for (int r = 0; r < R; ++r) values[r] = starts[r];
    const int64_t whole = width / 8;
    const auto take = [&](int64_t word, const uint64_t (&bits)[R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int line = 0; line < int(sizeof(T) / 2); ++line)
                __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + ahead[r] + 64 * line);
        const typename U::X* at = x + word * WORD * N;
        if constexpr (N == 1 && VL < 16) {  // a row after the other: few scalar registers, and x is an operand in memory
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const T* from = values[r];
#pragma GCC unroll 16
                for (int step = 0; step < STEPS; ++step) {
                    const uint64_t part = U::part(bits[r], step);
                    vf& to = step % 2 ? odd[r] : sum[r][0];
                    to = U::multiply(to, U::expand(from, part), at + step * U::COLUMNS);
                    from += count_bits(part);
                }
                values[r] = from;
            }
        } else {  // a load of x serves all rows
#pragma GCC unroll 16
            for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const uint64_t part = U::part(bits[r], step);
                    const typename U::Weights w = U::expand(values[r], part);
                    values[r] += count_bits(part);
#pragma GCC unroll 8
                    for (int n = 0; n < N; ++n)
                        sum[r][n] = U::multiply(sum[r][n], w, at + (step * N + n) * U::COLUMNS);
                }
        }
    };
    uint64_t bits[R];
    for (int64_t word = 0; word < whole; ++word) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) std::memcpy(&bits[r], masks[r] + word * 8, 8);
        take(word, bits);
    }
    if (width % 8) {
        for (int r = 0; r < R; ++r) bits[r] = mask_word(masks[r], width, whole);
        take(whole, bits);
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = n == 0 ? sum[r][n] + odd[r] : sum[r][n];
}

template <typename T, int N>
void tokens_by_rows(const PackedView& w, const Values<T>& values, const typename Unit<T>::X* x, const T* bias,
                    T* out, int64_t out_stride, int64_t begin, int64_t end) {
    constexpr int R = SUMS / N < ROWS_AT_ONCE ? SUMS / N : ROWS_AT_ONCE;
    const int64_t lead = R * ceil_div(LEAD, R * w.columns * int64_t(sizeof(T)) / 2 + 1);
    for (int64_t i = begin; i < end; i += R) {
        const uint8_t* masks[R];
        const T* starts[R];
        int64_t ahead[R];
        for (int r = 0; r < R; ++r) {  // rows behind the last repeat it, and are left out below
            const int64_t row = least(i + r, end - 1);
            masks[r] = w.mask + row * w.width;
            starts[r] = values.row(row);
            ahead[r] = (w.offsets[least(row + lead, w.rows)] - w.offsets[row]) * int64_t(sizeof(T));
            for (int64_t byte = 0; byte < w.width; byte += 64) __builtin_prefetch(masks[r] + lead * w.width + byte);
        }
        vf sums[R][N];
        rows_by_tokens<T, R, N>(masks, starts, ahead, w.width, x, sums);
        for (int64_t r = 0; r < least(R, end - i); ++r)
            for (int n = 0; n < N; ++n)
                put(out + n * out_stride + i + r, add_lanes(sums[r][n]) + (bias ? to_float(bias[i + r]) : 0.0f));
    }
}

template <typename T>
void sparse_rows(const PackedView& w, const T* x, int64_t x_stride, int64_t tokens, const T* bias, T* out,
                 int64_t out_stride, int threads) {
    typedef Unit<T> U;
    constexpr int64_t CHUNK = 32;  // rows a thread takes at a time: their values stay in its cache for further tokens
    const int64_t padded = ceil_div(w.columns, WORD) * WORD;
    Buffer<typename U::X> kept(tokens * most(padded, 1));
    for (int64_t t = 0; t < tokens; ++t) {  // groups of TOKENS, the last one of what is left
        const int64_t first = t / TOKENS * TOKENS, group = least(TOKENS, tokens - first);
        typename U::X* to = kept.get() + first * padded + (t - first) * U::COLUMNS;
        for (int64_t c = 0; c < padded; ++c)
            to[c / U::COLUMNS * group * U::COLUMNS + c % U::COLUMNS] =
                c < w.columns ? U::as_x(x[t * x_stride + c]) : typename U::X{};
    }
    const Values<T> values(w);
    const typename U::X* all = kept.get();
    threads = worth(threads, double(w.rows * padded) * (0.2 + 0.05 * double(tokens)));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < ceil_div(w.rows, CHUNK); ++chunk) {
        const int64_t begin = chunk * CHUNK, end = least(begin + CHUNK, w.rows);
        for (int64_t t = 0; t < tokens; t += TOKENS) {
            const auto run = [&](auto n) {
                tokens_by_rows<T, decltype(n)::value>(w, values, all + t * padded, bias, out + t * out_stride,
                                                      out_stride, begin, end);
            };
            switch (least(TOKENS, tokens - t)) {
                case 1: run(std::integral_constant<int, 1>{}); break;
                case 2: run(std::integral_constant<int, 2>{}); break;
                case 3: run(std::integral_constant<int, 3>{}); break;
                case 4: run(std::integral_constant<int, 4>{}); break;
                case 5: run(std::integral_constant<int, TOKENS < 5 ? 4 : 5>{}); break;
                case 6: run(std::integral_constant<int, TOKENS < 5 ? 4 : 6>{}); break;
                case 7: run(std::integral_constant<int, TOKENS < 5 ? 4 : 7>{}); break;
                default: run(std::integral_constant<int, TOKENS>{});
            }
        }
    }
}

// 64 columns of a row. A number's bits are moved, not read, so the 16-bit types share their code.
template <typename T>
inline void spread(const T* values, uint64_t bits, T* out) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        for (int step = 0; step < 4; ++step, bits >>= 16, out += 16) {
            _mm512_storeu_si512(out, _mm512_maskz_expand_epi32(__mmask16(bits), apart(_mm512_loadu_si512(values))));
            values += count_bits(bits & 0xffff);
        }
        return;
    }
#if defined(__AVX512VBMI2__)
    for (int step = 0; step < 2; ++step, bits >>= 32, out += 32) {
        _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(__mmask32(bits), apart(_mm512_loadu_si512(values))));
        values += count_bits(bits & 0xffffffff);
    }
#else
    for (int step = 0; step < 4; ++step, bits >>= 16, out += 16) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(bits), wide)));
        values += count_bits(bits & 0xffff);
    }
#endif
#elif defined(__AVX2__)
    typedef std::conditional_t<sizeof(T) == 4, Unit<float>, Unit<f16>> U;
    for (int step = 0; step < 8; ++step, out += 8) {
        const uint64_t part = U::part(bits, step);
        if constexpr (sizeof(T) == 4)
            store(out, U::expand(values, part));
        else
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), spread_halves(values, part));
        values += count_bits(part);
    }
#else
    for (int c = 0; c < WORD; ++c) out[c] = bits >> c & 1 ? *values++ : T{};
#endif
}

template <typename T>
void expand_rows(const PackedView& w, int64_t first, int64_t count, T* out, int threads) {
    const Values<T> values(w);
    threads = worth(threads, 0.15 * double(count * w.columns));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = first; i < first + count; ++i) {
        const uint8_t* mask = w.mask + i * w.width;
        const T* from = values.row(i);
        T* to = out + (i - first) * w.columns;
        for (int64_t c = 0; c < w.columns; c += WORD) {
            const uint64_t bits = mask_word(mask, w.width, c / WORD);
            for (int64_t line = 0; line < int64_t(sizeof(T)); line += 2)
                __builtin_prefetch(reinterpret_cast<const char*>(from) + LEAD / 4 + 32 * line);
            if (w.columns - c >= WORD) {
                spread(from, bits, to + c);
            } else {
                T last[WORD];
                spread(from, bits, last);
                std::memcpy(to + c, last, size_t(w.columns - c) * sizeof(T));
            }
            from += count_bits(bits);
        }
    }
}

void expand_bitmask(const PackedView& w, int64_t first, int64_t count, void* out, int threads) {
    w.type == FLOAT32 ? expand_rows(w, first, count, static_cast<float*>(out), threads)
                      : expand_rows(w, first, count, static_cast<f16*>(out), threads);
}

void sparse_linear(const PackedView& w, const void* x, int64_t x_stride, int64_t tokens, const void* bias, void* out,
                   int64_t out_stride, int threads) {
    const auto run = [&](auto type) {
        typedef decltype(type) T;
        sparse_rows<T>(w, static_cast<const T*>(x), x_stride, tokens, static_cast<const T*>(bias), static_cast<T*>(out),
                       out_stride, threads);
    };
    w.type == FLOAT32 ? run(float{}) : w.type == BFLOAT16 ? run(bf16{}) : run(f16{});
}

}  // namespace
}  // namespace pyprune
