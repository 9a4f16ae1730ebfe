#include "case.h"
#include "cuda/ops.h"

void run(Case& c) {
    const int64_t batch = c["batch"], n = c["n"], k = c["k"];
    float* factor = c.output<float>("factor", batch * n * n);
    int* info = c.output<int>("info", batch);
    pyprune::cuda::cholesky(c.input<float>("a"), c.input<float>("damping"), batch, n, factor, info, nullptr);
    if (k > 0)
        pyprune::cuda::cholesky_solve(factor, info, c.input<float>("b"), batch, n, k, c.output<float>("x", batch * n * k),
                                      nullptr);
}
