// Work on several threads, in units whose number depends on the problem alone, so that results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastvae {

// Calls body(context, unit, worker) for every unit in [0, units) on at most `threads` threads; workers are
// numbered from 0. Units begin in order. Runs on one thread while another one is here (parallel.cpp).
void run_units(int64_t units, int threads, void (*body)(void *context, int64_t unit, int worker), void *context);

}  // namespace fastvae

namespace fastvae::FASTVAE_ISA {

template <class F> void parallel_for(int64_t units, int threads, const F &f) {
    run_units(
        units, threads,
        [](void *context, int64_t unit, int worker) { (*static_cast<const F *>(context))(unit, worker); },
        const_cast<F *>(&f));
}

}  // namespace fastvae::FASTVAE_ISA
