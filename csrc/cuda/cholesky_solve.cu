// X of L Lᵀ X = B for a batch, FLOPs 2·n²·k per matrix. One launch: a thread block owns K columns of one matrix's
// right-hand side from the first row to the last and back, in steps of 64 rows:
//
//     X_p ← L_pp⁻¹ (B_p − Σ_{q<p} L_pq X_q) downwards, then X_p ← L_pp⁻ᵀ (X_p − Σ_{q>p} L_qpᵀ X_q) upwards.
//
// X lives in the output; a thread block reads only what itself has written, behind a barrier.
#include "cuda/cholesky.cuh"
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256;

// Rows p … p + 63 of K columns between global memory and a tile of K + 1 floats per row.
template <int K>
__device__ __forceinline__ void load_rows(float* x, const float* from, int p, int n, int columns, int64_t stride) {
    const int column = threadIdx.x % K;
    for (int i = threadIdx.x / K; i < TILE; i += THREADS / K)
        x[i * (K + 1) + column] = p + i < n && column < columns ? from[(p + i) * stride + column] : 0.f;
}

template <int K>
__device__ __forceinline__ void store_rows(const float* x, float* to, int p, int n, int columns, int64_t stride) {
    const int column = threadIdx.x % K;
    for (int i = threadIdx.x / K; i < TILE; i += THREADS / K)
        if (p + i < n && column < columns) to[(p + i) * stride + column] = x[i * (K + 1) + column];
}

// sum −= M X over a tile, M = L or (TRANSPOSED) Lᵀ; each thread owns every (THREADS / K)-th row of one column.
template <int K, bool TRANSPOSED>
__device__ __forceinline__ void subtract_product(float (&sum)[TILE * K / THREADS], const float* l, const float* x) {
    constexpr int STEP = THREADS / K;
    const int column = threadIdx.x % K, part = threadIdx.x / K;
    for (int k = 0; k < TILE; ++k) {
        const float value = x[k * (K + 1) + column];
        PYPRUNE_UNROLL
        for (int s = 0; s < TILE / STEP; ++s) {
            const int i = part + s * STEP;
            sum[s] -= (TRANSPOSED ? l[k * (TILE + 1) + i] : l[i * (TILE + 1) + k]) * value;
        }
    }
}

template <int K, bool UPWARDS>
__device__ __forceinline__ void sweep_rows(const float* factor, float* x, int n, int columns, int64_t stride, float* l,
                                           float* y) {
    constexpr int STEP = THREADS / K;
    const int column = threadIdx.x % K, part = threadIdx.x / K, tiles = (n + TILE - 1) / TILE;
    for (int s = 0; s < tiles; ++s) {
        const int at = UPWARDS ? tiles - 1 - s : s, p = at * TILE;
        float sum[TILE / STEP];
        PYPRUNE_UNROLL
        for (int r = 0; r < TILE / STEP; ++r) {
            const int i = p + part + r * STEP;
            sum[r] = i < n && column < columns ? x[i * stride + column] : 0.f;
        }
        for (int done = 0; done < s; ++done) {
            const int q = (UPWARDS ? tiles - 1 - done : done) * TILE, row = UPWARDS ? q : p, col = UPWARDS ? p : q;
            load_tile<THREADS>(l, factor + int64_t(row) * n + col, n, n - row, n - col);
            load_rows<K>(y, x, q, n, columns, stride);
            __syncthreads();
            subtract_product<K, UPWARDS>(sum, l, y);
            __syncthreads();
        }
        load_tile<THREADS>(l, factor + int64_t(p) * n + p, n, n - p, n - p);
        PYPRUNE_UNROLL
        for (int r = 0; r < TILE / STEP; ++r) y[(part + r * STEP) * (K + 1) + column] = sum[r];
        __syncthreads();
        if (UPWARDS)
            solve_upper<THREADS, K>(l, y, min(TILE, n - p));
        else
            solve_lower<THREADS, K>(l, y, min(TILE, n - p));
        store_rows<K>(y, x, p, n, columns, stride);
        __syncthreads();  // the next step reads these rows, and overwrites the tiles
    }
}

template <int K>
__global__ void __launch_bounds__(THREADS, 4) cholesky_solve_kernel(const float* factor, const int* info,
                                                                    const float* b, int n, int64_t k, int64_t blocks,
                                                                    float* x) {
    PYPRUNE_SHARED(float, l);
    float* y = l + TILE * (TILE + 1);
    const int64_t matrix = blockIdx.x / blocks, first = blockIdx.x % blocks * K, offset = matrix * n * k + first;
    const int columns = int(min(int64_t(K), k - first)), column = threadIdx.x % K;
    const bool failed = info[matrix] != 0;
    for (int i = threadIdx.x / K; i < n; i += THREADS / K)
        if (column < columns) x[offset + i * k + column] = failed ? __builtin_nanf("") : b[offset + i * k + column];
    if (failed) return;
    __syncthreads();
    sweep_rows<K, false>(factor + matrix * n * n, x + offset, n, columns, k, l, y);
    sweep_rows<K, true>(factor + matrix * n * n, x + offset, n, columns, k, l, y);
}

template <int K>
void launch_solve(const Launcher& launch, const float* factor, const int* info, const float* b, int64_t batch, int n,
                  int64_t k, float* x) {
    const int64_t blocks = (k + K - 1) / K;
    const size_t shared = (TILE * (TILE + 1) + TILE * (K + 1)) * sizeof(float);
    launch(cholesky_solve_kernel<K>, batch * blocks, THREADS, shared, factor, info, b, n, k, blocks, x);
}

void cholesky_solve(const float* factor, const int* info, const float* b, int64_t batch, int64_t n, int64_t k, float* x,
                    void* stream) {
    if (batch == 0 || n == 0 || k == 0) return;
    const Launcher launch{"cholesky_solve", {{"batch", batch}, {"n", n}, {"k", k}}, static_cast<cudaStream_t>(stream)};
    if (n > 32768) launch.refuse("n up to 32768 is supported");
    if (k <= 8)
        launch_solve<8>(launch, factor, info, b, batch, int(n), k, x);
    else
        launch_solve<32>(launch, factor, info, b, batch, int(n), k, x);
}

}  // namespace pyprune::cuda
