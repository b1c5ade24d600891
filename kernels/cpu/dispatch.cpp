// Chooses among the instruction sets that this library holds and the CPU has; and the counters that all of them share.

#include <cstring>

// Made by CMake: FASTVAE_VERSION, FASTVAE_FOR_EACH_FILE(X), and FASTVAE_FOR_EACH_ISA(X), best first
#include "compiled.h"
#include "fastvae.h"
#include "worker.h"

namespace fastvae {

struct Tables {
    fastvae_kernels f32, f64;
};

// Each file of kernels adds its own to the tables of an instruction set, when they are first asked for: add_* is
// compiled for that set, so that no other CPU may run it.
#define DECLARE_FILE(file) void add_##file(fastvae_kernels &f32, fastvae_kernels &f64);
#define ADD_FILE(file) add_##file(tables.f32, tables.f64);
#define DEFINE(isa, needs) \
    namespace isa { \
    FASTVAE_FOR_EACH_FILE(DECLARE_FILE) \
    static Tables filled() { \
        Tables tables = {}; \
        FASTVAE_FOR_EACH_FILE(ADD_FILE) \
        return tables; \
    } \
    static const Tables &tables() { \
        static const Tables all = filled(); \
        return all; \
    } \
    static bool cpu_has() { return needs; } \
    }
FASTVAE_FOR_EACH_ISA(DEFINE)

struct InstructionSet {
    const char *name;
    bool (*cpu_has)();
    const Tables &(*tables)();
};
#define ENTRY(isa, needs) {#isa, isa::cpu_has, isa::tables},
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

EXPORT void fastvae_poll(int (*interrupted)(void), uint64_t thread) { fastvae::set_poll(interrupted, thread); }

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
        if (!std::strcmp(set.name, instruction_set) && set.cpu_has())
            return dtype == FASTVAE_F64 ? &set.tables().f64 : &set.tables().f32;
    return nullptr;
}

}  // extern "C"
