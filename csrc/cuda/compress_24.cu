// 2:4 compression to values and metadata in torch.sparse's CUTLASS-reordered layout, and its inverse.
//
// A thread owns one 16-bit metadata word: 16 dense columns (32 bytes), 8 values (16 bytes). Bytes a weight: 2 + 1 +
// 1/8; the bound is DRAM. Values are moved, never computed with, so bfloat16 and float16 are the same kernel.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace pyprune::cuda {

constexpr int THREADS = 256, DENSE = 16, HALF = DENSE / 2;

__global__ void __launch_bounds__(THREADS) compress_24_kernel(const uint16_t* w, int64_t stride, int64_t rows,
                                                              int64_t words, uint16_t* values, uint16_t* meta,
                                                              int* fault, bool whole) {
    const int64_t id = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (id >= rows * words) return;
    const int64_t row = id / words, word = id % words;
    const uint16_t* from = w + row * stride + word * DENSE;
    uint16_t kept[HALF];
    uint32_t codes = 0;
    bool dense_group = false;
    PYPRUNE_UNROLL
    for (int h = 0; h < 2; ++h) {
        uint16_t dense[HALF];
        load(dense, from + h * HALF, HALF, whole);
        PYPRUNE_UNROLL
        for (int q = 0; q < 2; ++q) {
            const uint16_t* x = dense + q * 4;
            uint32_t nonzero = 0;
            PYPRUNE_UNROLL
            for (int i = 0; i < 4; ++i) nonzero |= uint32_t((x[i] & 0x7fff) != 0) << i;  // −0.0 is a zero
            dense_group |= __popc(nonzero) > 2;
            const uint32_t code = quadruple_code(nonzero), first = code & 3, second = code >> 2;
            const int at = h * 4 + q * 2;
            // Selections instead of x[first]: an index known only at run time would put x in local memory.
            kept[at] = first == 0 ? x[0] : first == 1 ? x[1] : x[2];
            kept[at + 1] = second == 1 ? x[1] : second == 2 ? x[2] : x[3];
            codes |= code << (h * 8 + q * 4);
        }
    }
    store(values + id * HALF, kept, HALF, whole);
    meta[metadata_offset(row, word, rows)] = uint16_t(codes);
    if (dense_group) *fault = 1;
}

__global__ void __launch_bounds__(THREADS) expand_24_kernel(const uint16_t* values, const uint16_t* meta, int64_t rows,
                                                            int64_t words, uint16_t* w, int* fault, bool whole) {
    const int64_t id = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (id >= rows * words) return;
    const uint32_t codes = meta[metadata_offset(id / words, id % words, rows)];
    uint16_t kept[HALF];
    load(kept, values + id * HALF, HALF, whole);
    bool twice = false;
    PYPRUNE_UNROLL
    for (int h = 0; h < 2; ++h) {
        uint16_t dense[HALF];
        PYPRUNE_UNROLL
        for (int i = 0; i < HALF; ++i) {
            const int at = h * 4 + i / 4 * 2;
            const uint32_t code = codes >> (at * 2), place = i % 4;
            twice |= (code >> 2 & 3) == (code & 3);
            dense[i] = place == (code >> 2 & 3) ? kept[at + 1] : place == (code & 3) ? kept[at] : 0;
        }
        store(w + id * DENSE + h * HALF, dense, HALF, whole);
    }
    if (twice) *fault = 1;
}

// The reordered layout pairs metadata columns, so 32 dense columns are its unit.
static Launcher launcher(const char* op, int64_t rows, int64_t columns, void* stream) {
    const Launcher launch{op, {{"rows", rows}, {"columns", columns}}, static_cast<cudaStream_t>(stream)};
    if (rows % 32 != 0 || columns % 32 != 0) launch.refuse("rows and columns must be multiples of 32");
    return launch;
}

void compress_24(const void* w, int64_t rows, int64_t columns, int64_t w_stride, void* values, void* meta,
                 int* fault, void* stream) {
    const Launcher launch = launcher("compress_24", rows, columns, stream);
    const bool whole = aligned(w, w_stride * int64_t(sizeof(uint16_t)), 16) && aligned(values, 0, 16);
    launch(compress_24_kernel, (rows * (columns / DENSE) + THREADS - 1) / THREADS, THREADS, 0,
           static_cast<const uint16_t*>(w), w_stride, rows, columns / DENSE, static_cast<uint16_t*>(values),
           static_cast<uint16_t*>(meta), fault, whole);
}

void expand_24(const void* values, const void* meta, int64_t rows, int64_t columns, void* w, int* fault,
               void* stream) {
    const Launcher launch = launcher("expand_24", rows, columns, stream);
    const bool whole = aligned(values, 0, 16) && aligned(w, 0, 16);
    launch(expand_24_kernel, (rows * (columns / DENSE) + THREADS - 1) / THREADS, THREADS, 0,
           static_cast<const uint16_t*>(values), static_cast<const uint16_t*>(meta), rows, columns / DENSE,
           static_cast<uint16_t*>(w), fault, whole);
}

}  // namespace pyprune::cuda
