// Products with packed weights: y [tokens, rows] = x [tokens, columns] Wᵀ + bias for one token, in float32 for a few
// (sparse_linear_mma.cu has those of 16-bit types), and the expansion of the weight for more.
//
// Bytes: the packed weight; the bound is DRAM. A warp walks along one row. Its lanes read the bits of 32 words of 64
// columns at once and add them up, so that every word knows where its values begin; then all lanes work on one word,
// two columns each: a lane's place among the values is the word's plus the bits below its own. The values that a word
// has lie one behind the other, so the lanes' loads touch each sector once. Words do not wait for each other: their
// loads are in flight together. FLOPs: 2 · tokens · rows · columns; about 17 instructions per lane and word for one
// token, 7 more for each further one.
#include "cuda/packed.cuh"

namespace pyprune::cuda {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int FEW = 8, SOME = 16;  // tokens of one pass: of float32, of 16-bit types

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
            load(x, a.x + n * a.x_stride + column, a.w.columns - column, a.whole);
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

void sparse_linear(const Packed& w, int dtype, const void* x, int64_t x_stride, int64_t tokens, const void* bias,
                   void* out, void* stream) {
    if (w.rows == 0 || tokens == 0) return;
    const Launcher launch{"sparse_linear", {{"rows", w.rows}, {"columns", w.columns}, {"tokens", tokens}},
                          static_cast<cudaStream_t>(stream)};
    if (w.columns > 0x7fffff00) launch.refuse("more than 2^31 columns");
    const int64_t blocks = (w.rows + WARPS - 1) / WARPS;
    with_dtype(launch, dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t t = 0; t < tokens;) {
            const T* from = static_cast<const T*>(x) + t * x_stride;
            const auto whole = [&](int columns) {
                return aligned(from, x_stride * int64_t(sizeof(T)), columns * int(sizeof(T)));
            };
            Product<T> a{packed_rows<T>(w), from, x_stride, static_cast<const T*>(bias),
                         static_cast<T*>(out) + t * w.rows, whole(2)};
            if constexpr (sizeof(T) == 2) {
                const int some = int(std::min<int64_t>(SOME, tokens - t));
                if (some > 1 && aligned(w.values, 0, 16)) {
                    a.whole = whole(8);
                    sparse_linear_mma(launch, a, some);
                    t += some;
                } else {
                    launch(few_tokens_kernel<T, 1>, blocks, THREADS, 0, a);
                    t += 1;
                }
            } else {
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
                t += FEW;
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
