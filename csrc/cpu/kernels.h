// The table of CPU kernels: one instance per instruction set, chosen once by dispatch.cpp.
// Arguments were validated by pyprune/ops/__init__.py; strides are in elements; the column stride is 1 everywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pyprune {

struct Tokens {  // x [tokens, columns]; a token counts where mask is null or non-zero
    const void* data;
    int64_t tokens, columns, stride;
    int type;  // DType of common.h
    const uint8_t* mask;
};

struct PackedView {  // a weight [rows, columns] as pyprune/ops/packed.py lays it out, checked
    const uint8_t* mask;
    int64_t width;  // bytes of a row's mask
    const void* values;
    const int64_t* offsets;
    int64_t rows, columns;
    int type;
};

struct HeadsView {  // [batch, heads, tokens, d]
    void* data;
    int64_t batch, heads, tokens, d;
    int64_t strides[3];
};

enum MaskKind { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

struct AttentionView {  // q [batch, heads, queries, width], k [batch, key_heads, keys, width], v […, value_width]
    const void *q, *k, *v;
    const void* mask;  // [batch, heads, queries, keys]: bool, or float32 to be added
    void* out;         // [batch, heads, queries, value_width]
    int64_t batch, heads, key_heads, queries, keys, width, value_width;
    int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3], out_stride[3];
    int type, mask_kind;
    bool causal;  // query i sees keys up to i
    float scale;
};

struct Kernels {
    const char* name;
    // gram [c, c] += xᵀx, both triangles; sums [c] and count may be null.
    void (*gram)(float* gram, const Tokens& x, float* sums, int64_t* count, bool round_to_bf16, int threads);
    // cross [cy, cx] += yᵀx
    void (*cross_gram)(float* cross, const Tokens& y, const Tokens& x, int threads);
    // out [m, n] (+)= x [m, k] wᵀ [k, n] + bias [n]
    void (*linear)(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias, float* out,
                   int64_t out_stride, int64_t m, int64_t n, int64_t k, bool accumulate, int threads);
    // w [m, n] −= e [m, k] r [k, n]
    void (*trailing_update)(float* w, int64_t w_stride, const float* e, int64_t e_stride, const float* r,
                            int64_t r_stride, int64_t m, int64_t n, int64_t k, int threads);
    // means and centred sums of squares [c]; returns the count
    int64_t (*column_moments)(const Tokens& x, float* mean, float* m2, int threads);
    // Masks are contiguous. False, nothing written to w: a score was NaN.
    bool (*select_mask)(void* w, int64_t stride, int64_t rows, int64_t columns, int type, const float* scale, int64_t k,
                        bool by_row, bool apply, uint8_t* mask, int threads);
    bool (*nm_mask)(void* w, int64_t stride, int64_t rows, int64_t columns, int type, const float* scale, int n, int m,
                    bool apply, uint8_t* mask, int threads);
    // mask in, or out if m > 0. False, w untouched: w or r not finite, or a diagonal entry not positive.
    bool (*obs_sweep)(float* w, int64_t w_stride, const float* r, int64_t r_stride, int64_t rows, int64_t b,
                      uint8_t* mask, int64_t n, int64_t m, float* errors, float* losses, int threads);
    // factor [batch, n, n] if not null, x [batch, n, k] = (a + damping·I)⁻¹ b if b is not null
    void (*cholesky)(const float* a, const float* damping, float* factor, const float* b, float* x, int32_t* info,
                     int64_t batch, int64_t n, int64_t k, int threads);
    // False: a quadruple has more than two non-zeros
    bool (*compress_24)(const uint16_t* w, int64_t stride, int64_t rows, int64_t columns, uint16_t* values,
                        int16_t* metadata, int threads);
    // False: metadata names one place twice
    bool (*expand_24)(const uint16_t* values, const int16_t* metadata, int64_t rows, int64_t columns, uint16_t* w,
                      int threads);
    // out [tokens, rows] = x [tokens, columns] wᵀ + bias (may be null), all of w's type; for a few tokens
    void (*sparse_linear)(const PackedView& w, const void* x, int64_t x_stride, int64_t tokens, const void* bias,
                          void* out, int64_t out_stride, int threads);
    // out [count, columns] = rows first … of w
    void (*expand_bitmask)(const PackedView& w, int64_t first, int64_t count, void* out, int threads);
    void (*attention)(const AttentionView& view, int threads);
    // out [rows, columns] = x / sqrt(mean x² + eps) times weight; form is NormForm of between.h
    void (*rms_norm)(const void* x, int64_t stride, int64_t rows, int64_t columns, int type, const void* weight,
                     float eps, int form, void* out, int threads);
    void (*swiglu)(const void* gate, const void* up, void* out, int64_t count, int type, int threads);
    // cos and sin [batch, tokens, d] with two strides each, d even
    void (*rotary)(const HeadsView& x, const HeadsView& out, const void* cos, const void* sin,
                   const int64_t* cos_strides, const int64_t* sin_strides, int type, int threads);
    double (*tile_flops)(bool pairs, int64_t repeats, int threads);  // for benchmarks: peak.h
};

const Kernels& kernels();                  // the table in use
std::vector<std::string> usable_levels();  // instruction sets this processor can run, best first
void use_level(const std::string& level);  // "" for the best; throws std::invalid_argument

}  // namespace pyprune
