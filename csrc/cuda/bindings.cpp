// <op>_cuda of pyprune._C: pointers as integers, first the device and last the stream. Compiled by the host compiler.
#include "cuda/bindings.h"

#include <cstdint>

#include "cuda/ops.h"

namespace py = pybind11;
namespace cuda = pyprune::cuda;

namespace {

using Pointer = uintptr_t;

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

void obs_sweep(int device, Pointer w, int64_t rows, int64_t columns, int64_t w_stride, Pointer r, int64_t r_stride,
               Pointer mask, int64_t n, int64_t m, Pointer keep, Pointer error, int64_t out_stride, Pointer loss,
               Pointer fault, Pointer stream) {
    cuda::use_device(device);
    cuda::obs_sweep(at<float>(w), rows, columns, w_stride, at<float>(r), r_stride, at<uint8_t>(mask), n, m,
                    at<uint8_t>(keep), at<float>(error), out_stride, at<float>(loss), at<int>(fault),
                    at<void>(stream));
}

// scope "matrix" when a workspace is given, else "row"
void select_mask(int device, Pointer w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, Pointer scale,
                 int64_t k, bool apply, Pointer keep, Pointer fault, Pointer workspace, Pointer stream) {
    cuda::use_device(device);
    if (workspace)
        cuda::select_matrix(at<void>(w), dtype, rows, columns, w_stride, at<float>(scale), k, apply, at<uint8_t>(keep),
                            at<int>(fault), at<void>(workspace), at<void>(stream));
    else
        cuda::select_rows(at<void>(w), dtype, rows, columns, w_stride, at<float>(scale), k, apply, at<uint8_t>(keep),
                          at<int>(fault), at<void>(stream));
}

void nm_mask(int device, Pointer w, int dtype, int64_t rows, int64_t columns, int64_t w_stride, Pointer scale,
             int64_t n, int64_t m, bool apply, Pointer keep, Pointer fault, Pointer stream) {
    cuda::use_device(device);
    cuda::nm_mask(at<void>(w), dtype, rows, columns, w_stride, at<float>(scale), n, m, apply, at<uint8_t>(keep),
                  at<int>(fault), at<void>(stream));
}

void compress_24(int device, Pointer w, int64_t rows, int64_t columns, int64_t w_stride, Pointer values, Pointer meta,
                 Pointer fault, Pointer stream) {
    cuda::use_device(device);
    cuda::compress_24(at<void>(w), rows, columns, w_stride, at<void>(values), at<void>(meta), at<int>(fault),
                      at<void>(stream));
}

void expand_24(int device, Pointer values, Pointer meta, int64_t rows, int64_t columns, Pointer w, Pointer fault,
               Pointer stream) {
    cuda::use_device(device);
    cuda::expand_24(at<void>(values), at<void>(meta), rows, columns, at<void>(w), at<int>(fault), at<void>(stream));
}

void sparse_linear(int device, Pointer mask, int64_t width, Pointer values, Pointer offsets, int64_t rows,
                   int64_t columns, int dtype, Pointer x, int64_t x_stride, int64_t tokens, Pointer bias, Pointer out,
                   Pointer stream) {
    cuda::use_device(device);
    const cuda::Packed w{at<uint8_t>(mask), width, at<void>(values), at<int64_t>(offsets), rows, columns};
    cuda::sparse_linear(w, dtype, at<void>(x), x_stride, tokens, at<void>(bias), at<void>(out), at<void>(stream));
}

void expand_bitmask(int device, Pointer mask, int64_t width, Pointer values, Pointer offsets, int64_t rows,
                    int64_t columns, int dtype, Pointer out, Pointer stream) {
    cuda::use_device(device);
    const cuda::Packed w{at<uint8_t>(mask), width, at<void>(values), at<int64_t>(offsets), rows, columns};
    cuda::expand_bitmask(w, dtype, at<void>(out), at<void>(stream));
}

void cholesky(int device, Pointer a, Pointer damping, int64_t batch, int64_t n, Pointer factor, Pointer info,
              Pointer stream) {
    cuda::use_device(device);
    cuda::cholesky(at<float>(a), at<float>(damping), batch, n, at<float>(factor), at<int>(info), at<void>(stream));
}

void cholesky_solve(int device, Pointer factor, Pointer info, Pointer b, int64_t batch, int64_t n, int64_t k, Pointer x,
                    Pointer stream) {
    cuda::use_device(device);
    cuda::cholesky_solve(at<float>(factor), at<int>(info), at<float>(b), batch, n, k, at<float>(x), at<void>(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;  // a full launch queue makes a launch wait
    m.attr("cuda_sweep_columns") = cuda::SWEEP_COLUMNS;
    m.attr("cuda_select_workspace") = cuda::SELECT_WORKSPACE;
    m.def("cuda_unusable", &cuda::why_unusable, unlocked);
    m.def("obs_sweep_cuda", &obs_sweep, unlocked);
    m.def("select_mask_cuda", &select_mask, unlocked);
    m.def("nm_mask_cuda", &nm_mask, unlocked);
    m.def("compress_24_cuda", &compress_24, unlocked);
    m.def("expand_24_cuda", &expand_24, unlocked);
    m.def("sparse_linear_cuda", &sparse_linear, unlocked);
    m.def("expand_bitmask_cuda", &expand_bitmask, unlocked);
    m.def("cholesky_cuda", &cholesky, unlocked);
    m.def("cholesky_solve_cuda", &cholesky_solve, unlocked);
}
