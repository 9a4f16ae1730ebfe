// OBS sweep of one column block (SparseGPT, arXiv 2301.00774, algorithm 1), one launch.
//
//     e_j = (w_j − keep_j·w_j) / r_jj,   w_k −= e_j·r_jk for k > j,   for columns j from left to right
//
// FLOPs: rows·b²; bytes: 13 per weight and the factor once per thread block. Rows are independent, columns are a chain of
// b dependent steps, so the time of few rows is latency: shuffle + multiply + add per column.
//
// obs_sweep_kernel: a row is 4 lanes with 32 columns each in registers, unrolled as far as makes every register index a
// constant. Lane q holds columns 16c + 4q … 16c + 4q + 3 of chunk c = 0 … 7: global loads are 16 bytes, a
// 2:4 group lies within a lane, the factor is read from shared memory in its natural order, and finished chunks cost
// nothing. A weight that is dropped leaves its register to its error: one of the two is always zero.
// The factor is packed by chunks (row j starts at column 16·(j / 16)): 36 KB, two blocks per multiprocessor at least. It
// arrives by asynchronous copies, which are under way while w and the mask are: one memory latency in all.
//
// obs_sweep_any_kernel: any N:M; a warp per row, 4 columns per lane, a loop of b steps.
#include <cstddef>

#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int COLUMNS = SWEEP_COLUMNS, CHUNK = 16, CHUNKS = COLUMNS / CHUNK;
constexpr int LANES = 4, HELD = COLUMNS / LANES;  // lanes per row, columns per lane
constexpr int THREADS = 128, ROWS = THREADS / LANES, ROWS_ANY = THREADS / WARP;

// First float of factor row j in shared memory.
__host__ __device__ constexpr int packed_row(int j) {
    const int c = j / CHUNK;
    return CHUNK * (COLUMNS * c - CHUNK * c * (c - 1) / 2) + j % CHUNK * (COLUMNS - CHUNK * c);
}
constexpr int FACTOR = packed_row(COLUMNS);

// The factor in shared memory: the strict upper triangle, zero elsewhere (a zero leaves finished columns alone), the
// diagonal's reciprocals, and whether r is unusable. Keys: a row of each warp, for obs_sweep_any_kernel only.
struct Factor {
    float packed[FACTOR], inverse[COLUMNS];
    uint32_t bad;
    uint32_t keys[ROWS_ANY][COLUMNS];
};
constexpr size_t SHARED_ANY = sizeof(Factor), SHARED = offsetof(Factor, keys);
static_assert(FACTOR == 9216 && SHARED_ANY <= 48 << 10, "the default shared memory of every architecture");

struct Sweep {
    float* w;
    const float* r;
    const uint8_t* mask;
    uint8_t* keep;
    float *error, *loss;
    int* fault;
    int64_t w_stride, r_stride, out_stride;  // out: mask, keep and error
    int rows, columns, n, m;
    bool whole_w, whole_r, whole_out;  // 16-byte accesses to w; to r; to error, and 4-byte ones to the masks
};

// Four columns of the factor per lane, a row per warp, four rows at a time: calls body(place in shared memory; row and
// first column of r). Rolled over the chunks: the loop waits for nothing, and the code of the sweep itself is long
// enough.
template <class Body>
__device__ __forceinline__ void each_quad(Factor* f, Body body) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    PYPRUNE_ROLL
    for (int c = 0; c < CHUNKS && lane < (COLUMNS - c * CHUNK) / 4; ++c) {
        const int pitch = COLUMNS - c * CHUNK;
        float* at = f->packed + packed_row(c * CHUNK) + warp * pitch + lane * 4;
        PYPRUNE_UNROLL
        for (int i = 0; i < CHUNK; i += THREADS / WARP)
            body(at + i * pitch, c * CHUNK + i + warp, c * CHUNK + lane * 4);
    }
}

// Starts the factor's copy; what is past the end becomes zero.
__device__ __forceinline__ void request_factor(Factor* f, const Sweep& a) {
    const int columns = a.columns;
    if (a.whole_r)
        each_quad(f, [&](float* to, int j, int k) {
            copy_async<16>(to, a.r + j * a.r_stride + k, j < columns && k < columns ? 16 : 0);
        });
    else
        each_quad(f, [&](float* to, int j, int k) {
            PYPRUNE_UNROLL
            for (int t = 0; t < 4; ++t)
                copy_async<4>(to + t, a.r + j * a.r_stride + k + t, j < columns && k + t < columns ? 4 : 0);
        });
}

// All threads call it; it ends with a barrier, and returns whether r is usable. A thread completes what it has copied:
// what lies on and below the diagonal becomes zero. The sum of 0·x is NaN if any x is not finite.
__device__ __forceinline__ bool receive_factor(Factor* f, const Sweep& a) {
    const int lane = threadIdx.x % WARP;
    float probe = 0.f;
    if (threadIdx.x == 0) f->bad = 0;
    wait_for_copies();
    each_quad(f, [&](float* at, int j, int first) {
        float r[4];
        load(r, at, 4, true);
        if (lane < CHUNK / 4) {  // the square on the diagonal
            float diagonal = 1.f;
            PYPRUNE_UNROLL
            for (int t = 0; t < 4; ++t) {
                if (first + t == j && j < a.columns) diagonal = r[t];
                if (first + t <= j) r[t] = 0.f;
            }
            if (first / 4 == j / 4) f->inverse[j] = 1.f / diagonal;
            probe += diagonal > 0.f ? 0.f * diagonal : __builtin_nanf("");
            store(at, r, 4, true);
        }
        PYPRUNE_UNROLL
        for (int t = 0; t < 4; ++t) probe += 0.f * r[t];
    });
    __syncthreads();
    if (probe != 0.f) atomicOr(&f->bad, 1u);
    __syncthreads();
    return f->bad == 0;  // a word of shared memory: the compiler sees that it is the same for all, unlike a vote
}

// Four elements per chunk: all loads are under way before the first is used. `whole`: vectors, all inside or all outside.
template <class T>
__device__ __forceinline__ void load_row(T (&to)[HELD], const T* from, int lane, int width, bool whole) {
    if (whole) {
        PYPRUNE_UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
            typename Word<4 * sizeof(T)>::type word{};
            const int column = c * CHUNK + lane * 4;
            if (column < width) word = *reinterpret_cast<const decltype(word)*>(from + column);
            memcpy(&to[c * 4], &word, sizeof word);
        }
    } else {
        PYPRUNE_UNROLL
        for (int i = 0; i < HELD; ++i) {
            const int column = i / 4 * CHUNK + lane * 4 + i % 4;
            to[i] = column < width ? from[column] : T{};
        }
    }
}

// Keep bits of the M columns that start in chunk c with lane `owner`, chosen by |w|/r_jj by the lanes that hold them.
// M is 4 or 8: one lane or two.
template <int M>
__device__ __forceinline__ uint32_t choose(uint32_t keep, const float (&x)[HELD], const float* inverse, int c,
                                           int owner, int n, int lane) {
    const int place = M == 4 ? 0 : lane % 2 * 4;  // of my columns in the group
    uint32_t key[M];
    PYPRUNE_UNROLL
    for (int t = 0; t < 4; ++t) {
        const uint32_t mine = score_key(x[c * 4 + t], inverse[c * CHUNK + lane * 4 + t]);
        if (M == 4) {
            key[t] = mine;
        } else {
            const uint32_t other = __shfl_xor_sync(FULL, mine, 1, LANES);
            key[t % M] = place ? other : mine;
            key[(t + 4) % M] = place ? mine : other;
        }
    }
    const uint32_t chosen = keep_largest<M>(key, M, n) >> place & 15u;
    return lane / (M / 4) == owner / (M / 4) ? (keep & ~(15u << c * 4)) | chosen << c * 4 : keep;
}

// M = 0: the mask is given. M = 4, 8: the n of every M largest are kept, chosen when the sweep reaches the group.
template <int M>
__global__ void __launch_bounds__(THREADS, 4) obs_sweep_kernel(const Sweep a) {
    PYPRUNE_SHARED(Factor, f);
    const int lane = threadIdx.x % LANES;
    const int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.x / LANES;
    const int width = row < a.rows ? a.columns : 0;  // a row past the end holds zeros and stores nothing

    request_factor(f, a);
    float x[HELD], probe = 0.f;
    load_row(x, a.w + row * a.w_stride, lane, width, a.whole_w);
    uint32_t keep = FULL;  // bit i: the column in x[i] is kept
    if constexpr (M == 0) {
        uint8_t bits[HELD];
        load_row(bits, a.mask + row * a.out_stride, lane, width, a.whole_out);
        keep = 0;
        PYPRUNE_UNROLL
        for (int i = 0; i < HELD; ++i) keep |= uint32_t(bits[i] != 0) << i;
    }
    const bool sound = receive_factor(f, a);
    PYPRUNE_UNROLL
    for (int i = 0; i < HELD; ++i) probe += 0.f * x[i];
    probe += __shfl_xor_sync(FULL, probe, 1, LANES);
    probe += __shfl_xor_sync(FULL, probe, 2, LANES);
    const int steps = sound ? a.columns : 0;
    const bool usable = steps > 0 && probe == 0.f;
    if (!usable) {
        if (width > 0) *a.fault = 1;
        keep = FULL;
    }

    PYPRUNE_UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
        if (c * CHUNK >= steps) break;
        // Rolled over the lanes that own the columns: a quarter of the code, for the sake of the instruction cache.
        PYPRUNE_ROLL
        for (int owner = 0; owner < LANES; ++owner) {
            const int first = c * CHUNK + owner * 4;
            const float* row_of_r = f->packed + packed_row(c * CHUNK) + owner * 4 * (COLUMNS - c * CHUNK) + lane * 4;
            if constexpr (M > 0) {
                if (owner % (M / 4) == 0) {
                    const uint32_t chosen = choose<M>(keep, x, f->inverse, c, owner, a.n, lane);
                    keep = usable ? chosen : keep;
                }
            }
            PYPRUNE_UNROLL
            for (int t = 0; t < 4; ++t) {
                const int i = c * 4 + t;
                const bool dropped = (keep >> i & 1) == 0;
                float e = dropped ? x[i] * f->inverse[first + t] : 0.f;
                if (lane == owner && dropped) x[i] = e;
                e = __shfl_sync(FULL, e, owner, LANES);
                PYPRUNE_UNROLL
                for (int d = c; d < CHUNKS; ++d) {
                    const float4 v =
                        *reinterpret_cast<const float4*>(row_of_r + t * (COLUMNS - c * CHUNK) + (d - c) * CHUNK);
                    x[d * 4 + 0] -= e * v.x;
                    x[d * 4 + 1] -= e * v.y;
                    x[d * 4 + 2] -= e * v.z;
                    x[d * 4 + 3] -= e * v.w;
                }
            }
        }
    }

    float loss = 0.f;
    PYPRUNE_UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
        const int column = c * CHUNK + lane * 4;
        float w[4], error[4];
        uint8_t bits[4];
        PYPRUNE_UNROLL
        for (int t = 0; t < 4; ++t) {
            bits[t] = keep >> (c * 4 + t) & 1;
            w[t] = bits[t] ? x[c * 4 + t] : 0.f;
            error[t] = bits[t] ? 0.f : x[c * 4 + t];
            loss += error[t] * error[t];
        }
        store(a.w + row * a.w_stride + column, w, width - column, a.whole_w);
        store(a.error + row * a.out_stride + column, error, width - column, a.whole_out);
        store(a.keep + row * a.out_stride + column, bits, width - column, a.whole_out);
    }
    loss += __shfl_xor_sync(FULL, loss, 1, LANES);
    loss += __shfl_xor_sync(FULL, loss, 2, LANES);
    if (lane == 0 && row < a.rows) a.loss[row] = usable ? loss : __builtin_nanf("");
}

__global__ void __launch_bounds__(THREADS) obs_sweep_any_kernel(const Sweep a) {
    PYPRUNE_SHARED(Factor, f);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t* keys = f->keys[warp];
    const int64_t row = int64_t(blockIdx.x) * ROWS_ANY + warp;
    const int width = row < a.rows ? a.columns : 0;
    constexpr int PARTS = COLUMNS / WARP;  // lane l holds columns l, l + 32, …

    request_factor(f, a);
    float x[PARTS], probe = 0.f;
    uint32_t keep = FULL;
    PYPRUNE_UNROLL
    for (int p = 0; p < PARTS; ++p) {
        const int column = p * WARP + lane;
        x[p] = column < width ? a.w[row * a.w_stride + column] : 0.f;
        probe += 0.f * x[p];
    }
    const bool sound = receive_factor(f, a);
    PYPRUNE_UNROLL
    for (int d = 1; d < WARP; d *= 2) probe += __shfl_xor_sync(FULL, probe, d, WARP);
    const int steps = sound && probe == 0.f ? a.columns : 0;  // uniform in the warp, which is one row
    if (steps == 0 && width > 0) *a.fault = 1;

    PYPRUNE_UNROLL
    for (int i = 0; i < PARTS; ++i)
        for (int owner = 0; owner < WARP && i * WARP + owner < steps; ++owner) {
            const int j = i * WARP + owner;
            if (j % a.m == 0) {
                PYPRUNE_UNROLL
                for (int p = 0; p < PARTS; ++p)
                    keys[p * WARP + lane] = score_key(x[p], f->inverse[p * WARP + lane]);
                __syncwarp();
                PYPRUNE_UNROLL
                for (int p = 0; p < PARTS; ++p) {
                    const int k = p * WARP + lane;
                    if (k < j || k >= j + a.m) continue;
                    int rank = 0;
                    for (int o = j; o < j + a.m; ++o) rank += o < k ? keys[o] <= keys[k] : keys[o] < keys[k];
                    if (rank < a.m - a.n) keep &= ~(1u << p);
                }
                __syncwarp();
            }
            const bool dropped = (keep >> i & 1) == 0;
            float e = dropped ? x[i] * f->inverse[j] : 0.f;
            if (lane == owner && dropped) x[i] = e;
            e = __shfl_sync(FULL, e, owner, WARP);
            const float* r = f->packed + packed_row(j) - j / CHUNK * CHUNK;
            PYPRUNE_UNROLL
            for (int p = i; p < PARTS; ++p)
                if (p * WARP + lane > j) x[p] -= e * r[p * WARP + lane];
        }

    float loss = 0.f;
    PYPRUNE_UNROLL
    for (int p = 0; p < PARTS; ++p) {
        const int column = p * WARP + lane;
        const bool kept = keep >> p & 1;
        const float error = kept ? 0.f : x[p];
        loss += error * error;
        if (column >= width) continue;
        a.w[row * a.w_stride + column] = kept ? x[p] : 0.f;
        a.error[row * a.out_stride + column] = error;
        a.keep[row * a.out_stride + column] = kept;
    }
    PYPRUNE_UNROLL
    for (int d = 1; d < WARP; d *= 2) loss += __shfl_xor_sync(FULL, loss, d, WARP);
    if (lane == 0 && row < a.rows) a.loss[row] = steps > 0 ? loss : __builtin_nanf("");
}

void obs_sweep(float* w, int64_t rows, int64_t columns, int64_t w_stride, const float* r, int64_t r_stride,
               const uint8_t* mask, int64_t n, int64_t m, uint8_t* keep, float* error, int64_t out_stride,
               float* loss, int* fault, void* stream) {
    if (rows == 0 || columns == 0) return;
    const Launcher launch{"obs_sweep", {{"rows", rows}, {"columns", columns}, {"N", n}, {"M", m}},
                          static_cast<cudaStream_t>(stream)};
    if (columns > COLUMNS || rows > 0x7fffffff)
        launch.refuse("a launch takes at most 128 columns and 2^31 - 1 rows");
    if (mask == nullptr && (m < 1 || columns % m != 0))
        launch.refuse("without a mask, M must divide the columns");
    const Sweep a{w, r, mask, keep, error, loss, fault, w_stride, r_stride, out_stride, int(rows), int(columns), int(n),
                  int(m), columns % 4 == 0 && aligned(w, w_stride * int64_t(sizeof(float)), 16),
                  columns % 4 == 0 && aligned(r, r_stride * int64_t(sizeof(float)), 16),
                  columns % 4 == 0 && aligned(error, out_stride * int64_t(sizeof(float)), 16) &&
                      aligned(keep, out_stride, 4) && aligned(mask, out_stride, 4)};
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    if (mask != nullptr) return launch(obs_sweep_kernel<0>, blocks, THREADS, SHARED, a);
    if (m == 4) return launch(obs_sweep_kernel<4>, blocks, THREADS, SHARED, a);
    if (m == 8) return launch(obs_sweep_kernel<8>, blocks, THREADS, SHARED, a);
    launch(obs_sweep_any_kernel, (rows + ROWS_ANY - 1) / ROWS_ANY, THREADS, SHARED_ANY, a);
}

}  // namespace pyprune::cuda
