// Work on several threads, in units whose number depends on the problem alone, so that results do not
// depend on the number of threads.
#pragma once

#include "simd.h"
#include "worker.h"

namespace fastvae::FASTVAE_ISA {

// f(unit, worker); see run_units
template <class F> [[nodiscard]] int parallel_for(int64_t units, int threads, const F &f) {
    return run_units(
        units, threads,
        [](void *context, int64_t unit, const Worker &worker) { (*static_cast<const F *>(context))(unit, worker); },
        const_cast<F *>(&f));
}

// The threads for samples against posteriors: one where all pairs take less time than another takes to wake, which is
// milliseconds on a busy machine (README.md).
inline int threads_for_pairs(int64_t S, int64_t N, int64_t D, int threads) {
    constexpr double kFewest = 160000;
    return double(S) * double(N) * double(D) < kFewest ? 1 : threads;
}

}  // namespace fastvae::FASTVAE_ISA
