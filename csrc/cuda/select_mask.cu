// Exact selection of the k lowest scores |w|·scale, per row or over a matrix, without a sort: radix selection from the
// top, 11 + 10 + 10 bits of the 31-bit key. Counts are integers, so the result does not depend on the order of atomics.
//
// Bytes: w is read once, the mask and (apply) the weights written: 5 per bfloat16 weight. Rows of up to 16,384 columns
// (float32: 12,288) are held in registers, weights and keys; wider rows, and matrices, are read three times more, from
// cache.
// Ties: after three digits the threshold key is known, with the number of equal keys and how many of them go. Only
// when not all of them go are they numbered, in row-major order, by prefix sums.
//
// Rows: one thread block per row, one launch. What it costs beside memory is one atomic addition per weight in shared
// memory (later digits count the few keys that agree so far) and four barriers per digit; four blocks per
// multiprocessor hide them.
// Matrix: one launch per digit (the last block to finish reads the counts), one that counts equal keys per block, one
// that writes; all blocks cover contiguous pieces in row-major order.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256, BINS = 2048, PASSES = 3, MAX_BLOCKS = 1024;
constexpr int MOST_THREADS = 1024;  // of select_held_kernel

__host__ __device__ constexpr int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
__host__ __device__ constexpr int digit_bins(int pass) { return pass == 0 ? BINS : 1024; }

// The state of a search: keys above `prefix`'s digits are still candidates, of which the `need` lowest go.
struct Search {
    uint32_t prefix, need, equal, nan;
};

struct MatrixState {  // the workspace, zeroed before the first pass
    uint32_t histogram[BINS];
    Search search;
    uint32_t tickets, unused[3];
    uint32_t ties[MAX_BLOCKS];
};
static_assert(sizeof(MatrixState) == SELECT_WORKSPACE * sizeof(uint32_t), "the workspace native.py allocates");

struct Scratch {  // shared memory
    uint32_t histogram[BINS];
    uint32_t sums[MOST_THREADS / WARP];
    uint32_t last;
    Search search;
};

template <class T>
struct Select {
    static constexpr int VECTOR = 16 / sizeof(T);  // elements of one 16-byte access
    static constexpr int HELD = sizeof(T) == 2 ? 16 : 12;  // keys per thread of select_held_kernel: 64 registers in all
    T* w;
    const float* scale;
    uint8_t* keep;
    int* fault;
    int64_t stride;
    uint32_t rows, columns, vectors, k;  // vectors: accesses a row
    bool apply, whole;
};

// The vector starting at `column` of a row and its keys; returns how many are inside.
template <class T>
__device__ __forceinline__ int load_keys(T (&w)[Select<T>::VECTOR], uint32_t (&key)[Select<T>::VECTOR],
                                         const Select<T>& a, int64_t row, uint32_t column) {
    constexpr int V = Select<T>::VECTOR;
    const int count = int(a.columns - column);
    float scale[V];
    load(w, a.w + row * a.stride + column, count, a.whole);
    if (a.scale != nullptr) {
        PYPRUNE_UNROLL
        for (int i = 0; i < V; i += 4) {
            float quad[4];
            load(quad, a.scale + column + i, count - i, a.whole);
            PYPRUNE_UNROLL
            for (int t = 0; t < 4; ++t) scale[i + t] = quad[t];
        }
    }
    PYPRUNE_UNROLL
    for (int i = 0; i < V; ++i) key[i] = score_key(to_float(w[i]), a.scale != nullptr ? scale[i] : 1.f);
    return count < V ? count : V;
}

__device__ __forceinline__ void clear(Scratch* s) {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) s->histogram[i] = 0;
}

// Counts the digit of one key if its higher digits agree with the search.
__device__ __forceinline__ void count_key(Scratch* s, int pass, uint32_t prefix, uint32_t key) {
    if (pass > 0 && key >> digit_shift(pass - 1) != prefix) return;
    atomicAdd(&s->histogram[key >> digit_shift(pass) & (digit_bins(pass) - 1)], 1u);
}

// The first THREADS threads look for the digit among MINE bins each, and clear them.
template <int MINE>
__device__ __forceinline__ void search_bins(Scratch* s, bool first_pass) {
    const int first = threadIdx.x * MINE;
    uint32_t count[MINE] = {}, sum = 0, total;
    if (threadIdx.x < THREADS) {
        PYPRUNE_UNROLL
        for (int i = 0; i < MINE; i += 4) {
            uint32_t quad[4];
            const uint32_t zeros[4] = {};
            load(quad, s->histogram + first + i, 4, true);
            store(s->histogram + first + i, zeros, 4, true);
            PYPRUNE_UNROLL
            for (int t = 0; t < 4; ++t) sum += count[i + t] = quad[t];
        }
    }
    const uint32_t need = s->search.need;
    uint32_t below = block_prefix(sum, s->sums, &total);  // its barriers separate the read of need from the write
    const bool here = need == 0 ? threadIdx.x == 0 : below < need && need <= below + sum;
    if (here) {
        uint32_t bin = first, equal = count[0];
        PYPRUNE_UNROLL
        for (int i = 0; i + 1 < MINE; ++i)
            if (bin == uint32_t(first + i) && below + count[i] < need) {
                below += count[i];
                equal = count[i + 1];
                ++bin;
            }
        s->search.prefix = first_pass ? bin : s->search.prefix << 10 | bin;
        s->search.need = need - below;
        s->search.equal = equal;
    }
    __syncthreads();
}

// From counts (in shared memory, complete) to the next digit; s->search moves on and the counts are zero again. All
// threads call it.
__device__ __forceinline__ void next_digit(Scratch* s, int pass) {
    if (pass == 0)
        search_bins<digit_bins(0) / THREADS>(s, true);
    else
        search_bins<digit_bins(1) / THREADS>(s, false);
}

// Vector v of a row of V elements each, zeros past its end: without a branch where vectors are whole.
template <class T, class E>
__device__ __forceinline__ void load_vector(E (&to)[Select<T>::VECTOR], const E* from, uint32_t v, const Select<T>& a) {
    constexpr int V = Select<T>::VECTOR, BYTES = V * sizeof(E) < 16 ? V * sizeof(E) : 16, STEP = BYTES / sizeof(E);
    const uint32_t columns = v < a.vectors ? a.columns : 0;
    PYPRUNE_UNROLL
    for (int i = 0; i < V; i += STEP) {
        typename Word<BYTES>::type word{};
        if (a.whole) {
            if (columns > 0) word = *reinterpret_cast<const decltype(word)*>(from + v * V + i);
            memcpy(to + i, &word, BYTES);
        } else {
            PYPRUNE_UNROLL
            for (int t = i; t < i + STEP; ++t) to[t] = v * V + t < columns ? from[v * V + t] : E{};
        }
    }
}

// Writes one vector of w: `ties_before` equal keys precede it in row-major order.
template <class T>
__device__ __forceinline__ void write_vector(const Select<T>& a, const Search& found, int64_t row, uint32_t column,
                                             T (&w)[Select<T>::VECTOR], const uint32_t (&key)[Select<T>::VECTOR],
                                             uint32_t ties_before) {
    constexpr int V = Select<T>::VECTOR;
    const int count = int(a.columns - column);
    const bool all_ties = found.need == found.equal;
    uint8_t kept[V];
    PYPRUNE_UNROLL
    for (int i = 0; i < V; ++i) {
        const bool tie = key[i] == found.prefix;
        const bool goes = key[i] < found.prefix || (tie && (all_ties || ties_before < found.need));
        ties_before += tie;
        kept[i] = !goes || found.nan;
        if (!kept[i]) w[i] = T{};
    }
    store(a.keep + row * a.columns + column, kept, count, a.whole);
    if (a.apply && !found.nan) store(a.w + row * a.stride + column, w, count, a.whole);
}

template <int V>
__device__ __forceinline__ uint32_t count_ties(const uint32_t (&key)[V], int count, uint32_t threshold) {
    uint32_t ties = 0;
    PYPRUNE_UNROLL
    for (int i = 0; i < V; ++i) ties += i < count && key[i] == threshold;
    return ties;
}

template <class T>
__global__ void __launch_bounds__(THREADS) select_rows_kernel(const Select<T> a) {
    constexpr int V = Select<T>::VECTOR;
    PYPRUNE_SHARED(Scratch, s);
    const int64_t row = blockIdx.x;
    if (threadIdx.x == 0) s->search = Search{0, a.k, 0, 0};
    T w[V];
    uint32_t key[V];
    clear(s);
    __syncthreads();
    bool nan = false;
    for (int pass = 0; pass < PASSES; ++pass) {
        const uint32_t prefix = s->search.prefix;
        for (uint32_t v = threadIdx.x; v < a.vectors; v += THREADS) {
            const int count = load_keys(w, key, a, row, v * V);
            PYPRUNE_UNROLL
            for (int i = 0; i < V; ++i) {
                if (i < count) count_key(s, pass, prefix, key[i]);
                nan |= i < count && key[i] > INFINITE_KEY;
            }
        }
        __syncthreads();
        next_digit(s, pass);
    }
    Search found = s->search;
    found.nan = __syncthreads_or(nan);
    if (found.nan && threadIdx.x == 0) *a.fault = 1;
    const bool numbered = found.need != found.equal;
    uint32_t seen = 0;
    for (uint32_t tile = 0; tile < a.vectors; tile += THREADS) {
        const uint32_t v = tile + threadIdx.x;
        int count = 0;
        if (v < a.vectors) count = load_keys(w, key, a, row, v * V);
        uint32_t before = 0, total = 0;
        if (numbered) before = seen + block_prefix(count_ties(key, count, found.prefix), s->sums, &total);
        seen += total;
        if (count > 0) write_vector(a, found, row, v * V, w, key, before);
    }
}

// A row of up to HELD columns per thread in registers: all of it is loaded before the first key is looked at, and only
// written afterwards. Keys past the end are above every other.
template <class T>
__global__ void __launch_bounds__(MOST_THREADS) select_held_kernel(const Select<T> a) {
    constexpr int V = Select<T>::VECTOR, PARTS = Select<T>::HELD / V;
    PYPRUNE_SHARED(Scratch, s);
    const int64_t row = blockIdx.x;
    T w[PARTS][V];
    float scale[PARTS][V];
    PYPRUNE_UNROLL
    for (int p = 0; p < PARTS; ++p)
        load_vector(w[p], a.w + row * a.stride, p * blockDim.x + threadIdx.x, a);
    if (a.scale != nullptr) {
        PYPRUNE_UNROLL
        for (int p = 0; p < PARTS; ++p) load_vector(scale[p], a.scale, p * blockDim.x + threadIdx.x, a);
    }
    clear(s);
    if (threadIdx.x == 0) s->search = Search{0, a.k, 0, 0};
    uint32_t key[PARTS][V];
    bool nan = false;
    PYPRUNE_UNROLL
    for (int p = 0; p < PARTS; ++p)
        PYPRUNE_UNROLL
        for (int i = 0; i < V; ++i) {
            const bool inside = (p * blockDim.x + threadIdx.x) * V + i < a.columns;
            const uint32_t score = score_key(to_float(w[p][i]), a.scale != nullptr ? scale[p][i] : 1.f);
            key[p][i] = inside ? score : FULL;
            nan |= inside && score > INFINITE_KEY;
        }
    const bool bad = __syncthreads_or(nan);
    PYPRUNE_ROLL
    for (int pass = 0; pass < PASSES; ++pass) {
        const uint32_t prefix = s->search.prefix;
        PYPRUNE_UNROLL
        for (int p = 0; p < PARTS; ++p)
            PYPRUNE_UNROLL
            for (int i = 0; i < V; ++i)
                if (key[p][i] != FULL) count_key(s, pass, prefix, key[p][i]);
        __syncthreads();
        next_digit(s, pass);
    }
    Search found = s->search;
    found.nan = bad;
    if (bad && threadIdx.x == 0) *a.fault = 1;
    const bool numbered = found.need != found.equal;
    uint32_t seen = 0;
    PYPRUNE_UNROLL
    for (int p = 0; p < PARTS; ++p) {
        const uint32_t v = p * blockDim.x + threadIdx.x;
        uint32_t before = 0, total = 0;
        if (numbered) before = seen + block_prefix(count_ties(key[p], V, found.prefix), s->sums, &total);
        seen += total;
        if (v < a.vectors) write_vector(a, found, row, v * V, w[p], key[p], before);
    }
}

// The piece of the matrix, in vectors, that a block covers.
__device__ __forceinline__ void piece(uint64_t all, uint64_t* begin, uint64_t* end) {
    const uint64_t each = (all + gridDim.x - 1) / gridDim.x;
    *begin = each * blockIdx.x < all ? each * blockIdx.x : all;
    *end = *begin + each < all ? *begin + each : all;
}

template <class T>
__global__ void __launch_bounds__(THREADS) select_digit_kernel(const Select<T> a, MatrixState* state, int pass) {
    constexpr int V = Select<T>::VECTOR;
    PYPRUNE_SHARED(Scratch, s);
    clear(s);
    if (threadIdx.x == 0) {
        s->search = state->search;
        if (pass == 0) s->search.need = a.k;
    }
    __syncthreads();
    const uint32_t prefix = s->search.prefix;
    uint64_t begin, end;
    piece(uint64_t(a.rows) * a.vectors, &begin, &end);
    T w[V];
    uint32_t key[V];
    bool nan = false;
    for (uint64_t v = begin + threadIdx.x; v < end; v += THREADS) {
        const int count = load_keys(w, key, a, int64_t(v / a.vectors), uint32_t(v % a.vectors) * V);
        PYPRUNE_UNROLL
        for (int i = 0; i < V; ++i) {
            if (i < count) count_key(s, pass, prefix, key[i]);
            nan |= i < count && key[i] > INFINITE_KEY;
        }
    }
    const bool any = __syncthreads_or(nan);
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (s->histogram[i]) atomicAdd(&state->histogram[i], s->histogram[i]);
    if (threadIdx.x == 0 && any) atomicOr(&state->search.nan, 1u);

    // The block that draws the last ticket sees everybody's counts: each drew its own after a fence behind them.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) s->last = atomicAdd(&state->tickets, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!s->last) return;
    __threadfence();
    volatile uint32_t* counts = state->histogram;
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        s->histogram[i] = counts[i];
        counts[i] = 0;
    }
    __syncthreads();
    next_digit(s, pass);
    if (threadIdx.x == 0) {
        state->search.prefix = s->search.prefix;
        state->search.need = s->search.need;
        state->search.equal = s->search.equal;
        state->tickets = 0;
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) select_ties_kernel(const Select<T> a, MatrixState* state) {
    constexpr int V = Select<T>::VECTOR;
    PYPRUNE_SHARED(Scratch, s);
    const Search found = state->search;
    if (found.need == found.equal) return;
    uint64_t begin, end;
    piece(uint64_t(a.rows) * a.vectors, &begin, &end);
    T w[V];
    uint32_t key[V], ties = 0, total;
    for (uint64_t v = begin + threadIdx.x; v < end; v += THREADS) {
        const int count = load_keys(w, key, a, int64_t(v / a.vectors), uint32_t(v % a.vectors) * V);
        ties += count_ties(key, count, found.prefix);
    }
    block_prefix(ties, s->sums, &total);
    if (threadIdx.x == 0) state->ties[blockIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(THREADS) select_write_kernel(const Select<T> a, const MatrixState* state) {
    constexpr int V = Select<T>::VECTOR;
    PYPRUNE_SHARED(Scratch, s);
    const Search found = state->search;
    if (found.nan && blockIdx.x == 0 && threadIdx.x == 0) *a.fault = 1;
    const bool numbered = found.need != found.equal;
    uint32_t seen = 0, total = 0;
    if (numbered) {
        uint32_t earlier = 0;
        for (uint32_t b = threadIdx.x; b < blockIdx.x; b += THREADS) earlier += state->ties[b];
        block_prefix(earlier, s->sums, &seen);
    }
    uint64_t begin, end;
    piece(uint64_t(a.rows) * a.vectors, &begin, &end);
    T w[V];
    uint32_t key[V];
    for (uint64_t tile = begin; tile < end; tile += THREADS) {
        const uint64_t v = tile + threadIdx.x;
        const int64_t row = int64_t(v / a.vectors);
        const uint32_t column = uint32_t(v % a.vectors) * V;
        int count = 0;
        if (v < end) count = load_keys(w, key, a, row, column);
        uint32_t before = 0;
        if (numbered) before = seen + block_prefix(count_ties(key, count, found.prefix), s->sums, &total);
        seen += total;
        if (count > 0) write_vector(a, found, row, column, w, key, before);
    }
}

template <class T>
Select<T> arguments(const Launcher& launch, void* w, int64_t rows, int64_t columns, int64_t w_stride,
                    const float* scale, int64_t k, bool apply, uint8_t* keep, int* fault) {
    constexpr int V = Select<T>::VECTOR;
    if (rows > 0x7fffffff || columns > 0x7fffffff || rows * columns > 0xffffffff)
        launch.refuse("more than 2^32 - 1 weights, or 2^31 - 1 rows or columns");
    const bool whole = columns % V == 0 && aligned(w, w_stride * int64_t(sizeof(T)), 16) && aligned(scale, 0, 16) &&
                       aligned(keep, 0, V);
    return {static_cast<T*>(w), scale, keep, fault, w_stride, uint32_t(rows), uint32_t(columns),
            uint32_t((columns + V - 1) / V), uint32_t(k), apply, whole};
}

template <class T>
void launch_matrix(const Launcher& launch, const Select<T>& a, MatrixState* state) {
    const int64_t vectors = int64_t(a.rows) * a.vectors, each = 4 * THREADS;  // about four vectors a thread
    const int64_t blocks = std::min<int64_t>((vectors + each - 1) / each, MAX_BLOCKS);
    launch.check(cudaMemsetAsync(state, 0, sizeof *state, launch.stream));
    for (int pass = 0; pass < PASSES; ++pass)
        launch(select_digit_kernel<T>, blocks, THREADS, sizeof(Scratch), a, state, pass);
    launch(select_ties_kernel<T>, blocks, THREADS, sizeof(Scratch), a, state);
    launch(select_write_kernel<T>, blocks, THREADS, sizeof(Scratch), a, state);
}

void select_rows(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t k,
                 bool apply, uint8_t* keep, int* fault, void* stream) {
    if (rows == 0 || columns == 0) return;
    const Launcher launch{"select_mask", {{"rows", rows}, {"columns", columns}, {"k per row", k}},
                          static_cast<cudaStream_t>(stream)};
    with_dtype(launch, dtype, [&](auto type) {
        using T = decltype(type);
        const Select<T> a = arguments<T>(launch, w, rows, columns, w_stride, scale, k, apply, keep, fault);
        int threads = THREADS;  // a power of two, so that few barriers wait for many
        while (threads < MOST_THREADS && threads * a.HELD < columns) threads *= 2;
        if (threads * a.HELD >= columns)
            launch(select_held_kernel<T>, rows, threads, sizeof(Scratch), a);
        else
            launch(select_rows_kernel<T>, rows, THREADS, sizeof(Scratch), a);
    });
}

void select_matrix(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t k,
                   bool apply, uint8_t* keep, int* fault, void* workspace, void* stream) {
    if (rows == 0 || columns == 0) return;
    const Launcher launch{"select_mask", {{"rows", rows}, {"columns", columns}, {"k", k}},
                          static_cast<cudaStream_t>(stream)};
    with_dtype(launch, dtype, [&](auto type) {
        using T = decltype(type);
        launch_matrix(launch, arguments<T>(launch, w, rows, columns, w_stride, scale, k, apply, keep, fault),
                      static_cast<MatrixState*>(workspace));
    });
}

}  // namespace pyprune::cuda
