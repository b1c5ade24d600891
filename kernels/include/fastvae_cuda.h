/* fastvae: the plain C interface of the CUDA library.
 *
 * What fastvae.h says of shapes, strides, NULL, weights and reductions holds here too. All pointers are to memory that
 * the device can read, `stream` is a cudaStream_t of the current device, and a call returns once its kernels are in the
 * stream. Nothing is allocated: `workspace` has as many bytes as fastvae_cuda_<op>_workspace says, for the op or for its
 * backward, aligned to 256, and is free again when the stream has come so far.
 *
 * `dtype` is that of mu and logvar, and of z and of all gradients but d_log_w. Everything else, eps too, has the dtype that sums
 * are taken in: float64 for float64, else float32. Rows may be strided where a stride is asked for, and are contiguous.
 */
#ifndef FASTVAE_CUDA_H
#define FASTVAE_CUDA_H

#include <stdint.h>

#include "fastvae.h"

#ifdef __cplusplus
extern "C" {
#endif

enum fastvae_cuda_dtype { FASTVAE_CUDA_F32 = 0, FASTVAE_CUDA_F64 = 1, FASTVAE_CUDA_BF16 = 2, FASTVAE_CUDA_F16 = 3 };

/* A kernel's status: one of these, or FASTVAE_CUDA_ERROR + a cudaError_t. */
enum fastvae_cuda_status {
    FASTVAE_CUDA_OK = 0,
    FASTVAE_CUDA_BAD_DTYPE = 1,
    FASTVAE_CUDA_WORKSPACE_TOO_SMALL = 2,
    FASTVAE_CUDA_ERROR = 1000
};

#define FASTVAE_EXPORT __attribute__((visibility("default")))

/* FASTVAE_INTERFACE of the headers that the library was built with: to be asked for before anything else. */
FASTVAE_EXPORT int fastvae_cuda_interface(void);

/* What a status means. */
FASTVAE_EXPORT const char *fastvae_cuda_status_string(int status);

FASTVAE_EXPORT const char *fastvae_cuda_version(void);

/* Whether kernels run on the host, one thread at a time: a build for tests. */
FASTVAE_EXPORT int fastvae_cuda_simulated(void);

/* The backward's is the same for all reductions. */
FASTVAE_EXPORT int64_t fastvae_cuda_kl_gauss_workspace(int dtype, int64_t B, int64_t D, int reduction, int backward);
FASTVAE_EXPORT int fastvae_cuda_kl_gauss(int dtype, const void *mu, int64_t mu_stride, const void *logvar,
                                         int64_t logvar_stride, const void *prior_mu, int64_t prior_mu_stride,
                                         const void *prior_logvar, int64_t prior_logvar_stride, int64_t B, int64_t D,
                                         int reduction, double scale, void *out, void *workspace,
                                         int64_t workspace_size, void *stream);
FASTVAE_EXPORT int fastvae_cuda_kl_gauss_backward(int dtype, const void *grad, int64_t grad_row, int64_t grad_col,
                                                  double scale, const void *mu, int64_t mu_stride, const void *logvar,
                                                  int64_t logvar_stride, const void *prior_mu, int64_t prior_mu_stride,
                                                  const void *prior_logvar, int64_t prior_logvar_stride, int64_t B,
                                                  int64_t D, void *d_mu, void *d_logvar, void *d_prior_mu,
                                                  void *d_prior_logvar, void *workspace, int64_t workspace_size,
                                                  void *stream);

/* The KL of reduction FASTVAE_SUM needs a workspace, nothing else. */
FASTVAE_EXPORT int64_t fastvae_cuda_sample_gauss_workspace(int dtype, int64_t B, int reduction, int backward);
FASTVAE_EXPORT int fastvae_cuda_sample_gauss(int dtype, const void *mu, int64_t mu_stride, const void *logvar,
                                             int64_t logvar_stride, const uint64_t *seed, int64_t L, int64_t B,
                                             int64_t D, int reduction, double kl_scale, void *z, void *log_q,
                                             void *log_p, void *kl, void *eps, void *workspace,
                                             int64_t workspace_size, void *stream);
FASTVAE_EXPORT int fastvae_cuda_sample_gauss_backward(int dtype, const void *d_z, const void *d_log_q,
                                                      const void *d_log_p, const void *d_kl, int64_t kl_row,
                                                      double kl_scale, const void *mu, int64_t mu_stride,
                                                      const void *logvar, int64_t logvar_stride,
                                                      const uint64_t *seed, const void *eps, int64_t L, int64_t B,
                                                      int64_t D, void *d_mu, void *d_logvar, void *workspace,
                                                      int64_t workspace_size, void *stream);

/* z [S, D], mu and logvar [N, D], each with a row stride. */
#define FASTVAE_CUDA_PAIRS                                                                                       \
    const void *z, int64_t z_stride, const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride

FASTVAE_EXPORT int64_t fastvae_cuda_cross_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward);
FASTVAE_EXPORT int fastvae_cuda_cross_log_prob(int dtype, FASTVAE_CUDA_PAIRS, int64_t S, int64_t N, int64_t D,
                                               void *out, void *workspace, int64_t workspace_size, void *stream);
FASTVAE_EXPORT int fastvae_cuda_cross_log_prob_backward(int dtype, const void *grad, FASTVAE_CUDA_PAIRS, int64_t S,
                                                        int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar,
                                                        void *workspace, int64_t workspace_size, void *stream);

FASTVAE_EXPORT int64_t fastvae_cuda_agg_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward);
FASTVAE_EXPORT int fastvae_cuda_agg_log_prob(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                                             int64_t D, void *joint, int exact_skip, void *workspace,
                                             int64_t workspace_size, void *stream);
/* The joint, which it computes again, is an output like the gradients. */
FASTVAE_EXPORT int fastvae_cuda_agg_log_prob_backward(int dtype, const void *d_joint, FASTVAE_CUDA_PAIRS,
                                                      FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *joint,
                                                      void *d_z, void *d_mu, void *d_logvar, void *d_log_w,
                                                      int exact_skip, void *workspace, int64_t workspace_size,
                                                      void *stream);

FASTVAE_EXPORT int64_t fastvae_cuda_agg_log_prob_marginals_workspace(int dtype, int64_t S, int64_t N, int64_t D,
                                                                     int backward);
FASTVAE_EXPORT int fastvae_cuda_agg_log_prob_marginals(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S,
                                                       int64_t N, int64_t D, void *joint, void *marginals,
                                                       void *workspace, int64_t workspace_size, void *stream);
/* Either upstream gradient may be NULL (zero). */
FASTVAE_EXPORT int fastvae_cuda_agg_log_prob_marginals_backward(int dtype, const void *d_joint,
                                                                const void *d_marginals, FASTVAE_CUDA_PAIRS,
                                                                FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                                                void *d_z, void *d_mu, void *d_logvar, void *d_log_w,
                                                                void *workspace, int64_t workspace_size,
                                                                void *stream);

FASTVAE_EXPORT int64_t fastvae_cuda_agg_entropy_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward);
FASTVAE_EXPORT int fastvae_cuda_agg_entropy(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                                            int64_t D, void *entropy, int exact_skip, void *workspace,
                                            int64_t workspace_size, void *stream);
FASTVAE_EXPORT int fastvae_cuda_agg_entropy_backward(int dtype, const void *d_entropy, FASTVAE_CUDA_PAIRS,
                                                     FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z,
                                                     void *d_mu, void *d_logvar, void *d_log_w, int exact_skip,
                                                     void *workspace, int64_t workspace_size, void *stream);

FASTVAE_EXPORT int64_t fastvae_cuda_kl_decomposition_workspace(int dtype, int64_t S, int64_t N, int64_t D,
                                                               int backward);
FASTVAE_EXPORT int fastvae_cuda_kl_decomposition(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                                                 int64_t D, void *mi, void *agg_kl, void *tc, void *dim_kl, void *kl,
                                                 void *entropy, void *saturation, void *joint, void *marginals,
                                                 void *workspace, int64_t workspace_size, void *stream);
/* Any of the six upstream gradients may be NULL. */
FASTVAE_EXPORT int fastvae_cuda_kl_decomposition_backward(int dtype, const void *d_mi, const void *d_agg_kl,
                                                          const void *d_tc, const void *d_dim_kl, const void *d_kl,
                                                          const void *d_entropy, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS,
                                                          int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu,
                                                          void *d_logvar, void *d_log_w, void *workspace,
                                                          int64_t workspace_size, void *stream);

#ifdef __cplusplus
}
#endif

#endif
