// 2:4 compression to values and CUTLASS-ordered metadata, and back (the layout of torch's semi-structured tensors).
// Bytes: w once, values and metadata once. One metadata word of 16 bits describes 16 columns.
#pragma once

#include "cpu/simd.h"

namespace pyprune {
namespace {

bool compress_24(const uint16_t* w, int64_t stride, int64_t rows, int64_t columns, uint16_t* values,
                 int16_t* metadata, int threads) {
    threads = worth(threads, 4.0 * double(rows * columns));
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t word = 0; word < columns / 16; ++word) {
            const uint16_t* source = w + i * stride + word * 16;
            uint16_t* out = values + i * (columns / 2) + word * 8;
            uint32_t bits = 0;
            for (int q = 0; q < 4; ++q, source += 4, out += 2) {
                uint32_t nonzero = 0;
                for (int c = 0; c < 4; ++c) nonzero |= uint32_t((source[c] & 0x7fff) != 0) << c;
                bad |= __builtin_popcount(nonzero) > 2;
                const uint32_t code = quadruple_code(nonzero);
                out[0] = source[code & 3];
                out[1] = source[code >> 2];
                bits |= code << (4 * q);
            }
            metadata[metadata_offset(i, word, rows)] = int16_t(bits);
        }
    return !bad;
}

bool expand_24(const uint16_t* values, const int16_t* metadata, int64_t rows, int64_t columns, uint16_t* w,
               int threads) {
    threads = worth(threads, 4.0 * double(rows * columns));
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t word = 0; word < columns / 16; ++word) {
            const uint16_t* source = values + i * (columns / 2) + word * 8;
            uint16_t* out = w + i * columns + word * 16;
            const uint32_t bits = uint16_t(metadata[metadata_offset(i, word, rows)]);
            for (int q = 0; q < 4; ++q, source += 2, out += 4) {
                const uint32_t code = bits >> (4 * q) & 15;
                bad |= (code & 3) == code >> 2;
                std::memset(out, 0, 8);
                out[code & 3] = source[0];
                out[code >> 2] = source[1];
            }
        }
    return !bad;
}

}  // namespace
}  // namespace pyprune
