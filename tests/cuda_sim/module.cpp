// The CUDA half of pyprune._C over the simulated kernels, to test its bindings and pyprune/ops/native.py on CPU tensors.
#include "cuda/bindings.h"

PYBIND11_MODULE(simulated, m) { bind_cuda(m); }
