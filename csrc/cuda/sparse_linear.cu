// Products with packed weights: y [tokens, rows] = x [tokens, columns] Wᵀ + bias for a few tokens, and the expansion of
// the weight for more (pyprune/ops/packed.py has the layout).
//
// Bytes: the packed weight; the bound is DRAM. A warp walks along one row. Its lanes read the bits of 32 words of 64
// columns at once and add them up, so that every word knows where its values begin; then all lanes work on one word,
// two columns each: a lane's place among the values is the word's plus the bits below its own. The values that a word
// has lie one behind the other, so the lanes' loads touch each sector once. Words do not wait for each other: their
// loads are in flight together. FLOPs: 2 · tokens · rows · columns; about 17 instructions per lane and word for one
// token, 7 more for each further one.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int WORD = 64, FEW = 8;  // columns of a word; tokens of one pass

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
        memcpy(&bits, p, 8);
        return bits;
    }
    for (int i = 0; i < 8; ++i)
        if (i < left) bits |= uint64_t(p[i]) << (8 * i);
    return bits;
}

// Calls body(column, w0, w1) in every lane for two neighbouring columns of a row, word by word; all lanes of the warp
// come along. column is even and may be columns or more, where both weights are 0. WORDS are in flight at once.
template <int WORDS, class T, class Body>
__device__ __forceinline__ void along_row(const PackedRows<T>& w, int64_t row, Body body) {
    const int lane = threadIdx.x % WARP, words = (w.columns + WORD - 1) / WORD;
    const T* values = w.values + w.offsets[row];
    for (int first = 0; first < words; first += WARP) {
        const uint64_t mine = row_word(w, row, first + lane);
        const int count = __popcll(mine);
        int before = count;  // inclusive prefix sum over the lanes
        PYPRUNE_UNROLL
        for (int d = 1; d < WARP; d *= 2) {
            const int below = __shfl_up_sync(FULL, before, d, WARP);
            if (lane >= d) before += below;
        }
        const int total = __shfl_sync(FULL, before, WARP - 1, WARP);
        before -= count;
        const uint32_t low = uint32_t(mine), high = uint32_t(mine >> 32);
        const int here = min(WARP, words - first);
#ifdef __CUDACC__
#pragma unroll WORDS
#endif
        for (int i = 0; i < here; ++i) {
            const uint32_t l = __shfl_sync(FULL, low, i, WARP), h = __shfl_sync(FULL, high, i, WARP);
            const uint64_t word = uint64_t(h) << 32 | l;
            const int start = __shfl_sync(FULL, before, i, WARP);
            const T* p = values + start + __popcll(word & ((uint64_t(1) << (2 * lane)) - 1));
            const uint32_t pair = uint32_t(word >> (2 * lane)) & 3;
            const float w0 = pair & 1 ? to_float(p[0]) : 0.f;
            const float w1 = pair & 2 ? to_float(p[pair & 1]) : 0.f;
            body((first + i) * WORD + 2 * lane, w0, w1);
        }
        values += total;
    }
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
    bool pairs;  // x in loads of two columns
};

template <class T, int N>
__global__ void __launch_bounds__(THREADS) few_tokens_kernel(const Product<T> a) {
    const int lane = threadIdx.x % WARP;
    const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= a.w.rows) return;  // whole warps
    float sum[N] = {};
    constexpr int WORDS = N < 4 ? 4 : 2;  // four words of four tokens and more would not fit the registers
    along_row<WORDS>(a.w, row, [&](int column, float w0, float w1) {
        PYPRUNE_UNROLL
        for (int n = 0; n < N; ++n) {
            T x[2];
            load(x, a.x + n * a.x_stride + column, a.w.columns - column, a.pairs);
            sum[n] += w0 * to_float(x[0]) + w1 * to_float(x[1]);
        }
    });
    PYPRUNE_UNROLL
    for (int n = 0; n < N; ++n) {
        PYPRUNE_UNROLL
        for (int d = WARP / 2; d > 0; d /= 2) sum[n] += __shfl_xor_sync(FULL, sum[n], d, WARP);
        if (lane == 0)
            a.out[n * a.w.rows + row] =
                from_float(sum[n] + (a.bias != nullptr ? to_float(a.bias[row]) : 0.f), static_cast<T*>(nullptr));
    }
}

// out [rows, columns]: a warp writes a row, 32 columns at a time.
template <class T>
__global__ void __launch_bounds__(THREADS) expand_kernel(const PackedRows<T> w, T* out) {
    const int lane = threadIdx.x % WARP, words = (w.columns + WORD - 1) / WORD;
    const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= w.rows) return;
    const T* values = w.values + w.offsets[row];
    T* to = out + row * w.columns;
    for (int i = 0; i < words; ++i) {
        const uint64_t word = row_word(w, row, i);
        PYPRUNE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int bit = half * WARP + lane, column = i * WORD + bit;
            if (column < w.columns)
                to[column] = word >> bit & 1 ? values[__popcll(word & ((uint64_t(1) << bit) - 1))] : T{};
        }
        values += __popcll(word);
    }
}

template <class T>
PackedRows<T> packed_rows(const Packed& w) {
    return {w.mask, w.width, static_cast<const T*>(w.values), w.offsets, w.rows, int(w.columns),
            w.width % 8 == 0 && aligned(w.mask, 0, 8)};
}

void sparse_linear(const Packed& w, int dtype, const void* x, int64_t x_stride, int64_t tokens, const void* bias,
                   void* out, void* stream) {
    if (w.rows == 0 || tokens == 0) return;
    const Launcher launch{"sparse_linear", {{"rows", w.rows}, {"columns", w.columns}, {"tokens", tokens}},
                          static_cast<cudaStream_t>(stream)};
    if (w.columns > 0x7fffff00) launch.refuse("more than 2^31 columns");
    const int64_t blocks = (w.rows + WARPS - 1) / WARPS;
    with_dtype(launch, dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t t = 0; t < tokens; t += FEW) {
            const T* from = static_cast<const T*>(x) + t * x_stride;
            const Product<T> a{packed_rows<T>(w), from, x_stride, static_cast<const T*>(bias),
                               static_cast<T*>(out) + t * w.rows,
                               aligned(from, x_stride * int64_t(sizeof(T)), 2 * sizeof(T))};
            switch (std::min<int64_t>(FEW, tokens - t)) {
                case 1: launch(few_tokens_kernel<T, 1>, blocks, THREADS, 0, a); break;
                case 2: launch(few_tokens_kernel<T, 2>, blocks, THREADS, 0, a); break;
                case 3: launch(few_tokens_kernel<T, 3>, blocks, THREADS, 0, a); break;
                case 4: launch(few_tokens_kernel<T, 4>, blocks, THREADS, 0, a); break;
                case 5: launch(few_tokens_kernel<T, 5>, blocks, THREADS, 0, a); break;
                case 6: launch(few_tokens_kernel<T, 6>, blocks, THREADS, 0, a); break;
                case 7: launch(few_tokens_kernel<T, 7>, blocks, THREADS, 0, a); break;
                default: launch(few_tokens_kernel<T, 8>, blocks, THREADS, 0, a);
            }
        }
    });
}

void expand_bitmask(const Packed& w, int dtype, void* out, void* stream) {
    if (w.rows == 0 || w.columns == 0) return;
    const Launcher launch{"expand_bitmask", {{"rows", w.rows}, {"columns", w.columns}},
                          static_cast<cudaStream_t>(stream)};
    if (w.columns > 0x7fffff00) launch.refuse("more than 2^31 columns");
    const int64_t blocks = (w.rows + WARPS - 1) / WARPS;
    if (dtype == FLOAT32)  // bits are moved, not numbers
        launch(expand_kernel<uint32_t>, blocks, THREADS, 0, packed_rows<uint32_t>(w), static_cast<uint32_t*>(out));
    else
        launch(expand_kernel<uint16_t>, blocks, THREADS, 0, packed_rows<uint16_t>(w), static_cast<uint16_t*>(out));
}

}  // namespace pyprune::cuda
