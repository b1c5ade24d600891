/* fastvae: the plain C interface of the native library.
 *
 * A table of kernels exists per instruction set and scalar type. Every tensor is a pointer to that scalar
 * type, row-major; a stride counts elements between rows, and the last axis is always contiguous. Outputs
 * that a caller does not want are NULL and are then not computed. Shapes: S samples, N posteriors (columns),
 * D dimensions, L samples per posterior, B batch. Logarithms are natural. Every kernel returns a status.
 */
#ifndef FASTVAE_H
#define FASTVAE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The number of this interface and of fastvae_cuda.h's: a digest of both files, which
 * tests/backends/test_c_interface.py gives. It stands in fastvae/backends/c_interface.py as well: the Python package
 * refuses a library that has another. */
#define FASTVAE_INTERFACE 0x553B30A

enum fastvae_status {
    FASTVAE_OK = 0,
    FASTVAE_OUT_OF_MEMORY = 1,
    FASTVAE_INTERRUPTED = 2 /* as fastvae_poll had it; outputs hold nothing of use */
};
enum fastvae_dtype { FASTVAE_F32 = 0, FASTVAE_F64 = 1 };
enum fastvae_reduction {
    FASTVAE_NONE = 0,   /* [B, D] */
    FASTVAE_SAMPLE = 1, /* [B]: sum over D */
    FASTVAE_DIM = 2,    /* [D]: sum over B */
    FASTVAE_SUM = 3     /* [1] */
};

/* log w_ij of the weighted log-sum-exp. For sample i with own column o = own[i]:
 * j == o gives log_w_own; else j == (o + 1) mod N gives log_w_next; else log_w[j], or log_w_all where
 * log_w is NULL. own[i] == -1 means no own column; a NaN in log_w_own or log_w_next means no override. */
#define FASTVAE_WEIGHTS \
    const void *log_w, double log_w_all, const int64_t *own, double log_w_own, double log_w_next

typedef struct fastvae_kernels {
    /* KL(N(mu, exp logvar) || N(prior_mu, exp prior_logvar)), reduced and multiplied by `scale`.
     * Priors may be NULL (then 0), and a prior's stride may be 0: one row for all. */
    int (*kl_gauss)(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                    const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                    int64_t prior_logvar_stride, int64_t B, int64_t D, int reduction, double scale, void *out,
                    int threads);

    /* The upstream gradient of element (b, d) is scale * grad[b * grad_row + d * grad_col], grad_col 0 or 1:
     * one formula for every reduction. d_mu, d_logvar: [B, D]. d_prior_*: [B, D], or [D] where that prior's
     * stride is 0. */
    int (*kl_gauss_backward)(const void *grad, int64_t grad_row, int64_t grad_col, double scale,
                             const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                             const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                             int64_t prior_logvar_stride, int64_t B, int64_t D, void *d_mu, void *d_logvar,
                             void *d_prior_mu, void *d_prior_logvar, int threads);

    /* z [L, B, D] = mu + exp(logvar / 2) * eps, with eps from Philox4x32-10 keyed by *seed;
     * log_q [L, B] = log q(z | x), log_p [L, B] = log N(z; 0, I), kl = KL(q || N(0, I)): FASTVAE_SAMPLE or
     * FASTVAE_SUM, multiplied by kl_scale; and eps [L, B, D] for the backward. */
    int (*sample_gauss)(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                        const uint64_t *seed, int64_t L, int64_t B, int64_t D, int reduction, double kl_scale,
                        void *z, void *log_q, void *log_p, void *kl, void *eps, int threads);

    /* Any of the four upstream gradients may be NULL (zero); that of row b's KL is kl_scale * d_kl[b * kl_row].
     * d_mu, d_logvar: [B, D]. eps is what the forward gave, or NULL: it is then drawn again, and to the same bits. The
     * seed may be NULL where nothing is drawn. */
    int (*sample_gauss_backward)(const void *d_z, const void *d_log_q, const void *d_log_p, const void *d_kl,
                                 int64_t kl_row, double kl_scale, const void *mu, int64_t mu_stride,
                                 const void *logvar, int64_t logvar_stride, const uint64_t *seed, const void *eps,
                                 int64_t L, int64_t B, int64_t D, void *d_mu, void *d_logvar, int threads);

    /* log_p [R] = sum_m x_m l_m - log(1 + exp(l_m)), of x [B, M] and the logits l [R, M]: row r of the logits meets row
     * r mod B of x, and B divides R. */
    int (*bernoulli_log_prob)(const void *x, int64_t x_stride, const void *logits, int64_t logits_stride, int64_t B,
                              int64_t R, int64_t M, void *log_p, int threads);
    /* The upstream gradient of row r is grad[r * grad_row]. d_logits: [R, M]. */
    int (*bernoulli_log_prob_backward)(const void *grad, int64_t grad_row, const void *x, int64_t x_stride,
                                       const void *logits, int64_t logits_stride, int64_t B, int64_t R, int64_t M,
                                       void *d_logits, int threads);

    /* out [S, N] = log N(z_i; mu_j, exp logvar_j). */
    int (*cross_log_prob)(const void *z, const void *mu, const void *logvar, int64_t S, int64_t N, int64_t D,
                          void *out, int threads);
    int (*cross_log_prob_backward)(const void *grad, const void *z, const void *mu, const void *logvar,
                                   int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar,
                                   int threads);

    /* joint [S] = log sum_j w_ij prod_d q(z_id | x_j). exact_skip: whether pairs may be left out that are too
     * far apart to change the results by as much as their rounding. */
    int (*agg_log_prob)(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S,
                        int64_t N, int64_t D, void *joint, int exact_skip, int threads);
    /* The joint, which it computes again, is an output like the gradients. */
    int (*agg_log_prob_backward)(const void *d_joint, const void *z, const void *mu, const void *logvar,
                                 FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *joint, void *d_z,
                                 void *d_mu, void *d_logvar, void *d_log_w, int exact_skip, int threads);

    /* The joint, and marginals [S, D] = log sum_j w_ij q(z_id | x_j), in one pass. */
    int (*agg_log_prob_marginals)(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                                  int64_t S, int64_t N, int64_t D, void *joint, void *marginals,
                                  int threads);
    int (*agg_log_prob_marginals_backward)(const void *d_joint, const void *d_marginals, const void *joint,
                                           const void *marginals, const void *z, const void *mu,
                                           const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                                           int64_t D, void *d_z, void *d_mu, void *d_logvar, void *d_log_w,
                                           int threads);

    /* entropy = -1/S sum_i joint_i */
    int (*agg_entropy)(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                       int64_t D, void *entropy, int exact_skip, int threads);
    int (*agg_entropy_backward)(const void *d_entropy, const void *z, const void *mu, const void *logvar,
                                FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu,
                                void *d_logvar, void *d_log_w, int exact_skip, int threads);

    /* The terms of the KL from N(0, I), as means over samples, sample i being from posterior i mod N, and N a divisor
     * of S: with c_i = log q(z_i | x_i), p_id = log N(z_id; 0, 1) and p_i its sum over d, the joint j_i and the marginals
     * m_id, which are outputs for the backward,
     *     mi: c - j   agg_kl: j - p   tc: j - sum_d m_d   dim_kl [D]: m_d - p_d   kl: c - p   entropy: -j
     * and saturation = exp(mi) / N. */
    int (*kl_decomposition)(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                            int64_t D, void *mi, void *agg_kl, void *tc, void *dim_kl, void *kl, void *entropy,
                            void *saturation, void *joint, void *marginals, int threads);
    /* Any of the six upstream gradients may be NULL. */
    int (*kl_decomposition_backward)(const void *d_mi, const void *d_agg_kl, const void *d_tc, const void *d_dim_kl,
                                     const void *d_kl, const void *d_entropy, const void *joint,
                                     const void *marginals, const void *z, const void *mu, const void *logvar,
                                     FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu,
                                     void *d_logvar, void *d_log_w, int threads);
} fastvae_kernels;

/* FASTVAE_INTERFACE of the headers that the library was built with: to be asked for before anything else. */
int fastvae_interface(void);

/* The version of this library, for example "0.1.0". */
const char *fastvae_version(void);

/* How many dimensions of pairs agg_log_prob visited, its backward too, and how many all pairs have, S N D for each pass
 * over them; in the whole process since this was last asked. */
void fastvae_take_visits(int64_t *visited, int64_t *all);

/* While the thread of this number computes in a kernel it calls `interrupted` about every 100 ms; where that gives
 * anything but 0, the kernel ends and gives FASTVAE_INTERRUPTED. `interrupted` may take its time, and call kernels, in
 * which it is not called again; a child that it forks must not return from it where several threads compute. Numbers
 * are those of pthread_self(), on Windows of GetCurrentThreadId(). There is one such function and thread in the process;
 * NULL for none, as at the beginning. */
void fastvae_poll(int (*interrupted)(void), uint64_t thread);

/* The instruction sets compiled in that this CPU can run, best first, space separated: "avx512 avx2 sse4". */
const char *fastvae_instruction_sets(void);

/* The kernels for one of them, or NULL where it was not compiled in or this CPU cannot run it. */
const fastvae_kernels *fastvae_kernels_for(const char *instruction_set, enum fastvae_dtype dtype);

#ifdef __cplusplus
}
#endif

#endif
