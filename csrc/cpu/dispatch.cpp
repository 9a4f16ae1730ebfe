// Picks the instruction set at run time. Compiled for the baseline processor.
#include "cpu/kernels.h"

#include <atomic>
#include <stdexcept>

namespace pyprune {

extern const Kernels kernels_portable;
#ifdef PYPRUNE_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

static std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#ifdef PYPRUNE_X86
    __builtin_cpu_init();  // also checks that the system saves the wide registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    // VBMI2, which expands 16-bit values, came before bfloat16 products everywhere but on Cooper Lake.
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2")) found.push_back(&kernels_avx512_bf16);
    if (avx512) found.push_back(&kernels_avx512);
    if (avx2) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

static std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_relaxed);
    if (table == nullptr) chosen.store(table = usable().front());
    return *table;
}

std::vector<std::string> usable_levels() {
    std::vector<std::string> names;
    for (const Kernels* table : usable()) names.push_back(table->name);
    return names;
}

void use_level(const std::string& level) {
    std::string have;
    for (const Kernels* table : usable()) {
        if (level.empty() || level == table->name) {
            chosen.store(table);
            return;
        }
        have += (have.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("instruction set " + level + " is not one of this processor's: " + have);
}

}  // namespace pyprune
