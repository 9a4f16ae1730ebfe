// Host functions of the CUDA ops: device pointers, sizes, strides in elements, and a stream. They enqueue and return;
// nothing here synchronises. A refused argument is std::invalid_argument, a failed launch std::runtime_error.
//
// What only the data can show to be wrong (a fault) is found by the kernel, which sets *fault to 1 and leaves the
// affected part as it was. The word lies in pinned host memory: reading it later needs no synchronisation.
//
// The contracts are those of pyprune/ops/__init__.py; pyprune/ops/native.py allocates and is the only caller.
#pragma once

#include <cstdint>
#include <string>

namespace pyprune::cuda {

// Empty if kernels can be launched on this machine, else the reason as a sentence without a capital or a full stop.
std::string why_unusable();

// Makes the device current for the calling thread; every call below launches there.
void use_device(int device);

constexpr int SWEEP_COLUMNS = 128;  // columns of one sweep launch; wider column blocks are swept in such pieces

// Mask [rows, columns] given (may be `keep` itself), or null: then the n largest of every m are kept; out_stride is the
// row stride of mask, keep and error. At most SWEEP_COLUMNS columns, M dividing them. Faults: a row of
// w that is not finite, and an r that is not finite or has a diagonal that is not positive; the row, or all of w, then
// stays as it was, all kept, with errors 0 and a NaN loss.
void obs_sweep(float* w, int64_t rows, int64_t columns, int64_t w_stride, const float* r, int64_t r_stride,
               const uint8_t* mask, int64_t n, int64_t m, uint8_t* keep, float* error, int64_t out_stride,
               float* loss, int* fault, void* stream);

// Drops exactly the k lowest |w|·scale of every row, ties from the left. Fault: NaN scores; that row stays, all kept.
void select_rows(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t k,
                 bool apply, uint8_t* keep, int* fault, void* stream);

// The same over the whole matrix in row-major order; with NaN scores all of it stays. `workspace`
// holds SELECT_WORKSPACE 32-bit words.
constexpr int64_t SELECT_WORKSPACE = 2048 + 8 + 1024;
void select_matrix(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t k,
                   bool apply, uint8_t* keep, int* fault, void* workspace, void* stream);

// Keeps the n largest |w|·scale of every m ≤ 16 consecutive columns. Fault: NaN scores; that group stays, all kept.
void nm_mask(void* w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, const float* scale, int64_t n,
             int64_t m, bool apply, uint8_t* keep, int* fault, void* stream);

// 2:4 matrix of 16-bit elements [rows, columns] to values [rows, columns / 2] and reordered metadata, and back. Faults:
// a group with more than two non-zeros (the surplus is lost), metadata that names one place twice.
void compress_24(const void* w, int64_t rows, int64_t columns, int64_t w_stride, void* values, void* meta, int* fault,
                 void* stream);
void expand_24(const void* values, const void* meta, int64_t rows, int64_t columns, void* w, int* fault, void* stream);

// A packed weight, checked: mask [rows, width], values in the type that the call names, offsets [rows + 1].
struct Packed {
    const uint8_t* mask;
    int64_t width;
    const void* values;
    const int64_t* offsets;
    int64_t rows, columns;
};

// out [tokens, rows] = x [tokens, columns] wᵀ + bias (may be null), for a few tokens.
void sparse_linear(const Packed& w, int dtype, const void* x, int64_t x_stride, int64_t tokens, const void* bias,
                   void* out, void* stream);

// out [rows, columns], the dense weight.
void expand_bitmask(const Packed& w, int dtype, void* out, void* stream);

// Lower factors [batch, n, n] of a + damping·I (damping may be null); info as LAPACK's.
void cholesky(const float* a, const float* damping, int64_t batch, int64_t n, float* factor, int* info, void* stream);

// X of L Lᵀ X = B for contiguous B, X [batch, n, k]; NaN where info ≠ 0.
void cholesky_solve(const float* factor, const int* info, const float* b, int64_t batch, int64_t n, int64_t k, float* x,
                    void* stream);

}  // namespace pyprune::cuda
