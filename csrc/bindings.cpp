// pyprune._C: raw pointers, shapes and strides in, from pyprune/ops/native.py only. No libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/kernels.h"
#ifdef PYPRUNE_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using pyprune::kernels;
using pyprune::PackedView;
using pyprune::Tokens;
using Address = std::uintptr_t;  // tensor.data_ptr(); 0 for an absent optional argument

template <typename T>
static T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

static void bind_cpu(py::module_& m) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("cpu_levels", &pyprune::usable_levels, "instruction sets this processor can run, best first");
    m.def("use_cpu_level", &pyprune::use_level, py::arg("level") = "", "force one, for tests; \"\" for the best");
    m.def("cpu_level", [] { return std::string(kernels().name); });

    m.def("cpu_tile_flops", [](bool pairs, int64_t repeats, int threads) {
        return kernels().tile_flops(pairs, repeats, threads);
    }, nogil);
    m.def("gram_update_cpu", [](Address gram, Address x, int64_t tokens, int64_t columns, int64_t stride, int type,
                                Address sums, Address count, Address mask, bool round, int threads) {
        const Tokens view{at<void>(x), tokens, columns, stride, type, at<uint8_t>(mask)};
        kernels().gram(at<float>(gram), view, at<float>(sums), at<int64_t>(count), round, threads);
    }, nogil);
    m.def("cross_gram_update_cpu", [](Address cross, Address y, int64_t y_columns, int64_t y_stride, Address x,
                                      int64_t x_columns, int64_t x_stride, int64_t tokens, int type, Address mask,
                                      int threads) {
        const Tokens ys{at<void>(y), tokens, y_columns, y_stride, type, at<uint8_t>(mask)};
        const Tokens xs{at<void>(x), tokens, x_columns, x_stride, type, at<uint8_t>(mask)};
        kernels().cross_gram(at<float>(cross), ys, xs, threads);
    }, nogil);
    m.def("linear_cpu", [](Address x, int64_t x_stride, Address w, int64_t w_stride, Address bias, Address out,
                           int64_t out_stride, int64_t rows, int64_t outputs, int64_t inputs, bool accumulate,
                           int threads) {
        kernels().linear(at<float>(x), x_stride, at<float>(w), w_stride, at<float>(bias), at<float>(out), out_stride,
                         rows, outputs, inputs, accumulate, threads);
    }, nogil);
    m.def("trailing_update_cpu", [](Address w, int64_t w_stride, Address e, int64_t e_stride, Address r,
                                    int64_t r_stride, int64_t rows, int64_t columns, int64_t depth, int threads) {
        kernels().trailing_update(at<float>(w), w_stride, at<float>(e), e_stride, at<float>(r), r_stride, rows, columns,
                                  depth, threads);
    }, nogil);
    m.def("column_moments_cpu", [](Address x, int64_t tokens, int64_t columns, int64_t stride, int type, Address mask,
                                   Address mean, Address m2, int threads) {
        const Tokens view{at<void>(x), tokens, columns, stride, type, at<uint8_t>(mask)};
        return kernels().column_moments(view, at<float>(mean), at<float>(m2), threads);
    }, nogil);
    m.def("select_mask_cpu", [](Address w, int64_t stride, int64_t rows, int64_t columns, int type, Address scale,
                                int64_t k, bool by_row, bool apply, Address mask, int threads) {
        return kernels().select_mask(at<void>(w), stride, rows, columns, type, at<float>(scale), k, by_row, apply,
                                     at<uint8_t>(mask), threads);
    }, nogil);
    m.def("nm_mask_cpu", [](Address w, int64_t stride, int64_t rows, int64_t columns, int type, Address scale, int n,
                            int group, bool apply, Address mask, int threads) {
        return kernels().nm_mask(at<void>(w), stride, rows, columns, type, at<float>(scale), n, group, apply,
                                 at<uint8_t>(mask), threads);
    }, nogil);
    m.def("obs_sweep_cpu", [](Address w, int64_t w_stride, Address r, int64_t r_stride, int64_t rows, int64_t columns,
                              Address mask, int64_t n, int64_t group, Address errors, Address losses, int threads) {
        return kernels().obs_sweep(at<float>(w), w_stride, at<float>(r), r_stride, rows, columns, at<uint8_t>(mask), n,
                                   group, at<float>(errors), at<float>(losses), threads);
    }, nogil);
    m.def("cholesky_cpu", [](Address a, Address damping, Address factor, Address b, Address x, Address info,
                             int64_t batch, int64_t n, int64_t k, int threads) {
        kernels().cholesky(at<float>(a), at<float>(damping), at<float>(factor), at<float>(b), at<float>(x),
                           at<int32_t>(info), batch, n, k, threads);
    }, nogil);
    m.def("compress_24_cpu", [](Address w, int64_t stride, int64_t rows, int64_t columns, Address values,
                                Address metadata, int threads) {
        return kernels().compress_24(at<uint16_t>(w), stride, rows, columns, at<uint16_t>(values),
                                     at<int16_t>(metadata), threads);
    }, nogil);
    m.def("expand_24_cpu", [](Address values, Address metadata, int64_t rows, int64_t columns, Address w, int threads) {
        return kernels().expand_24(at<uint16_t>(values), at<int16_t>(metadata), rows, columns, at<uint16_t>(w),
                                   threads);
    }, nogil);
    m.def("sparse_linear_cpu", [](Address mask, int64_t width, Address values, Address offsets, int64_t rows,
                                  int64_t columns, int type, Address x, int64_t x_stride, int64_t tokens, Address bias,
                                  Address out, int threads) {
        const PackedView w{at<uint8_t>(mask), width, at<void>(values), at<int64_t>(offsets), rows, columns, type};
        kernels().sparse_linear(w, at<void>(x), x_stride, tokens, at<void>(bias), at<void>(out), rows, threads);
    }, nogil);
    m.def("expand_bitmask_cpu", [](Address mask, int64_t width, Address values, Address offsets, int64_t rows,
                                   int64_t columns, int type, int64_t first, int64_t count, Address out, int threads) {
        const PackedView w{at<uint8_t>(mask), width, at<void>(values), at<int64_t>(offsets), rows, columns, type};
        kernels().expand_bitmask(w, first, count, at<void>(out), threads);
    }, nogil);
    m.def("rms_norm_cpu", [](Address x, int64_t stride, int64_t rows, int64_t columns, int type, Address weight,
                             float eps, int form, Address out, int threads) {
        kernels().rms_norm(at<void>(x), stride, rows, columns, type, at<void>(weight), eps, form, at<void>(out),
                           threads);
    }, nogil);
    m.def("swiglu_cpu", [](Address gate, Address up, Address out, int64_t count, int type, int threads) {
        kernels().swiglu(at<void>(gate), at<void>(up), at<void>(out), count, type, threads);
    }, nogil);
    m.def("rotary_cpu", [](Address x, const std::array<int64_t, 4>& shape, const std::array<int64_t, 3>& strides,
                           Address out, const std::array<int64_t, 3>& out_strides, Address cos,
                           const std::array<int64_t, 2>& cos_strides, Address sin,
                           const std::array<int64_t, 2>& sin_strides, int type, int threads) {
        const auto view = [&](Address data, const std::array<int64_t, 3>& s) {
            return pyprune::HeadsView{at<void>(data), shape[0], shape[1], shape[2], shape[3], {s[0], s[1], s[2]}};
        };
        kernels().rotary(view(x, strides), view(out, out_strides), at<void>(cos), at<void>(sin), cos_strides.data(),
                         sin_strides.data(), type, threads);
    }, nogil);
    typedef std::array<std::int64_t, 3> Strides;  // of batch, heads and tokens
    m.def("attention_cpu", [](Address q, Strides q_stride, Address k, Strides k_stride, Address v, Strides v_stride,
                              Address mask, Strides mask_stride, int mask_kind, Address out, Strides out_stride,
                              std::array<std::int64_t, 7> shape, int type, bool causal, float scale, int threads) {
        pyprune::AttentionView view{at<void>(q), at<void>(k), at<void>(v), at<void>(mask), at<void>(out), shape[0],
                                    shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
        const auto copy = [](const Strides& from, int64_t (&to)[3]) { std::copy(from.begin(), from.end(), to); };
        copy(q_stride, view.q_stride), copy(k_stride, view.k_stride), copy(v_stride, view.v_stride);
        copy(mask_stride, view.mask_stride), copy(out_stride, view.out_stride);
        view.type = type, view.mask_kind = mask_kind, view.causal = causal, view.scale = scale;
        kernels().attention(view, threads);
    }, nogil);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyprune; called through pyprune.ops.";
    bind_cpu(m);
    m.attr("cuda_architectures") = PYPRUNE_ARCHITECTURES;
#ifdef PYPRUNE_WITH_CUDA
    m.attr("with_cuda") = true;
    bind_cuda(m);
#else
    m.attr("with_cuda") = false;
#endif
}
