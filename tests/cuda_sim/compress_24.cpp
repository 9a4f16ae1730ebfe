#include "cuda/compress_24.cu"

#include "case.h"

void run(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"];
    auto* values = c.output<uint16_t>("values", rows * columns / 2);
    auto* meta = c.output<uint16_t>("meta", rows * columns / 16);
    int* fault = c.input<int>("fault");
    pyprune::cuda::compress_24(c.input<uint16_t>("w"), rows, columns, c["w_stride"], values, meta, fault,
                               nullptr);
    pyprune::cuda::expand_24(values, meta, rows, columns, c.output<uint16_t>("dense", rows * columns), fault + 1, nullptr);
}
