// pyprune._C: raw pointers, shapes and strides in, from pyprune/native.py only. No libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#ifdef PYPRUNE_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyprune; called through pyprune.ops.";
    m.def("cpu_levels", &pyprune::usable_levels, "instruction sets this processor can run, best first");
    m.def("use_cpu_level", &pyprune::use_level, py::arg("level") = "", "force one, for tests; \"\" for the best");
    m.def("cpu_level", [] { return std::string(pyprune::kernels().name); });
    m.attr("cuda_architectures") = PYPRUNE_ARCHITECTURES;
#ifdef PYPRUNE_WITH_CUDA
    m.attr("with_cuda") = true;
    bind_cuda(m);
#else
    m.attr("with_cuda") = false;
#endif
}
