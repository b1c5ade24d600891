// z = mu + e^(logvar / 2) eps and its densities in one pass, and the gradients at the same eps: standard normals that
// depend on the seed and an element's index alone, by Philox4x32-10 and Box-Muller, as kernels/cpu/philox.h says.

#include "exponentials.h"
#include "launch.h"
#include "philox_rounds.h"
#include "sums.h"
#include "vectors.h"

namespace fastvae::FASTVAE_ISA {

namespace {

constexpr int kGroup = 4;  // elements of one Philox block
template <class In> constexpr int kDims = Vector<In>::kSize < kGroup ? kGroup : Vector<In>::kSize;  // of a thread

FASTVAE_DEVICE void words(uint64_t group, uint64_t seed, uint32_t *w) {
    PhiloxBlock<uint64_t> block[1] = {{group, group >> 32, 0, 0}};
    philox(block, seed, [](uint64_t x, uint32_t m) { return (x & 0xffffffff) * m; });
    w[0] = uint32_t(block[0].w0), w[1] = uint32_t(block[0].w1);
    w[2] = uint32_t(block[0].w2), w[3] = uint32_t(block[0].w3);
}

FASTVAE_DEVICE void sincospi_(float x, float *sine, float *cosine) { sincospif(x, sine, cosine); }
FASTVAE_DEVICE void sincospi_(double x, double *sine, double *cosine) { sincospi(x, sine, cosine); }

// Two normals: r cos(2 pi u2) and r sin(2 pi u2), r = sqrt(-2 ln u1), of 24 bits each
template <class T> FASTVAE_DEVICE void box_muller(uint32_t radius, uint32_t angle, T &even, T &odd) {
    const T r = sqrt(T(-2) * log(T((radius >> 8) + 1) * T(0x1p-24)));
    T sine, cosine;
    sincospi_(T(angle >> 8) * T(0x1p-23), &sine, &cosine);
    even = r * cosine;
    odd = r * sine;
}

// The normals of elements [first, first + 4): of one block where first is a multiple of 4, else of two.
template <class T> FASTVAE_DEVICE void group_of_normals(uint64_t first, uint64_t seed, T *eps) {
    uint32_t w[2 * kGroup] = {};
    words(first / kGroup, seed, w);
    const int skip = int(first % kGroup);
    if (skip) words(first / kGroup + 1, seed, w + kGroup);
    T x[2 * kGroup] = {};
    FASTVAE_UNROLL
    for (int k = 0; k < 2 * kGroup; k += 2)
        if (k < kGroup || skip) box_muller(w[k], w[k + 1], x[k], x[k + 1]);
    FASTVAE_UNROLL
    for (int k = 0; k < kGroup; ++k)
        eps[k] = skip == 0 ? x[k] : skip == 1 ? x[k + 1] : skip == 2 ? x[k + 2] : x[k + 3];
}
template <class T, int n> FASTVAE_DEVICE void normals(uint64_t first, uint64_t seed, T (&eps)[n]) {
    FASTVAE_UNROLL
    for (int k = 0; k < n; k += kGroup) group_of_normals(first + k, seed, eps + k);
}

template <class In> struct Distribution {
    Rows<In> mu, logvar;  // [B, D]
    const uint64_t *seed;
    int64_t L, B, D;
};

template <class In> struct Samples {  // null where not wanted
    In *z;                                // [L, B, D]
    Accumulator<In> *log_q, *log_p, *kl;  // [L, B], [L, B], [B]
    Accumulator<In> *eps;                 // [L, B, D]
    double kl_scale;
};

// `lanes`, a power of 2 up to 32, take a row of a sample, a few dimensions each at a time (vectors.h).
template <class In, bool kWide> __global__ void sample_rows(Distribution<In> x, Samples<In> out, int lanes) {
    using T = Accumulator<In>;
    constexpr int n = kDims<In>;
    const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = thread / lanes, b = row % x.B;
    const bool there = row < x.L * x.B, wants_kl = out.kl && row < x.B;
    const uint64_t seed = *x.seed;
    T q = 0, p = 0, k = 0;
    for (int64_t d = thread % lanes * n; there && d < x.D; d += lanes * n) {
        const int dims = there_are<kWide, n>(d, x.D);
        T mu[n], logvar[n], eps[n], z[n];
        load<kWide>(x.mu(b) + d, dims, mu);
        load<kWide>(x.logvar(b) + d, dims, logvar);
        normals(uint64_t(row * x.D + d), seed, eps);
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) {
            if (e >= dims) continue;
            z[e] = mu[e] + times(eps[e], exp_(T(0.5) * logvar[e]));
            q += fma_(eps[e], eps[e], logvar[e]);
            p = fma_(z[e], z[e], p);
            if (wants_kl) k += fma_(mu[e], mu[e], exp_tail(logvar[e]));
        }
        if (out.z) store<kWide>(out.z + row * x.D + d, dims, z);
        if (out.eps) store<kWide>(out.eps + row * x.D + d, dims, eps);
    }
    for (int offset = lanes / 2; offset; offset /= 2) {
        q += __shfl_xor_sync(~0u, q, offset);
        p += __shfl_xor_sync(~0u, p, offset);
        k += __shfl_xor_sync(~0u, k, offset);
    }
    if (!there || thread % lanes) return;
    const T constant = T(kLog2Pi) * T(x.D);
    if (out.log_q) out.log_q[row] = T(-0.5) * (constant + q);
    if (out.log_p) out.log_p[row] = T(-0.5) * (constant + p);
    if (wants_kl) out.kl[b] = T(out.kl_scale) * (T(0.5) * k);
}

template <class T> struct Upstream {  // null for 0
    const T *log_q, *log_p, *kl;
    int64_t kl_row;
    double kl_scale;
    FASTVAE_DEVICE T of_kl(int64_t b) const { return T(kl_scale) * kl[b * kl_row]; }
};

// A thread takes a few dimensions of a row, in all samples. `noise`: eps [L, B, D], or null to draw it.
template <class In, bool kWide>
__global__ void sample_backward(Distribution<In> x, const Accumulator<In> *noise, const In *d_z,
                                Upstream<Accumulator<In>> g, In *d_mu, In *d_logvar) {
    using T = Accumulator<In>;
    constexpr int n = kDims<In>;
    const int64_t groups = (x.D + n - 1) / n, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t b = thread / groups, d = thread % groups * n;
    if (b >= x.B) return;
    const int dims = there_are<kWide, n>(d, x.D);
    T mu[n], logvar[n], sigma[n], by_mu[n] = {}, by_logvar[n] = {};
    load<kWide>(x.mu(b) + d, dims, mu);
    load<kWide>(x.logvar(b) + d, dims, logvar);
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e) sigma[e] = exp_(T(0.5) * logvar[e]);
    const uint64_t seed = x.seed ? *x.seed : 0;
    T from_log_q = 0;
    for (int64_t l = 0; l < x.L; ++l) {
        const int64_t row = l * x.B + b;
        const T g_p = g.log_p ? g.log_p[row] : T(0);
        if (g.log_q) from_log_q += g.log_q[row];
        T eps[n], pull[n] = {};
        if (d_z) load<kWide>(d_z + row * x.D + d, dims, pull);
        if (noise)
            load<kWide>(noise + row * x.D + d, dims, eps);
        else
            normals(uint64_t(row * x.D + d), seed, eps);
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) {
            pull[e] -= times(g_p, mu[e] + times(eps[e], sigma[e]));
            by_mu[e] += pull[e];
            by_logvar[e] = fma_(pull[e], eps[e], by_logvar[e]);
        }
    }
    const T g_kl = g.kl ? g.of_kl(b) : T(0);
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e) {  // sigma multiplies the sum: it may overflow, and the samples' signs differ
        by_logvar[e] = times(T(0.5) * by_logvar[e], sigma[e]) - T(0.5) * from_log_q;
        if (!g.kl) continue;
        by_mu[e] += times(g_kl, mu[e]);
        by_logvar[e] += times(T(0.5) * g_kl, expm1_(logvar[e]));
    }
    if (d_mu) store<kWide>(d_mu + b * x.D + d, dims, by_mu);
    if (d_logvar) store<kWide>(d_logvar + b * x.D + d, dims, by_logvar);
}

template <class In>
Distribution<In> distribution(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                              const uint64_t *seed, int64_t L, int64_t B, int64_t D) {
    return {{static_cast<const In *>(mu), mu_stride}, {static_cast<const In *>(logvar), logvar_stride}, seed, L, B, D};
}

// The KL of each row [B], where a number is made of them
template <class T> struct SumOfRows {
    T *rows;
    Sum over;
    SumOfRows(Arena &arena, int64_t B) : rows(arena.take<T>(B)), over(arena, B) {}
};

template <class In> bool is_wide(const Distribution<In> &x) {
    return x.D % kDims<In> == 0 && aligned(x.mu) && aligned(x.logvar);
}

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_sample_gauss_workspace(int dtype, int64_t B, int reduction, int backward) {
    return bytes_taken(dtype, [&](Arena &arena, auto one) {
        if (reduction != FASTVAE_SAMPLE && !backward) SumOfRows<Accumulator<decltype(one)>>(arena, B);
    });
}

int fastvae_cuda_sample_gauss(int dtype, const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                              const uint64_t *seed, int64_t L, int64_t B, int64_t D, int reduction, double kl_scale,
                              void *z, void *log_q, void *log_p, void *kl, void *eps, void *workspace,
                              int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        const bool total = kl && reduction != FASTVAE_SAMPLE;
        Arena arena(workspace);
        const SumOfRows<T> sum(arena, total ? B : 0);
        if (total && arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        Samples<In> out{static_cast<In *>(z), static_cast<T *>(log_q), static_cast<T *>(log_p),
                        total ? sum.rows : static_cast<T *>(kl), static_cast<T *>(eps), total ? 1.0 : kl_scale};
        if (L == 0) out.z = nullptr, out.log_q = out.log_p = out.eps = nullptr;  // the KL is still asked for
        const Distribution<In> x = distribution<In>(mu, mu_stride, logvar, logvar_stride, seed, L ? L : 1, B, D);
        int lanes = 1;
        while (lanes < 32 && lanes * kDims<In> < D) lanes *= 2;
        const bool wide = is_wide(x) && aligned(out.z, D) && aligned(out.eps, D);
        FASTVAE_TRY(launch(wide ? sample_rows<In, true> : sample_rows<In, false>,
                           ceil_div(x.L * B * lanes, kThreads), 1, kThreads, stream, x, out, lanes));
        return total ? sum.over.run(sum.rows, kl_scale, static_cast<T *>(kl), stream) : FASTVAE_CUDA_OK;
    });
}

int fastvae_cuda_sample_gauss_backward(int dtype, const void *d_z, const void *d_log_q, const void *d_log_p,
                                       const void *d_kl, int64_t kl_row, double kl_scale, const void *mu,
                                       int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                                       const uint64_t *seed, const void *eps, int64_t L, int64_t B, int64_t D,
                                       void *d_mu, void *d_logvar, void *, int64_t, void *stream) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Upstream<T> g{static_cast<const T *>(d_log_q), static_cast<const T *>(d_log_p),
                            static_cast<const T *>(d_kl), kl_row, kl_scale};
        const Distribution<In> x = distribution<In>(mu, mu_stride, logvar, logvar_stride, seed, L, B, D);
        const In *const upstream = static_cast<const In *>(d_z);
        const T *const noise = static_cast<const T *>(eps);
        In *const by_mu = static_cast<In *>(d_mu), *const by_logvar = static_cast<In *>(d_logvar);
        const bool wide = is_wide(x) && aligned(noise, D) && aligned(upstream, D) && aligned(by_mu, D) &&
                          aligned(by_logvar, D);
        return launch(wide ? sample_backward<In, true> : sample_backward<In, false>,
                      ceil_div(B * ceil_div(D, kDims<In>), kThreads), 1, kThreads, static_cast<Stream>(stream), x, noise,
                      upstream, g, by_mu, by_logvar);
    });
}
