#include "cuda/nm_mask.cu"

#include "case.h"

void run(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"];
    void* w = c.input<char>("w");
    pyprune::cuda::nm_mask(w, int(c["dtype"]), rows, columns, c["w_stride"], c.input<float>("scale"), c["n"], c["m"],
                           c["apply"], c.output<uint8_t>("keep", rows * columns), c.input<int>("fault"), nullptr);
}
