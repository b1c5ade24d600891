// The terms of the KL from N(0, I), means over samples of what agg_log_prob_marginals gives, and their gradients: those
// of the joint and the marginals, whose upstream gradients are the same for all samples, and of what is left,
//     log q(z_i | x_i) = -1/2 sum_d (t^2 + logvar + ln 2 pi),  t = (z - mu) e^(-logvar / 2),
//     log p(z_i)       = -1/2 sum_d (z^2 + ln 2 pi).

#include "kernels.h"
#include "panels.h"

namespace fastvae::FASTVAE_ISA {

namespace {

constexpr int64_t kSpan = 512;  // terms that are summed in T, before double

// (z - mu) / sigma and 1 / sigma, held finite.
template <class T> struct Standardized {
    Vec<T> t, inverse_sigma;

    FASTVAE_INLINE Standardized(const T *z, const T *mu, const T *logvar, int64_t n) {
        const Vec<T> largest = splat(kLargest<T>);
        inverse_sigma = min_<T>(largest, exp_<T>(T(-0.5) * load_some(logvar, n)));
        t = (load_some(z, n) - load_some(mu, n)) * inverse_sigma;
        t = min_<T>(largest, max_<T>(-largest, t));
    }
};

// sum_d (t^2 + logvar)
template <class T> double quadratic(const T *z, const T *mu, const T *logvar, int64_t D) {
    double sum = 0;
    for (int64_t d = 0; d < D; d += kSpan) {
        Vec<T> span{};
        for_each_vector<T>(D - d < kSpan ? D - d : kSpan, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const int64_t at = d + k;
            const Vec<T> t = Standardized<T>(z + at, mu + at, logvar + at, n).t;
            // Lanes past the end have z = mu = logvar = 0.
            span += rounded<T>(t * t) + load_some(logvar + at, n);  // infinity - infinity is NaN
        });
        sum += sum_lanes<T>(span);
    }
    return sum;
}

template <class T> double upstream(const void *gradient) {
    return gradient ? double(*static_cast<const T *>(gradient)) : 0.0;
}

}  // namespace

template <class T>
int kl_decomposition(const void *z_, const void *mu_, const void *logvar_, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                     int64_t D, void *mi, void *agg_kl, void *tc, void *dim_kl, void *kl, void *entropy,
                     void *saturation, void *joint_, void *marginals_, int threads) {
    const T *z = static_cast<const T *>(z_), *mu = static_cast<const T *>(mu_);  // [S, D], [N, D]
    const T *logvar = static_cast<const T *>(logvar_), *joint = static_cast<const T *>(joint_);  // [N, D], [S]
    const T *marginals = static_cast<const T *>(marginals_);                                     // [S, D]
    Buffer<double> dims(D);  // sum_i m_id - p_id
    if (!dims) return FASTVAE_OUT_OF_MEMORY;
    const int status = agg_log_prob_marginals<T>(z_, mu_, logvar_, log_w, log_w_all, own, log_w_own, log_w_next, S, N,
                                                 D, joint_, marginals_, threads);
    if (status != FASTVAE_OK) return status;

    // Sums of differences, which are smaller than the densities, and rounded less.
    for (int64_t d = 0; d < D; ++d) dims[d] = 0;
    double mi_sum = 0, agg_kl_sum = 0, tc_sum = 0, kl_sum = 0, j_sum = 0;
    for (int64_t i = 0; i < S; ++i) {
        const int64_t at = i * D, own_at = i % N * D;
        double m = 0, p = 0;
        for (int64_t d = 0; d < D; ++d) {
            const double x = double(z[at + d]), m_d = double(marginals[at + d]), p_d = -0.5 * (x * x + kLog2Pi);
            m += m_d, p += p_d;
            dims[d] += m_d - p_d;
        }
        const double c = -0.5 * (quadratic(z + at, mu + own_at, logvar + own_at, D) + double(D) * kLog2Pi);
        const double j = double(joint[i]);
        mi_sum += c - j, agg_kl_sum += j - p, tc_sum += j - m, kl_sum += c - p, j_sum += j;
    }
    const double each = 1 / double(S);
    for (int64_t d = 0; d < D; ++d) static_cast<T *>(dim_kl)[d] = T(each * dims[d]);
    const auto write = [](void *out, double x) { *static_cast<T *>(out) = T(x); };
    write(mi, each * mi_sum), write(agg_kl, each * agg_kl_sum), write(tc, each * tc_sum), write(kl, each * kl_sum);
    write(entropy, -each * j_sum), write(saturation, std::exp(each * mi_sum) / double(N));
    return FASTVAE_OK;
}

template <class T>
int kl_decomposition_backward(const void *d_mi, const void *d_agg_kl, const void *d_tc, const void *d_dim_kl_,
                              const void *d_kl, const void *d_entropy, const void *joint, const void *marginals,
                              const void *z_, const void *mu_, const void *logvar_, FASTVAE_WEIGHTS, int64_t S,
                              int64_t N, int64_t D, void *d_z_, void *d_mu_, void *d_logvar_, void *d_log_w,
                              int threads) {
    const T *z = static_cast<const T *>(z_), *mu = static_cast<const T *>(mu_);  // [S, D], [N, D]
    const T *logvar = static_cast<const T *>(logvar_), *d_dim_kl = static_cast<const T *>(d_dim_kl_);  // [N, D], [D]
    T *d_z = static_cast<T *>(d_z_), *d_mu = static_cast<T *>(d_mu_), *d_logvar = static_cast<T *>(d_logvar_);
    const double g_mi = upstream<T>(d_mi), g_agg_kl = upstream<T>(d_agg_kl), g_tc = upstream<T>(d_tc);
    const double g_kl = upstream<T>(d_kl), g_entropy = upstream<T>(d_entropy), each = 1 / double(S);
    const bool any_joint = d_mi || d_agg_kl || d_tc || d_entropy, any_marginals = d_tc || d_dim_kl;

    Buffer<T> d_joint(any_joint ? S : 0), d_marginals(any_marginals ? S * D : 0), of_prior(D);
    if (!d_joint || !d_marginals || !of_prior) return FASTVAE_OUT_OF_MEMORY;
    if (any_joint)
        for (int64_t i = 0; i < S; ++i) d_joint[i] = T(each * (g_agg_kl + g_tc - g_mi - g_entropy));
    for (int64_t d = 0; d < D; ++d) {
        const double g = d_dim_kl ? double(d_dim_kl[d]) : 0.0;
        of_prior[d] = T(each * (g_agg_kl + g_kl + g));
        for (int64_t i = 0; i < S && any_marginals; ++i) d_marginals[i * D + d] = T(each * (g - g_tc));
    }
    if (any_joint || any_marginals) {
        const int status = agg_log_prob_marginals_backward<T>(
            any_joint ? (T *)d_joint : nullptr, any_marginals ? (T *)d_marginals : nullptr, joint, marginals, z_, mu_,
            logvar_, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D, d_z_, d_mu_, d_logvar_, d_log_w, threads);
        if (status != FASTVAE_OK) return status;
    } else {
        for (int64_t k = 0; k < S * D && d_z; ++k) d_z[k] = T(0);
        for (int64_t k = 0; k < N * D; ++k) {
            if (d_mu) d_mu[k] = T(0);
            if (d_logvar) d_logvar[k] = T(0);
        }
        for (int64_t j = 0; j < N && d_log_w; ++j) static_cast<T *>(d_log_w)[j] = T(0);
    }

    const Vec<T> g = splat(T(each * (g_mi + g_kl)));
    for (int64_t i = 0; i < S; ++i)
        for_each_vector<T>(D, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
            const int64_t at = i * D + d, own_at = i % N * D + d;
            const Standardized<T> own_q(z + at, mu + own_at, logvar + own_at, n);
            const Vec<T> pull = times<T>(g, own_q.t) * own_q.inverse_sigma;
            if (d_z)
                store_some(d_z + at, load_some(d_z + at, n) - pull +
                           times<T>(load_some((T *)of_prior + d, n), load_some(z + at, n)), n);
            if (d_mu) store_some(d_mu + own_at, load_some(d_mu + own_at, n) + pull, n);
            if (d_logvar) {
                const Vec<T> half = times<T>(T(0.5) * g, own_q.t * own_q.t - T(1));
                store_some(d_logvar + own_at, load_some(d_logvar + own_at, n) + half, n);
            }
        });
    return FASTVAE_OK;
}

void add_kl_decomposition(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.kl_decomposition = kl_decomposition<float>, f64.kl_decomposition = kl_decomposition<double>;
    f32.kl_decomposition_backward = kl_decomposition_backward<float>;
    f64.kl_decomposition_backward = kl_decomposition_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
