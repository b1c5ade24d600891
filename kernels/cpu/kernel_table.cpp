// The functions of this instruction set, for float and for double.

#include "kernels.h"

namespace fastvae::FASTVAE_ISA {

template <class T> constexpr fastvae_kernels kernel_table() {
    return {
        .kl_gauss = kl_gauss<T>,
        .kl_gauss_backward = kl_gauss_backward<T>,
        .sample_gauss = sample_gauss<T>,
        .sample_gauss_backward = sample_gauss_backward<T>,
        .cross_log_prob = cross_log_prob<T>,
        .cross_log_prob_backward = cross_log_prob_backward<T>,
        .agg_log_prob = agg_log_prob<T>,
        .agg_log_prob_backward = agg_log_prob_backward<T>,
        .agg_log_prob_marginals = agg_log_prob_marginals<T>,
        .agg_log_prob_marginals_backward = agg_log_prob_marginals_backward<T>,
    };
}

extern const fastvae_kernels kernels_f32, kernels_f64;
const fastvae_kernels kernels_f32 = kernel_table<float>();
const fastvae_kernels kernels_f64 = kernel_table<double>();

}  // namespace fastvae::FASTVAE_ISA
