// entropy = -1/S sum_i joint_i, and its gradients: those of the joint, all samples' upstream gradients being one number.

#include "sums.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// d_joint [S]
template <class T> __global__ void spread_entropy(const T *d_entropy, int64_t S, T *d_joint) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < S) d_joint[i] = T(-double(*d_entropy) / double(S));
}

// The joint [S], or its upstream gradients, and what agg_log_prob needs.
template <class T> struct EntropyMemory {
    T *of_rows;
    Sum sum;
    int64_t rest_size;
    char *rest;
    EntropyMemory(Arena &arena, int dtype, int64_t S, int64_t N, int64_t D, bool backward)
        : of_rows(arena.take<T>(S)), sum(arena, backward ? 0 : S),
          rest_size(fastvae_cuda_agg_log_prob_workspace(dtype, S, N, D, backward)), rest(arena.take<char>(rest_size)) {}
};

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_agg_entropy_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward) {
    return bytes_taken(dtype, [&](Arena &arena, auto in) {
        EntropyMemory<Accumulator<decltype(in)>>(arena, dtype, S, N, D, backward);
    });
}

int fastvae_cuda_agg_entropy(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                             void *entropy, int exact_skip, void *workspace, int64_t workspace_size, void *stream) {
    return with_dtype(dtype, [&](auto in) -> int {
        using T = Accumulator<decltype(in)>;
        Arena arena(workspace);
        const EntropyMemory<T> memory(arena, dtype, S, N, D, false);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        FASTVAE_TRY(fastvae_cuda_agg_log_prob(dtype, z, z_stride, mu, mu_stride, logvar, logvar_stride, log_w, log_w_all,
                                              own, log_w_own, log_w_next, S, N, D, memory.of_rows, exact_skip,
                                              memory.rest, memory.rest_size, stream));
        return memory.sum.run(memory.of_rows, -1 / double(S), static_cast<T *>(entropy), static_cast<Stream>(stream));
    });
}

int fastvae_cuda_agg_entropy_backward(int dtype, const void *d_entropy, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S,
                                      int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar, void *d_log_w,
                                      int exact_skip, void *workspace, int64_t workspace_size, void *stream) {
    return with_dtype(dtype, [&](auto in) -> int {
        using T = Accumulator<decltype(in)>;
        Arena arena(workspace);
        const EntropyMemory<T> memory(arena, dtype, S, N, D, true);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        FASTVAE_TRY(launch(spread_entropy<T>, ceil_div(S, kThreads), 1, kThreads, static_cast<Stream>(stream),
                           static_cast<const T *>(d_entropy), S, memory.of_rows));
        return fastvae_cuda_agg_log_prob_backward(dtype, memory.of_rows, z, z_stride, mu, mu_stride, logvar,
                                                  logvar_stride, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D,
                                                  nullptr, d_z, d_mu, d_logvar, d_log_w, exact_skip, memory.rest,
                                                  memory.rest_size, stream);
    });
}
