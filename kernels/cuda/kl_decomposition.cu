// The terms of the KL from N(0, I), means over samples of what agg_log_prob_marginals gives, and their gradients: those
// of the joint and the marginals, whose upstream gradients are the same for all samples, and of what is left,
//     log q(z_i | x_i) = -1/2 sum_d (t^2 + logvar + ln 2 pi),  t = (z - mu) e^(-logvar / 2),
//     log p(z_i)       = -1/2 sum_d (z^2 + ln 2 pi).

#include "exponentials.h"
#include "pull.h"
#include "sums.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// z, (z - mu) / sigma and 1 / sigma of sample i, from posterior i mod N, in dimension d; the last two held finite.
template <class T> struct Standardized {
    T z, t, inverse_sigma, logvar;
    template <class In>
    FASTVAE_DEVICE Standardized(const Inputs<In> &in, int64_t i, int64_t N, int64_t d)
        : z(load(in.z(i) + d)), logvar(load(in.logvar(i % N) + d)) {
        inverse_sigma = clip(exp_(T(-0.5) * logvar), T(0), largest<T>());
        t = clip((z - load(in.mu(i % N) + d)) * inverse_sigma, -largest<T>(), largest<T>());
    }
};

// Of the terms, in a row of partials after those of dim_kl
enum Term { kMi, kAggKl, kTc, kKl, kJoint, kTerms };

// partials [parts][D + kTerms]: a warp adds up its part of the samples. Sums of differences, which are smaller than the
// densities, and rounded less.
template <class In>
__global__ void sum_terms(Inputs<In> in, int64_t S, int64_t N, int64_t D, const Accumulator<In> *joint,
                          const Accumulator<In> *marginals, Parts parts, double *partials) {
    using T = Accumulator<In>;
    const int64_t part = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32, first = part * parts.size;
    if (part >= parts.count) return;
    const int64_t last = first + parts.size < S ? first + parts.size : S;
    const int lane = int(threadIdx.x) % 32;
    double *const dims = partials + part * (D + kTerms);
    for (int64_t d = lane; d < D; d += 32) dims[d] = 0;
    double sums[kTerms] = {};
    for (int64_t i = first; i < last; ++i) {
        double c = 0, m = 0, p = 0;
        for (int64_t d = lane; d < D; d += 32) {
            const Standardized<T> x(in, i, N, d);
            const double m_d = double(marginals[i * D + d]), p_d = -0.5 * (double(x.z) * double(x.z) + kLog2Pi);
            c += double(mul_(x.t, x.t) + x.logvar);  // infinity - infinity is NaN
            m += m_d, p += p_d;
            dims[d] += m_d - p_d;
        }
        c = -0.5 * (sum_of_warp(c) + double(D) * kLog2Pi), m = sum_of_warp(m), p = sum_of_warp(p);
        const double j = double(joint[i]);
        sums[kMi] += c - j, sums[kAggKl] += j - p, sums[kTc] += j - m, sums[kKl] += c - p, sums[kJoint] += j;
    }
    FASTVAE_UNROLL
    for (int k = 0; k < kTerms; ++k)
        if (lane == 0) dims[D + k] = sums[k];
}

template <class T> struct Terms {
    T *mi, *agg_kl, *tc, *dim_kl, *kl, *entropy, *saturation;  // dim_kl [D], numbers
};

// A warp adds up one of the partial sums.
template <class T>
__global__ void add_terms(const double *partials, int64_t parts, int64_t S, int64_t N, int64_t D, Terms<T> out) {
    const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32, term = k - D;
    const double mean = sum_of_partials(partials, parts, D + kTerms, k) / double(S);
    if (threadIdx.x % 32 || term >= kTerms) return;
    if (term < 0) out.dim_kl[k] = T(mean);
    if (term == kMi) *out.mi = T(mean), *out.saturation = T(exp(mean) / double(N));
    if (term == kAggKl) *out.agg_kl = T(mean);
    if (term == kTc) *out.tc = T(mean);
    if (term == kKl) *out.kl = T(mean);
    if (term == kJoint) *out.entropy = T(-mean);
}

// The upstream gradients, null for 0, and what they make of each sample's.
template <class T> struct Upstream {
    const T *mi, *agg_kl, *tc, *dim_kl, *kl, *entropy;
    double each;  // 1 / S
    FASTVAE_DEVICE static double of(const T *g, int64_t k = 0) { return g ? double(g[k]) : 0.0; }
    FASTVAE_DEVICE T joint() const { return T(each * (of(agg_kl) + of(tc) - of(mi) - of(entropy))); }
    FASTVAE_DEVICE T marginal(int64_t d) const { return T(each * (of(dim_kl, d) - of(tc))); }
    FASTVAE_DEVICE T conditional() const { return T(each * (of(mi) + of(kl))); }
    FASTVAE_DEVICE T minus_prior(int64_t d) const { return T(each * (of(agg_kl) + of(kl) + of(dim_kl, d))); }
    bool any_joint() const { return mi || agg_kl || tc || entropy; }
    bool any_marginals() const { return tc || dim_kl; }
};

// d_joint [S], d_marginals [S, D]; null where not wanted
template <class T> __global__ void spread_terms(Upstream<T> g, int64_t S, int64_t D, T *d_joint, T *d_marginals) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (d_joint && k < S) d_joint[k] = g.joint();
    if (d_marginals && k < S * D) d_marginals[k] = g.marginal(k % D);
}

template <class Out> FASTVAE_DEVICE void add(Out *to, Accumulator<Out> x, bool alone) {
    store(to, alone ? x : load(to) + x);
}

// Adds to the gradients what the conditional and the prior pull; `alone`: nothing else pulls, and nothing is there yet.
template <class In>
__global__ void add_pulls(Inputs<In> in, int64_t S, int64_t N, int64_t D, Upstream<Accumulator<In>> upstream,
                          Gradients<In> out, bool alone) {
    using T = Accumulator<In>;
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const T g = upstream.conditional();
    if (out.d_z && k < S * D) {
        const Standardized<T> x(in, k / D, N, k % D);
        add(out.d_z + k, times(upstream.minus_prior(k % D), x.z) - times(g, x.t) * x.inverse_sigma, alone);
    }
    if ((out.d_mu || out.d_logvar) && k < N * D) {
        double by_mu = 0, by_logvar = 0;
        for (int64_t i = k / D; i < S; i += N) {
            const Standardized<T> x(in, i, N, k % D);
            by_mu += double(times(g, x.t) * x.inverse_sigma);
            by_logvar += double(times(T(0.5) * g, x.t * x.t - T(1)));
        }
        if (out.d_mu) add(out.d_mu + k, T(by_mu), alone);
        if (out.d_logvar) add(out.d_logvar + k, T(by_logvar), alone);
    }
    if (alone && out.d_log_w && k < N) out.d_log_w[k] = 0;
}

constexpr int64_t kMostWarps = 1024;

// What agg_log_prob_marginals needs
struct MarginalsMemory {
    int64_t size;
    char *rest;
    MarginalsMemory(Arena &arena, int dtype, int64_t S, int64_t N, int64_t D, bool backward)
        : size(fastvae_cuda_agg_log_prob_marginals_workspace(dtype, S, N, D, backward)), rest(arena.take<char>(size)) {}
};

struct TermsForward {
    Parts parts;
    double *partials;
    MarginalsMemory marginals;
    TermsForward(Arena &arena, int dtype, int64_t S, int64_t N, int64_t D)
        : parts(S, kMostWarps), partials(arena.take<double>(parts.count * (D + kTerms))),
          marginals(arena, dtype, S, N, D, false) {}
};

template <class T> struct TermsBackward {
    T *d_joint, *d_marginals;
    MarginalsMemory marginals;
    TermsBackward(Arena &arena, int dtype, int64_t S, int64_t N, int64_t D)
        : d_joint(arena.take<T>(S)), d_marginals(arena.take<T>(S * D)), marginals(arena, dtype, S, N, D, true) {}
};

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_kl_decomposition_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward) {
    return bytes_taken(dtype, [&](Arena &arena, auto in) {
        if (backward)
            TermsBackward<Accumulator<decltype(in)>>(arena, dtype, S, N, D);
        else
            TermsForward(arena, dtype, S, N, D);
    });
}

int fastvae_cuda_kl_decomposition(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                  void *mi, void *agg_kl, void *tc, void *dim_kl, void *kl, void *entropy,
                                  void *saturation, void *joint, void *marginals, void *workspace,
                                  int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const TermsForward memory(arena, dtype, S, N, D);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        FASTVAE_TRY(fastvae_cuda_agg_log_prob_marginals(
            dtype, z, z_stride, mu, mu_stride, logvar, logvar_stride, log_w, log_w_all, own, log_w_own, log_w_next, S, N,
            D, joint, marginals, memory.marginals.rest, memory.marginals.size, stream_));
        const Inputs<In> in(z, z_stride, mu, mu_stride, logvar, logvar_stride);
        FASTVAE_TRY(launch(sum_terms<In>, ceil_div(memory.parts.count * 32, kThreads), 1, kThreads, stream, in, S, N, D,
                           static_cast<const T *>(joint), static_cast<const T *>(marginals), memory.parts,
                           memory.partials));
        const Terms<T> out{static_cast<T *>(mi), static_cast<T *>(agg_kl),  static_cast<T *>(tc),
                           static_cast<T *>(dim_kl), static_cast<T *>(kl), static_cast<T *>(entropy),
                           static_cast<T *>(saturation)};
        return launch(add_terms<T>, ceil_div((D + kTerms) * 32, kThreads), 1, kThreads, stream, memory.partials,
                      memory.parts.count, S, N, D, out);
    });
}

int fastvae_cuda_kl_decomposition_backward(int dtype, const void *d_mi, const void *d_agg_kl, const void *d_tc,
                                           const void *d_dim_kl, const void *d_kl, const void *d_entropy,
                                           FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                           void *d_z, void *d_mu, void *d_logvar, void *d_log_w, void *workspace,
                                           int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        const auto number = [](const void *g) { return static_cast<const T *>(g); };
        const Upstream<T> g{number(d_mi), number(d_agg_kl), number(d_tc),
                            number(d_dim_kl), number(d_kl), number(d_entropy), 1 / double(S)};
        Arena arena(workspace);
        const TermsBackward<T> memory(arena, dtype, S, N, D);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        T *const d_joint = g.any_joint() ? memory.d_joint : nullptr;
        T *const d_marginals = g.any_marginals() ? memory.d_marginals : nullptr;
        const bool alone = !d_joint && !d_marginals;
        if (!alone) {
            FASTVAE_TRY(launch(spread_terms<T>, ceil_div(S * (D < 1 ? 1 : D), kThreads), 1, kThreads, stream, g, S, D,
                               d_joint, d_marginals));
            FASTVAE_TRY(fastvae_cuda_agg_log_prob_marginals_backward(
                dtype, d_joint, d_marginals, z, z_stride, mu, mu_stride, logvar, logvar_stride, log_w, log_w_all, own,
                log_w_own, log_w_next, S, N, D, d_z, d_mu, d_logvar, d_log_w, memory.marginals.rest,
                memory.marginals.size, stream_));
        }
        const Gradients<In> out{static_cast<In *>(d_z), static_cast<In *>(d_mu), static_cast<In *>(d_logvar),
                                static_cast<T *>(d_log_w)};
        const Inputs<In> in(z, z_stride, mu, mu_stride, logvar, logvar_stride);
        return launch(add_pulls<In>, ceil_div((S < N ? N : S) * (D < 1 ? 1 : D), kThreads), 1, kThreads, stream, in, S, N,
                      D, g, out, alone);
    });
}
