// Batched Cholesky A + damping·I = L Lᵀ (lower), FLOPs n³/3 per matrix.
//
// n ≤ 128: one thread block per matrix, the triangle packed in shared memory (33 KB; consecutive rows of a column fall in
// distinct banks, since triangular numbers are a permutation modulo 32), one launch. This is the case that libraries
// are slow at: many small systems.
//
// Larger n: blocked and right-looking in column panels of 64, in place in the output. A panel is three launches over
// the whole batch: the diagonal tile, the rows below it (32 per thread block), the trailing lower tiles (64×64, 4×4 per
// thread in registers). A matrix that has failed is skipped by every later launch and filled with NaN at the end.
#include "cuda/cholesky.cuh"
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256, SMALL = 128;
constexpr int PANEL_ROWS = 32;                 // rows below the diagonal a thread block solves
constexpr int MICRO = TILE / 16;               // 16×16 threads, MICRO² entries each
static_assert(THREADS == 256 && MICRO == 4, "the trailing update's thread layout");
constexpr float NOT_A_NUMBER = __builtin_nanf("");

__host__ __device__ constexpr int packed(int i, int j) { return i * (i + 1) / 2 + j; }

// Factors the packed lower triangle in place. Returns 0 or the order of the first minor that is not positive.
__device__ inline int factor_packed(float* l, int n) {
    for (int j = 0; j < n; ++j) {
        const float pivot = l[packed(j, j)];
        if (!(pivot > 0.f)) return j + 1;  // every thread reads the same pivot; NaN fails too
        const float root = sqrtf(pivot), scale = 1.f / root;
        __syncthreads();
        for (int i = j + threadIdx.x; i < n; i += THREADS) l[packed(i, j)] = i == j ? root : l[packed(i, j)] * scale;
        __syncthreads();
        // Rank-one update, a warp per row: the row's factor is a broadcast, the column's are consecutive rows.
        for (int i = j + 1 + threadIdx.x / WARP; i < n; i += THREADS / WARP) {
            const float left = l[packed(i, j)];
            for (int k = j + 1 + threadIdx.x % WARP; k <= i; k += WARP) l[packed(i, k)] -= left * l[packed(k, j)];
        }
        __syncthreads();
    }
    return 0;
}

__global__ void __launch_bounds__(THREADS) cholesky_small_kernel(const float* a, const float* damping, int n,
                                                                 float* factor, int* info) {
    PYPRUNE_SHARED(float, l);
    const int64_t matrix = blockIdx.x, offset = matrix * n * n;
    const float lambda = damping != nullptr ? damping[matrix] : 0.f;
    for (int i = threadIdx.x / WARP; i < n; i += THREADS / WARP)
        for (int j = threadIdx.x % WARP; j <= i; j += WARP)
            l[packed(i, j)] = a[offset + i * n + j] + (i == j ? lambda : 0.f);
    __syncthreads();
    const int failed = factor_packed(l, n);
    for (int i = threadIdx.x / WARP; i < n; i += THREADS / WARP)
        for (int j = threadIdx.x % WARP; j < n; j += WARP)
            factor[offset + i * n + j] = j > i ? 0.f : failed ? NOT_A_NUMBER : l[packed(i, j)];
    if (threadIdx.x == 0) info[matrix] = failed;
}

// Lower triangle with damping, zeros above; info = 0.
__global__ void __launch_bounds__(THREADS) cholesky_load_kernel(const float* a, const float* damping, int n,
                                                                float* factor, int* info) {
    const int64_t row = blockIdx.x, matrix = row / n;
    const int i = int(row % n);
    const float lambda = damping != nullptr ? damping[matrix] : 0.f;
    for (int j = threadIdx.x; j < n; j += THREADS)
        factor[row * n + j] = j > i ? 0.f : a[row * n + j] + (i == j ? lambda : 0.f);
    if (i == 0 && threadIdx.x == 0) info[matrix] = 0;
}

// Tile on the diagonal, from column p on.
__global__ void __launch_bounds__(THREADS) cholesky_diagonal_kernel(float* factor, int n, int p, int* info) {
    PYPRUNE_SHARED(float, l);
    const int64_t matrix = blockIdx.x;
    if (info[matrix] != 0) return;
    float* tile = factor + matrix * n * n + int64_t(p) * n + p;
    const int size = min(TILE, n - p);
    for (int i = threadIdx.x / WARP; i < size; i += THREADS / WARP)
        for (int j = threadIdx.x % WARP; j <= i; j += WARP) l[packed(i, j)] = tile[int64_t(i) * n + j];
    __syncthreads();
    const int failed = factor_packed(l, size);
    for (int i = threadIdx.x / WARP; i < size; i += THREADS / WARP)
        for (int j = threadIdx.x % WARP; j <= i; j += WARP) tile[int64_t(i) * n + j] = l[packed(i, j)];
    if (failed && threadIdx.x == 0) info[matrix] = p + failed;
}

// Rows below the tile: X L_ppᵀ = A, row by row, so L_pp xᵀ = aᵀ with a thread block's rows as right-hand sides.
__global__ void __launch_bounds__(THREADS) cholesky_panel_kernel(float* factor, int n, int p, int blocks,
                                                                 const int* info) {
    PYPRUNE_SHARED(float, l);
    float* x = l + TILE * (TILE + 1);
    const int64_t matrix = blockIdx.x / blocks;
    if (info[matrix] != 0) return;
    const int first = p + TILE + int(blockIdx.x % blocks) * PANEL_ROWS, rows = min(PANEL_ROWS, n - first);
    float* whole = factor + matrix * n * n;
    load_tile<THREADS>(l, whole + int64_t(p) * n + p, n, TILE, TILE);
    for (int i = threadIdx.x / TILE; i < PANEL_ROWS; i += THREADS / TILE) {
        const int j = threadIdx.x % TILE;
        x[j * (PANEL_ROWS + 1) + i] = i < rows ? whole[int64_t(first + i) * n + p + j] : 0.f;
    }
    __syncthreads();
    solve_lower<THREADS, PANEL_ROWS>(l, x, TILE);
    for (int i = threadIdx.x / TILE; i < rows; i += THREADS / TILE) {
        const int j = threadIdx.x % TILE;
        whole[int64_t(first + i) * n + p + j] = x[j * (PANEL_ROWS + 1) + i];
    }
}

// C −= P_i P_jᵀ for the lower tiles right of the panel. Tile t of the triangle is (i, j) with i(i+1)/2 + j = t.
__global__ void __launch_bounds__(THREADS) cholesky_update_kernel(float* factor, int n, int p, int tiles,
                                                                  const int* info) {
    PYPRUNE_SHARED(float, left);
    float* right = left + TILE * (TILE + 1);
    const int64_t matrix = blockIdx.x / tiles;
    if (info[matrix] != 0) return;
    const int t = int(blockIdx.x % tiles);
    int i = int((sqrtf(8.f * t + 1.f) - 1.f) * 0.5f);
    while (i * (i + 1) / 2 > t) --i;  // the root is rounded
    while ((i + 1) * (i + 2) / 2 <= t) ++i;
    const int row = p + TILE * (i + 1), column = p + TILE * (t - i * (i + 1) / 2 + 1);
    float* whole = factor + matrix * n * n;
    load_tile<THREADS>(left, whole + int64_t(row) * n + p, n, n - row, TILE);
    load_tile<THREADS>(right, whole + int64_t(column) * n + p, n, n - column, TILE);
    __syncthreads();

    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    float sum[MICRO][MICRO] = {};
    for (int k = 0; k < TILE; ++k) {
        float u[MICRO], v[MICRO];
        PYPRUNE_UNROLL
        for (int s = 0; s < MICRO; ++s) {
            u[s] = left[(y + 16 * s) * (TILE + 1) + k];
            v[s] = right[(x + 16 * s) * (TILE + 1) + k];
        }
        PYPRUNE_UNROLL
        for (int s = 0; s < MICRO; ++s)
            PYPRUNE_UNROLL
            for (int q = 0; q < MICRO; ++q) sum[s][q] += u[s] * v[q];
    }
    PYPRUNE_UNROLL
    for (int s = 0; s < MICRO; ++s)
        PYPRUNE_UNROLL
        for (int q = 0; q < MICRO; ++q) {
            const int r = row + y + 16 * s, c = column + x + 16 * q;
            if (r < n && c <= r) whole[int64_t(r) * n + c] -= sum[s][q];
        }
}

__global__ void __launch_bounds__(THREADS) cholesky_finish_kernel(float* factor, int n, const int* info) {
    const int64_t row = blockIdx.x;
    if (info[row / n] == 0) return;
    for (int j = threadIdx.x; j <= int(row % n); j += THREADS) factor[row * n + j] = NOT_A_NUMBER;
}

void cholesky(const float* a, const float* damping, int64_t batch, int64_t n, float* factor, int* info, void* stream) {
    if (batch == 0 || n == 0) return;
    const Launcher launch{"cholesky", {{"batch", batch}, {"n", n}}, static_cast<cudaStream_t>(stream)};
    if (n > 32768) launch.refuse("n up to 32768 is supported");
    const int size = int(n);
    if (n <= SMALL) {
        const size_t shared = packed(size, 0) * sizeof(float);
        return launch(cholesky_small_kernel, batch, THREADS, shared, a, damping, size, factor, info);
    }
    const size_t triangle = packed(TILE, 0) * sizeof(float), square = TILE * (TILE + 1) * sizeof(float);
    launch(cholesky_load_kernel, batch * n, THREADS, 0, a, damping, size, factor, info);
    for (int p = 0; p < size; p += TILE) {
        launch(cholesky_diagonal_kernel, batch, THREADS, triangle, factor, size, p, info);
        const int below = size - p - TILE;
        if (below <= 0) break;
        const int blocks = (below + PANEL_ROWS - 1) / PANEL_ROWS, side = (below + TILE - 1) / TILE;
        const int tiles = side * (side + 1) / 2;
        launch(cholesky_panel_kernel, batch * blocks, THREADS, square + TILE * (PANEL_ROWS + 1) * sizeof(float), factor,
               size, p, blocks, info);
        launch(cholesky_update_kernel, batch * tiles, THREADS, 2 * square, factor, size, p, tiles, info);
    }
    launch(cholesky_finish_kernel, batch * n, THREADS, 0, factor, size, info);
}

}  // namespace pyprune::cuda
