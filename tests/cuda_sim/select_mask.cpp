#include "cuda/select_mask.cu"

#include "case.h"

void run(Case& c) {
    using namespace pyprune::cuda;
    const int64_t rows = c["rows"], columns = c["columns"];
    void* w = c.input<char>("w");
    const float* scale = c.input<float>("scale");
    uint8_t* keep = c.output<uint8_t>("keep", rows * columns);
    int* fault = c.input<int>("fault");
    if (c["matrix"])
        select_matrix(w, int(c["dtype"]), rows, columns, c["w_stride"], scale, c["k"], c["apply"], keep, fault,
                      c.output<uint32_t>("workspace", SELECT_WORKSPACE), nullptr);
    else
        select_rows(w, int(c["dtype"]), rows, columns, c["w_stride"], scale, c["k"], c["apply"], keep, fault, nullptr);
}
