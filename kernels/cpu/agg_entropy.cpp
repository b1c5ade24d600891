// entropy = -1/S sum_i joint_i, and its gradients: those of the joint, all samples' upstream gradients being one number.

#include "buffer.h"
#include "kernels.h"

namespace fastvae::FASTVAE_ISA {

template <class T>
int agg_entropy(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                void *entropy, int exact_skip, int threads) {
    Buffer<T> joint(S);
    if (!joint) return FASTVAE_OUT_OF_MEMORY;
    const int status = agg_log_prob<T>(z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D, joint,
                                       exact_skip, threads);
    double sum = 0;
    for (int64_t i = 0; i < S && status == FASTVAE_OK; ++i) sum += double(joint[i]);
    *static_cast<T *>(entropy) = T(-sum / double(S));
    return status;
}

template <class T>
int agg_entropy_backward(const void *d_entropy, const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                         int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar, void *d_log_w,
                         int exact_skip, int threads) {
    Buffer<T> d_joint(S);
    if (!d_joint) return FASTVAE_OUT_OF_MEMORY;
    const T each = T(-double(*static_cast<const T *>(d_entropy)) / double(S));
    for (int64_t i = 0; i < S; ++i) d_joint[i] = each;
    return agg_log_prob_backward<T>(d_joint, z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D,
                                    nullptr, d_z, d_mu, d_logvar, d_log_w, exact_skip, threads);
}

void add_agg_entropy(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.agg_entropy = agg_entropy<float>, f64.agg_entropy = agg_entropy<double>;
    f32.agg_entropy_backward = agg_entropy_backward<float>, f64.agg_entropy_backward = agg_entropy_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
