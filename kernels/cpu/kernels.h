// Every kernel of this instruction set, by the names and parameters of fastvae.h, for T float or double.
#pragma once

#include "fastvae.h"
#include "simd.h"

namespace fastvae::FASTVAE_ISA {

template <class T>
int kl_gauss(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
             const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
             int64_t prior_logvar_stride, int64_t B, int64_t D, int reduction, double scale, void *out,
             int threads);

template <class T>
int kl_gauss_backward(const void *grad, int64_t grad_row, int64_t grad_col, double scale, const void *mu,
                      int64_t mu_stride, const void *logvar, int64_t logvar_stride, const void *prior_mu,
                      int64_t prior_mu_stride, const void *prior_logvar, int64_t prior_logvar_stride,
                      int64_t B, int64_t D, void *d_mu, void *d_logvar, void *d_prior_mu,
                      void *d_prior_logvar, int threads);

template <class T>
int sample_gauss(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                 const uint64_t *seed, int64_t L, int64_t B, int64_t D, void *z, void *log_q, void *log_p,
                 void *kl, int threads);

template <class T>
int sample_gauss_backward(const void *d_z, const void *d_log_q, const void *d_log_p, const void *d_kl,
                          const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                          const uint64_t *seed, int64_t L, int64_t B, int64_t D, void *d_mu, void *d_logvar,
                          int threads);

template <class T>
int cross_log_prob(const void *z, const void *mu, const void *logvar, int64_t S, int64_t N, int64_t D,
                   void *out, int threads);

template <class T>
int cross_log_prob_backward(const void *grad, const void *z, const void *mu, const void *logvar, int64_t S,
                            int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar, int threads);

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                 int64_t D, void *joint, int exact_skip, int threads);

template <class T>
int agg_log_prob_backward(const void *d_joint, const void *z, const void *mu, const void *logvar,
                          FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *joint, void *d_z, void *d_mu,
                          void *d_logvar, void *d_log_w, int exact_skip, int threads);

template <class T>
int agg_log_prob_marginals(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S,
                           int64_t N, int64_t D, void *joint, void *marginals, int threads);

template <class T>
int agg_log_prob_marginals_backward(const void *d_joint, const void *d_marginals, const void *joint,
                                    const void *marginals, const void *z, const void *mu,
                                    const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                    void *d_z, void *d_mu, void *d_logvar, void *d_log_w, int threads);

}  // namespace fastvae::FASTVAE_ISA
