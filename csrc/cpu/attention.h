// Softmax attention, out = softmax(scale · q kᵀ + mask) v, without the matrix of scores in memory.
//
// FLOPs: 2·(d + dv) per query and key that are looked at: with a causal mask half of the square and an edge of a few keys.
// Keys and values of a head are packed once and serve all its query heads. A thread takes LINES rows, positions in order
// and the query heads of one key head side by side, and SPAN keys at a time: their scores stay in the first two caches.
// Rows longer than SPAN keep a running maximum and are rescaled (arXiv 2205.14135). Scores, softmax and sums are float32;
// bfloat16 products, where the processor has them, round the probabilities to bfloat16 as PyTorch's own kernel does.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/gemm.h"

namespace pyprune {
namespace {

constexpr int64_t LINES = 24, SPAN = 528;  // multiples of MR, and of NR
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f;

// 2^x for x ≤ 0: a relative error below 2e-7 down to 2^-126, 0 below 2^-127, NaN for NaN.
inline vf power_of_two(vf x) {
    x = x < splat(-127.0f) ? splat(-127.0f) : x;
    const vf rounder = splat(12582912.0f);  // 1.5·2^23: the sum's low bits are x rounded
    const vf shifted = x + rounder, f = x - (shifted - rounder);
    vf p = splat(1.32647273e-3f);  // minimax on ±1/2, 9e-8
    p = p * f + splat(9.67151299e-3f);
    p = p * f + splat(5.55073358e-2f);
    p = p * f + splat(2.40222424e-1f);
    p = p * f + splat(6.93147004e-1f);
    p = p * f + splat(1.0f);
    return p * (vf)(((vi)shifted + 127) << 23);
}

// How rows of q, k and v become operands of tiles. Wide: float32 lanes. Pairs: two bfloat16 values per lane.
template <typename T>
struct Wide {
    typedef Dot32 Dot;
    static constexpr int64_t EACH = 1;  // values of a lane
    static inline vf lanes(const T* row, int64_t first, int64_t count) {
        return count - first >= VL ? load(row + first) : load_some(row + first, count - first);
    }
    static inline void join(const T* even, const T*, int64_t first, int64_t count, float* to) {
        store(to, lanes(even, first, count));
    }
    static inline void put_probabilities(float* row, int64_t first, vf p) { store(row + first, p); }
};

#if defined(__AVX512BF16__)
struct Pairs {
    typedef Dot16 Dot;
    static constexpr int64_t EACH = 2;
    static inline vf lanes(const bf16* row, int64_t first, int64_t count) {
        const int64_t rest = count - 2 * first;
        if (rest >= 2 * VL) return (vf)_mm512_loadu_si512(row + 2 * first);
        bf16 tail[2 * VL] = {};
        for (int64_t i = 0; i < rest; ++i) tail[i] = row[2 * first + i];
        return (vf)_mm512_loadu_si512(tail);
    }
    static inline void join(const bf16* even, const bf16* odd, int64_t first, int64_t count, float* to) {
        const __m512i low = _mm512_srli_epi32((__m512i)Wide<bf16>::lanes(even, first, count), 16);
        store(to, odd ? (vf)_mm512_or_si512(low, (__m512i)Wide<bf16>::lanes(odd, first, count)) : (vf)low);
    }
    static inline void put_probabilities(float* row, int64_t first, vf p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(row) + first), (__m256i)_mm512_cvtneps_pbh(p));
    }
};
#endif

// panels [⌈count/NR⌉][depth][NR] of keys, transposed
template <typename Form, typename T>
void pack_keys(const T* k, int64_t stride, int64_t count, int64_t width, float* panels) {
    const int64_t depth = ceil_div(width, Form::EACH);
    for (int64_t first = 0; first < count; first += NR, panels += depth * NR)
        for (int64_t i = 0; i < depth; i += VL)
            for (int64_t o = 0; o < NR; o += VL) {
                vf block[VL];
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r)
                    block[r] = first + o + r < count ? Form::lanes(k + (first + o + r) * stride, i, width) : vf{};
                transpose(block);
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r)
                    if (i + r < depth) store(panels + (i + r) * NR + o, block[r]);
            }
}

// values [⌈count/EACH⌉][padded]
template <typename Form, typename T>
void pack_values(const T* v, int64_t stride, int64_t count, int64_t width, int64_t padded, float* to) {
    for (int64_t key = 0; key < count; key += Form::EACH, to += padded) {
        const T *even = v + key * stride, *odd = key + 1 < count ? even + stride : nullptr;
        for (int64_t c = 0; c < padded; c += VL) Form::join(even, odd, c, width, to + c);
    }
}

// out [lines][stride] of MR rows (fewer at the end) and `columns` columns, in tiles of at most three vectors:
// out = a b, or out = out·decay + a b where decay is not null. b is [depth][b_stride].
template <typename Dot, int NV>
inline void one_tile(const float* const* a, const float* b, int64_t b_stride, int64_t depth, int64_t lines,
                     const float* decay, float* out, int64_t stride) {
    vf acc[MR][NV];
    tile<Dot, 1, NV>(a, b, depth, acc, b_stride);
    for (int64_t r = 0; r < least(lines, MR); ++r)
        for (int v = 0; v < NV; ++v) {
            float* p = out + r * stride + v * VL;
            store(p, decay ? load(p) * splat(decay[r]) + acc[r][v] : acc[r][v]);
        }
}

template <typename Dot>
inline void some_tile(int64_t vectors, const float* const* a, const float* b, int64_t b_stride, int64_t depth,
                      int64_t lines, const float* decay, float* out, int64_t stride) {
    if (vectors >= 3) return one_tile<Dot, 3>(a, b, b_stride, depth, lines, decay, out, stride);
    if (vectors == 2) return one_tile<Dot, 2>(a, b, b_stride, depth, lines, decay, out, stride);
    one_tile<Dot, 1>(a, b, b_stride, depth, lines, decay, out, stride);
}

// A row of a mask, from the first key of a span on. Scores leave in units of log 2.
inline void add_mask(float* s, int64_t n, float scale, int kind, const void* mask) {
    for (int64_t j = 0; j < n; j += VL) {
        const vf x = load(s + j) * splat(scale);
        if (kind == MASK_FLOAT) {
            const float* add = static_cast<const float*>(mask) + j;
            store(s + j, x + (n - j >= VL ? load(add) : load_some(add, n - j)) * splat(LOG2E));
        } else {
            uint8_t tail[VL] = {};
            const uint8_t* keep = static_cast<const uint8_t*>(mask) + j;
            if (n - j < VL) {
                for (int64_t i = 0; i < n - j; ++i) tail[i] = keep[i];
                keep = tail;
            }
            const vi shown = __builtin_convertvector(*reinterpret_cast<const vb_any*>(keep), vi) != 0;
            store(s + j, shown ? x : splat(NOTHING));
        }
    }
}

// Scores s [n], in units of 1/scale · log 2, become probabilities relative to the row's maximum so far, zeros up to padded.
template <typename Form>
inline void soften(float* s, int64_t n, int64_t padded, float scale, float& maximum, float& sum, float& decay) {
    for (int64_t j = n; j < ceil_div(n, VL) * VL; ++j) s[j] = NOTHING;
    vf high = splat(NOTHING);
    for (int64_t j = 0; j < n; j += VL) high = greater(load(s + j), high);
    const float now = std::fmax(maximum, largest_lane(high) * scale), base = now == NOTHING ? 0.0f : now;
    decay = maximum == NOTHING ? 0.0f : std::exp2(maximum - base);
    vf added = {};
    for (int64_t j = 0; j < n; j += VL) {
        const vf p = power_of_two(load(s + j) * splat(scale) - splat(base));
        added += p;
        Form::put_probabilities(s, j, p);
    }
    for (int64_t j = ceil_div(n, VL) * VL; j < padded; j += VL) Form::put_probabilities(s, j, vf{});
    maximum = now;
    sum = sum * decay + add_lanes(added);
}

inline void put_row(float* to, const float* from, int64_t count, float by) {
    for (int64_t c = 0; c < count; ++c) to[c] = from[c] * by;
}
inline void put_row(bf16* to, const float* from, int64_t count, float by) {
    for (int64_t c = 0; c < count; ++c) to[c].bits = round_bf16(from[c] * by);
}
inline void put_row(f16* to, const float* from, int64_t count, float by) {
    for (int64_t c = 0; c < count; ++c) to[c].bits = round_f16(from[c] * by);
}

// Keys of a row up to the last that its boolean mask shows.
inline int64_t last_shown(const uint8_t* mask, int64_t n) {
    while (n > 0 && !mask[n - 1]) --n;
    return n;
}

template <typename Form, typename T>
class Attending {
  public:
    explicit Attending(const AttentionView& view)
        : a(view), depth(ceil_div(a.width, Form::EACH)), padded(ceil_div(a.value_width, VL) * VL),
          keys(most(1, ceil_div(a.keys, NR)) * depth * NR), values(most(1, ceil_div(a.keys, Form::EACH)) * padded),
          rows(LINES * ceil_div(depth, VL) * VL), scores(LINES * SPAN), sums(LINES * padded) {}

    void take_keys(int64_t batch, int64_t head) {
        pack_keys<Form>(static_cast<const T*>(a.k) + batch * a.k_stride[0] + head * a.k_stride[1], a.k_stride[2],
                        a.keys, a.width, keys.get());
        pack_values<Form>(static_cast<const T*>(a.v) + batch * a.v_stride[0] + head * a.v_stride[1], a.v_stride[2],
                          a.keys, a.value_width, padded, values.get());
    }

    // Rows of positions first … last − 1 and query heads head … head + heads − 1, position by position.
    void take_rows(int64_t batch, int64_t head, int64_t heads, int64_t first, int64_t last) {
        const int64_t lines = (last - first) * heads;
        const int64_t across = ceil_div(depth, VL) * VL;
        const uint8_t* masks[LINES];
        int64_t limit[LINES], longest = 0;
        float maximum[LINES], sum[LINES], decay[LINES];
        for (int64_t r = 0; r < lines; ++r) {
            const int64_t h = head + r % heads, t = first + r / heads;
            const T* q = static_cast<const T*>(a.q) + batch * a.q_stride[0] + h * a.q_stride[1] + t * a.q_stride[2];
            for (int64_t i = 0; i < depth; i += VL) store(rows.get() + r * across + i, Form::lanes(q, i, a.width));
            const int64_t place = batch * a.mask_stride[0] + h * a.mask_stride[1] + t * a.mask_stride[2];
            masks[r] = static_cast<const uint8_t*>(a.mask) + place * (a.mask_kind == MASK_FLOAT ? 4 : 1);
            limit[r] = a.causal ? least(a.keys, t + 1) : a.keys;
            if (a.mask_kind == MASK_BOOL) limit[r] = last_shown(masks[r], limit[r]);
            longest = most(longest, limit[r]);
            maximum[r] = NOTHING, sum[r] = 0;
        }
        for (int64_t i = 0; i < LINES * padded; ++i) sums[i] = 0;
        for (int64_t start = 0; start < longest; start += SPAN)
            take_span(start, least(SPAN, longest - start), lines, across, limit, masks, maximum, sum, decay);
        for (int64_t r = 0; r < lines; ++r) {
            const int64_t h = head + r % heads, t = first + r / heads;
            T* out = static_cast<T*>(a.out) + batch * a.out_stride[0] + h * a.out_stride[1] + t * a.out_stride[2];
            put_row(out, sums.get() + r * padded, a.value_width, sum[r] == 0 ? 0.0f : 1 / sum[r]);
        }
    }

  private:
    void take_span(int64_t start, int64_t span, int64_t lines, int64_t across, const int64_t* limit,
                   const uint8_t* const* masks, float* maximum, float* sum, float* decay) {
        const float scale = a.scale * LOG2E;
        for (int64_t i = 0; i < lines; i += MR) {
            int64_t reach = 0;
            const float *queries[MR], *probabilities[MR];
            for (int64_t r = 0; r < MR; ++r) {  // rows behind the last repeat it, and are not stored
                const int64_t line = least(i + r, lines - 1);
                queries[r] = rows.get() + line * across;
                probabilities[r] = scores.get() + line * SPAN;
                reach = most(reach, least(span, limit[line] - start));
            }
            if (reach <= 0) continue;
            for (int64_t c = 0; c < reach; c += NR)
                some_tile<typename Form::Dot>(ceil_div(least(NR, reach - c), VL), queries,
                                              keys.get() + (start + c) * depth, NR, depth, lines - i, nullptr,
                                              scores.get() + i * SPAN + c, SPAN);
            for (int64_t r = i; r < least(i + MR, lines); ++r) {
                float* s = scores.get() + r * SPAN;
                const int64_t n = most(0, least(span, limit[r] - start));
                if (a.mask_kind != MASK_NONE)
                    add_mask(s, n, scale, a.mask_kind, masks[r] + start * (a.mask_kind == MASK_FLOAT ? 4 : 1));
                soften<Form>(s, n, ceil_div(reach, VL) * VL, a.mask_kind == MASK_NONE ? scale : 1.0f, maximum[r],
                             sum[r], decay[r]);
            }
            const int64_t vectors = padded / VL, step = ceil_div(vectors, ceil_div(vectors, 3));
            for (int64_t c = 0; c < vectors; c += step)
                some_tile<typename Form::Dot>(least(step, vectors - c), probabilities,
                                              values.get() + start / Form::EACH * padded + c * VL, padded,
                                              ceil_div(reach, Form::EACH), lines - i, start ? decay + i : nullptr,
                                              sums.get() + i * padded + c * VL, padded);
        }
    }

    const AttentionView& a;
    const int64_t depth, padded;
    Buffer<float> keys, values, rows, scores, sums;
};

template <typename Form, typename T>
void attend(const AttentionView& a, int threads) {
    const int64_t group = a.heads / a.key_heads, together = least(group, LINES), positions = LINES / together;
    const int64_t blocks = ceil_div(a.queries, positions), pairs = a.batch * a.key_heads;
    if (a.queries == 0 || pairs == 0) return;
    const double square = double(a.batch * a.heads) * double(a.queries) * double(a.keys);
    threads = worth(threads, square * double(a.width + a.value_width + 16) / VL);
    // Few heads over many threads: several of them take blocks of one head, each with packed keys of its own.
    const int64_t splits = threads == 1 ? 1 : least(blocks, ceil_div(4 * threads, pairs));
    std::vector<std::unique_ptr<Attending<Form, T>>> own;
    for (int t = 0; t < threads; ++t) own.push_back(std::make_unique<Attending<Form, T>>(a));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t job = 0; job < pairs * splits; ++job) {
        Attending<Form, T>& work = *own[size_t(thread_number())];
        const int64_t pair = job / splits, batch = pair / a.key_heads, key_head = pair % a.key_heads;
        work.take_keys(batch, key_head);
        for (int64_t block = job % splits; block < blocks; block += splits)
            for (int64_t h = 0; h < group; h += together)
                work.take_rows(batch, key_head * group + h, least(together, group - h), block * positions,
                               least(a.queries, (block + 1) * positions));
    }
}

void attention(const AttentionView& a, int threads) {
    if (a.type == FLOAT32) return attend<Wide<float>, float>(a, threads);
    if (a.type == FLOAT16) return attend<Wide<f16>, f16>(a, threads);
#if defined(__AVX512BF16__)
    attend<Pairs, bf16>(a, threads);
#else
    attend<Wide<bf16>, bf16>(a, threads);
#endif
}

}  // namespace
}  // namespace pyprune
