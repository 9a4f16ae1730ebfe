// Compiled once per instruction set (CMakeLists.txt); the headers' functions have internal linkage, so that each table
// below holds code for its own instruction set.
#include "cpu/attention.h"
#include "cpu/between.h"
#include "cpu/cholesky.h"
#include "cpu/gram.h"
#include "cpu/moments.h"
#include "cpu/nm.h"
#include "cpu/peak.h"
#include "cpu/product.h"
#include "cpu/select.h"
#include "cpu/sparse24.h"
#include "cpu/sparse_linear.h"
#include "cpu/sweep.h"

#define PYPRUNE_JOIN_(a, b) a##b
#define PYPRUNE_JOIN(a, b) PYPRUNE_JOIN_(a, b)
#define PYPRUNE_STRING_(a) #a
#define PYPRUNE_STRING(a) PYPRUNE_STRING_(a)

namespace pyprune {
extern const Kernels PYPRUNE_JOIN(kernels_, PYPRUNE_ISA);
const Kernels PYPRUNE_JOIN(kernels_, PYPRUNE_ISA) = {
    PYPRUNE_STRING(PYPRUNE_ISA), &gram, &cross_gram, &linear, &trailing_update, &column_moments, &select_mask,
    &nm_mask, &obs_sweep, &cholesky, &compress_24, &expand_24, &sparse_linear,
    &expand_bitmask, &attention, &rms_norm, &swiglu, &rotary, &tile_flops,
};
}  // namespace pyprune
