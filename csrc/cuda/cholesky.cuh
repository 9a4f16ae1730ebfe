// Tiles in shared memory, for the factorisation and the solves: 64 rows of 65 floats, so that rows and columns are both
// free of bank conflicts.
#pragma once

#include "cuda/device.cuh"

namespace pyprune::cuda {

constexpr int TILE = 64;

// The first rows × columns entries of a matrix with the given stride, zeros elsewhere.
template <int THREADS>
__device__ __forceinline__ void load_tile(float* tile, const float* from, int64_t stride, int rows, int columns) {
    const int j = threadIdx.x % TILE;
    for (int i = threadIdx.x / TILE; i < TILE; i += THREADS / TILE)
        tile[i * (TILE + 1) + j] = i < rows && j < columns ? from[i * stride + j] : 0.f;
}

// X ← L⁻¹ X for the leading n × n of the tile and X [n, K] in rows of K + 1 floats. All threads call it; it ends with a
// barrier. A step needs one barrier: x_j is final when its turn comes, and each thread divides for itself.
template <int THREADS, int K>
__device__ __forceinline__ void solve_lower(const float* l, float* x, int n) {
    const int column = threadIdx.x % K, part = threadIdx.x / K;
    for (int j = 0; j < n; ++j) {
        const float value = x[j * (K + 1) + column] / l[j * (TILE + 1) + j];
        for (int i = j + 1 + part; i < n; i += THREADS / K)
            x[i * (K + 1) + column] -= l[i * (TILE + 1) + j] * value;
        __syncthreads();
        if (part == 0) x[j * (K + 1) + column] = value;  // nobody reads row j again before the end
    }
    __syncthreads();
}

// X ← L⁻ᵀ X.
template <int THREADS, int K>
__device__ __forceinline__ void solve_upper(const float* l, float* x, int n) {
    const int column = threadIdx.x % K, part = threadIdx.x / K;
    for (int j = n - 1; j >= 0; --j) {
        const float value = x[j * (K + 1) + column] / l[j * (TILE + 1) + j];
        for (int i = part; i < j; i += THREADS / K) x[i * (K + 1) + column] -= l[j * (TILE + 1) + i] * value;
        __syncthreads();
        if (part == 0) x[j * (K + 1) + column] = value;
    }
    __syncthreads();
}

}  // namespace pyprune::cuda
