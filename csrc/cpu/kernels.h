// The table of CPU kernels: one instance per instruction set, chosen once by dispatch.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pyprune {

struct Kernels {
    const char* name;
};

const Kernels& kernels();                  // the table in use
std::vector<std::string> usable_levels();  // instruction sets this processor can run, best first
void use_level(const std::string& level);  // "" for the best; throws std::invalid_argument

}  // namespace pyprune
