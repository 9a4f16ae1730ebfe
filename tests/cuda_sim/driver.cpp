// Runs an op on case folders: driver OP FOLDER…  The kernels are linked in, compiled for the simulation.
#include "case.h"
#include "cuda/ops.h"

using namespace pyprune::cuda;

static void run_obs_sweep(Case& c) {
    const int64_t rows = c["rows"], stride = c["out_stride"], out = rows * stride;
    obs_sweep(c.input<float>("w"), rows, c["columns"], c["w_stride"], c.input<float>("r"), c["r_stride"],
              c.input<uint8_t>("mask"), c["n"], c["m"], c.output<uint8_t>("keep", out), c.output<float>("error", out),
              stride, c.output<float>("loss", rows), c.input<int>("fault"), nullptr);
}

static void run_select_mask(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"], stride = c["w_stride"], k = c["k"];
    const int dtype = int(c["dtype"]);
    void* w = c.input<char>("w");
    const float* scale = c.input<float>("scale");
    uint8_t* keep = c.output<uint8_t>("keep", rows * columns);
    int* fault = c.input<int>("fault");
    if (c["matrix"])
        select_matrix(w, dtype, rows, columns, stride, scale, k, c["apply"], keep, fault,
                      c.output<uint32_t>("workspace", SELECT_WORKSPACE), nullptr);
    else
        select_rows(w, dtype, rows, columns, stride, scale, k, c["apply"], keep, fault, nullptr);
}

static void run_nm_mask(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"];
    void* w = c.input<char>("w");
    nm_mask(w, int(c["dtype"]), rows, columns, c["w_stride"], c.input<float>("scale"), c["n"], c["m"], c["apply"],
            c.output<uint8_t>("keep", rows * columns), c.input<int>("fault"), nullptr);
}

static void run_compress_24(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"];
    auto* values = c.output<uint16_t>("values", rows * columns / 2);
    auto* meta = c.output<uint16_t>("meta", rows * columns / 16);
    int* fault = c.input<int>("fault");
    compress_24(c.input<uint16_t>("w"), rows, columns, c["w_stride"], values, meta, fault, nullptr);
    expand_24(values, meta, rows, columns, c.output<uint16_t>("dense", rows * columns), fault + 1, nullptr);
}

static void run_cholesky(Case& c) {
    const int64_t batch = c["batch"], n = c["n"], k = c["k"];
    float* factor = c.output<float>("factor", batch * n * n);
    int* info = c.output<int>("info", batch);
    cholesky(c.input<float>("a"), c.input<float>("damping"), batch, n, factor, info, nullptr);
    if (k == 0) return;
    float* x = c.output<float>("x", batch * n * k);
    cholesky_solve(factor, info, c.input<float>("b"), batch, n, k, x, nullptr);
}

static void run_sparse_linear(Case& c) {
    const int64_t rows = c["rows"], columns = c["columns"], tokens = c["tokens"];
    const int dtype = int(c["dtype"]), size = dtype == 0 ? 4 : 2;
    const Packed w{c.input<uint8_t>("mask"), (columns + 7) / 8, c.input<char>("values"), c.input<int64_t>("offsets"),
                   rows, columns};
    sparse_linear(w, dtype, c.input<char>("x"), c["x_stride"], tokens, c.input<char>("bias"),
                  c.output<char>("out", tokens * rows * size), nullptr);
    expand_bitmask(w, dtype, c.output<char>("dense", rows * columns * size), nullptr);
}

int main(int count, char** arguments) {
    const std::map<std::string, void (*)(Case&)> ops{{"obs_sweep", run_obs_sweep},
                                                     {"select_mask", run_select_mask},
                                                     {"nm_mask", run_nm_mask},
                                                     {"compress_24", run_compress_24},
                                                     {"sparse_linear", run_sparse_linear},
                                                     {"cholesky", run_cholesky}};
    try {
        for (int i = 2; i < count; ++i) {
            Case c(arguments[i]);
            ops.at(arguments[1])(c);
            c.save();
        }
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
