// The device a call runs on: the module's CUDA runtime is its own (linked statically), so torch's choice is told to it.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

namespace {

std::string release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

std::string why_unusable() {
    int driver = 0, toolkit = 0, devices = 0;
    cudaRuntimeGetVersion(&toolkit);
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    cudaGetLastError();  // the next launch must not find it
    if (driver == 0) return "there is no NVIDIA driver";
    if (status == cudaErrorInsufficientDriver || driver / 1000 < toolkit / 1000)
        return "this build was made with CUDA " + release(toolkit) + ", newer than the driver's " + release(driver) +
               ": update the NVIDIA driver, or rebuild with a toolkit of CUDA " + std::to_string(driver / 1000);
    if (status != cudaSuccess) return std::string("CUDA reports: ") + cudaGetErrorString(status);
    return devices == 0 ? "CUDA finds no GPU" : "";
}

void use_device(int device) {
    Launcher{"use_device", {{"device", device}}, nullptr}.check(cudaSetDevice(device));
}

}  // namespace pyprune::cuda
