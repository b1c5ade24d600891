// Chooses among the instruction sets that this library holds and the CPU has; and the counters that all of them share.

#include <cstring>

#include "fastvae.h"
#include "instruction_sets.h"  // made by CMake: FASTVAE_VERSION, and FASTVAE_FOR_EACH_ISA(X), best first

namespace fastvae {

#define DECLARE(isa, needs) \
    namespace isa { \
    extern const fastvae_kernels kernels_f32, kernels_f64; \
    } \
    static bool cpu_has_##isa() { return needs; }
FASTVAE_FOR_EACH_ISA(DECLARE)

struct InstructionSet {
    const char *name;
    const fastvae_kernels *kernels[2];  // by fastvae_dtype
    bool (*cpu_has)();
};
#define ENTRY(isa, needs) {#isa, {&isa::kernels_f32, &isa::kernels_f64}, cpu_has_##isa},
static const InstructionSet compiled[] = {FASTVAE_FOR_EACH_ISA(ENTRY)};

static int64_t visited_dimensions, all_dimensions;

void count_visits(int64_t visited, int64_t all) {
    __atomic_fetch_add(&visited_dimensions, visited, __ATOMIC_RELAXED);
    __atomic_fetch_add(&all_dimensions, all, __ATOMIC_RELAXED);
}

}  // namespace fastvae

extern "C" {

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int fastvae_interface(void) { return FASTVAE_INTERFACE; }

EXPORT const char *fastvae_version(void) { return FASTVAE_VERSION; }

EXPORT void fastvae_take_visits(int64_t *visited, int64_t *all) {
    *visited = __atomic_exchange_n(&fastvae::visited_dimensions, 0, __ATOMIC_RELAXED);
    *all = __atomic_exchange_n(&fastvae::all_dimensions, 0, __ATOMIC_RELAXED);
}

EXPORT const char *fastvae_instruction_sets(void) {
    static char names[64];
    if (!names[0])
        for (const auto &set : fastvae::compiled)
            if (set.cpu_has()) {
                if (names[0]) std::strcat(names, " ");
                std::strcat(names, set.name);
            }
    return names;
}

EXPORT const fastvae_kernels *fastvae_kernels_for(const char *instruction_set, enum fastvae_dtype dtype) {
    for (const auto &set : fastvae::compiled)
        if (!std::strcmp(set.name, instruction_set) && set.cpu_has()) return set.kernels[dtype];
    return nullptr;
}

}  // extern "C"
