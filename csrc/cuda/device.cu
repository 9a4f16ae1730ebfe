// The device a call runs on: the module's CUDA runtime is its own (linked statically), so torch's choice is told to it.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

void use_device(int device) {
    Launcher{"use_device", {{"device", device}}, nullptr}.check(cudaSetDevice(device));
}

}  // namespace pyprune::cuda
