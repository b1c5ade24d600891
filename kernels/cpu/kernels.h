// The kernels of pairs that others are made of, each defined in the file of its name.
#pragma once

#include "fastvae.h"

namespace fastvae::FASTVAE_ISA {

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                 void *joint, int exact_skip, int threads);
template <class T>
int agg_log_prob_backward(const void *d_joint, const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                          int64_t S, int64_t N, int64_t D, void *joint, void *d_z, void *d_mu, void *d_logvar,
                          void *d_log_w, int exact_skip, int threads);
template <class T>
int agg_log_prob_marginals(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                           int64_t D, void *joint, void *marginals, int threads);
template <class T>
int agg_log_prob_marginals_backward(const void *d_joint, const void *d_marginals, const void *joint,
                                    const void *marginals, const void *z, const void *mu, const void *logvar,
                                    FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu,
                                    void *d_logvar, void *d_log_w, int threads);

}  // namespace fastvae::FASTVAE_ISA
