#include "cuda/obs_sweep.cu"

#include "case.h"

void run(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"];
    pyprune::cuda::obs_sweep(c.input<float>("w"), rows, columns, c["w_stride"], c.input<float>("r"), c["r_stride"],
                             c.input<uint8_t>("mask"), c["n"], c["m"], c.output<uint8_t>("keep", rows * columns),
                             c.output<float>("error", rows * columns), c.output<float>("loss", rows),
                             c.input<int>("fault"), nullptr);
}
