// Compiled once per instruction set (CMakeLists.txt): everything it includes lives in a namespace of that name.
#include "cpu/kernels.h"

#define PYPRUNE_JOIN_(a, b) a##b
#define PYPRUNE_JOIN(a, b) PYPRUNE_JOIN_(a, b)
#define PYPRUNE_STRING_(a) #a
#define PYPRUNE_STRING(a) PYPRUNE_STRING_(a)

namespace pyprune {
extern const Kernels PYPRUNE_JOIN(kernels_, PYPRUNE_ISA);
const Kernels PYPRUNE_JOIN(kernels_, PYPRUNE_ISA) = {
    PYPRUNE_STRING(PYPRUNE_ISA),
};
}  // namespace pyprune
