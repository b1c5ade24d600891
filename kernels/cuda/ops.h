// What interface.cu needs of each op's file.
#pragma once

#include "launch.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

int64_t kl_gauss_workspace(int dtype, int64_t B, bool sums_columns, int64_t D, bool backward);
int64_t cross_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, bool backward);
int64_t agg_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, bool backward);
int64_t agg_log_prob_marginals_workspace(int dtype, int64_t S, int64_t N, int64_t D, bool backward);

template <class T> Weights<T> unweighted(int64_t N) { return {nullptr, 0.0, nullptr, 0.0, 0.0, N}; }

// The bytes that Buffers<In> takes from an arena for a problem.
template <template <class> class Buffers> int64_t workspace_of(int dtype, int64_t S, int64_t N, int64_t D) {
    int64_t size = 0;
    with_dtype(dtype, [&](auto in) {
        using In = decltype(in);
        Arena counting(nullptr);
        const Buffers<In> buffers(counting, S, N, D, unweighted<Accumulator<In>>(N));
        size = counting.used();
        return 0;
    });
    return size;
}

}  // namespace fastvae::FASTVAE_ISA
