// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) and its gradients, each in one pass over the inputs. With
// x = logvar - prior_logvar and u = (mu - prior_mu) e^(-prior_logvar / 2): KL = ((e^x - 1 - x) + u^2) / 2.
//
// A block takes a range of rows, and each of its threads a few columns next to each other in some of them (vectors.h).
// Sums over rows become partials (sums.h).

#include "exponentials.h"
#include "launch.h"
#include "sums.h"
#include "vectors.h"

namespace fastvae::FASTVAE_ISA {

namespace {

template <class In> struct KlInputs {
    Rows<In> mu, logvar, prior_mu, prior_logvar;  // priors without data are 0
    int64_t B, D;
};

template <class T> struct Terms {
    T x, half_difference, half_u, inverse_sigma;  // halves keep differences of finite numbers finite
    FASTVAE_DEVICE T kl() const { return fma_(T(2) * half_u, half_u, T(0.5) * exp_tail(x)); }
};

template <class In> constexpr int kColumns = Vector<In>::kSize;  // of a thread

// The terms of a row's columns from d on; 0 beyond the last one.
template <bool kWide, class In, class T = Accumulator<In>, int n = kColumns<In>>
FASTVAE_DEVICE void terms_of(const KlInputs<In> &in, int64_t b, int64_t d, Terms<T> (&terms)[n]) {
    const int there = there_are<kWide, n>(d, in.D);
    T mu[n], logvar[n], prior_mu[n] = {}, prior_logvar[n] = {};
    load<kWide>(in.mu(b) + d, there, mu);
    load<kWide>(in.logvar(b) + d, there, logvar);
    if (in.prior_mu.data) load<kWide>(in.prior_mu(b) + d, there, prior_mu);
    if (in.prior_logvar.data) load<kWide>(in.prior_logvar(b) + d, there, prior_logvar);
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e) {
        const T half_x = T(0.5) * logvar[e] - T(0.5) * prior_logvar[e];
        const T half_difference = T(0.5) * mu[e] - T(0.5) * prior_mu[e];
        terms[e] = {half_x + half_x, half_difference, half_difference, T(1)};
    }
    if (!in.prior_logvar.data) return;
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e) {
        terms[e].inverse_sigma = clip(exp_(T(-0.5) * prior_logvar[e]), T(0), largest<T>());
        terms[e].half_u *= terms[e].inverse_sigma;
    }
}

// How rows and columns, `each` of a thread, are divided among a block's threads and among blocks: those of the same rows
// follow each other, in x alone, as a grid's y is too short for a row of 2^26 columns.
struct Division {
    static constexpr int64_t kOfManyBlocks = 2048;
    int64_t width, column_blocks;
    Parts rows;
    Division(int64_t B, int64_t D, int each, bool sums)
        : width(clamp_width(D, each)), column_blocks(D < 1 ? 1 : ceil_div(D, width * each)),
          rows(B, sums ? partials_of(B * D) : B * D / kOfManyBlocks + 1) {}
    int64_t blocks() const { return rows.count * column_blocks; }

private:
    static int64_t clamp_width(int64_t D, int each) {
        int64_t width = 1;
        while (width * each < D && width < kThreads) width *= 2;
        return width;
    }
};

struct Place {  // which part of the rows; a thread's first column, and its first and last row and the step between
    int64_t part, d, first, last, step;
    FASTVAE_DEVICE Place(const Division &division, int each, int64_t B) : step(kThreads / division.width) {
        const unsigned columns = unsigned(division.column_blocks), of_rows = blockIdx.x / columns;
        part = of_rows;
        d = ((blockIdx.x - of_rows * columns) * division.width + threadIdx.x % division.width) * each;
        first = part * division.rows.size + threadIdx.x / division.width;
        last = (part + 1) * division.rows.size < B ? (part + 1) * division.rows.size : B;
    }
};

// out [B, D], or for DIM partials [parts, D], for SUM [parts * column blocks]; where there is one, the result itself
template <class In, bool kWide>
__global__ void kl_of_block(KlInputs<In> in, Division division, int reduction, double scale, Accumulator<In> *out,
                            double *partials) {
    using T = Accumulator<In>;
    constexpr int n = kColumns<In>;
    const Place at(division, n, in.B);
    const int there = there_are<kWide, n>(at.d, in.D);
    double sums[n] = {};
    for (int64_t b = at.first; b < at.last && at.d < in.D; b += at.step) {
        Terms<T> terms[n];
        terms_of<kWide>(in, b, at.d, terms);
        T kl[n];
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) sums[e] += kl[e] = terms[e].kl();
        if (reduction == FASTVAE_NONE) store<kWide>(out + b * in.D + at.d, there, kl);
    }
    if (reduction == FASTVAE_NONE) return;
    const bool dim = reduction == FASTVAE_DIM, alone = dim ? division.rows.count == 1 : gridDim.x == 1;
    FASTVAE_UNROLL
    for (int e = 1; e < n; ++e) sums[0] += dim ? 0.0 : sums[e];
    sum_of_block(sums, dim ? n : 1, dim ? division.width : 1);
    if (threadIdx.x >= (dim ? division.width : 1)) return;
    const int64_t k = dim ? at.d : 0, first = dim ? at.part * in.D : blockIdx.x;
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e) {
        if (e >= (dim ? there : 1)) continue;
        if (alone)
            out[k + e] = T(scale * sums[e]);
        else
            partials[first + k + e] = sums[e];
    }
}

// out [B]; `lanes`, a power of 2 up to 32, take a row
template <class In, bool kWide>
__global__ void kl_of_rows(KlInputs<In> in, int lanes, double scale, Accumulator<In> *out) {
    using T = Accumulator<In>;
    constexpr int n = kColumns<In>;
    const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, b = thread / lanes;
    T sum = 0;
    for (int64_t d = thread % lanes * n; d < in.D && b < in.B; d += lanes * n) {
        Terms<T> terms[n];
        terms_of<kWide>(in, b, d, terms);
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) sum += terms[e].kl();
    }
    for (int offset = lanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (thread % lanes == 0 && b < in.B) out[b] = T(scale * sum);
}

template <class In> struct KlGradients {  // [B, D] each, or null
    In *d_mu, *d_logvar, *d_prior_mu, *d_prior_logvar;
    double *prior_mu_partials, *prior_logvar_partials;  // [parts, D] of priors that are one row, or null
};

template <class In, bool kWide>
__global__ void kl_backward(KlInputs<In> in, Division division, const Accumulator<In> *grad, int64_t grad_row, int64_t grad_col,
                            double scale, KlGradients<In> out) {
    using T = Accumulator<In>;
    constexpr int n = kColumns<In>;
    const Place at(division, n, in.B);
    const int there = there_are<kWide, n>(at.d, in.D);
    double of_prior_mu[n] = {}, of_prior_logvar[n] = {};
    for (int64_t b = at.first; b < at.last && at.d < in.D; b += at.step) {
        const int64_t k = b * in.D + at.d;
        const T *const upstream = grad + b * grad_row + at.d * grad_col;
        T g[n], by_mu[n], by_logvar[n], by_prior_mu[n], by_prior_logvar[n];
        if (grad_col == 1)
            load<kWide>(upstream, there, g);
        else
            FASTVAE_UNROLL
            for (int e = 0; e < n; ++e) g[e] = e < there ? upstream[e * grad_col] : T(0);
        Terms<T> terms[n];
        terms_of<kWide>(in, b, at.d, terms);
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) {
            const T u = T(2) * terms[e].half_u, half_growth = T(0.5) * expm1_(terms[e].x);
            g[e] *= T(scale);
            // Factor by factor, so that what overflows is the product alone
            by_mu[e] = times(terms[e].half_difference, T(2) * (g[e] * terms[e].inverse_sigma) * terms[e].inverse_sigma);
            by_logvar[e] = times(g[e], half_growth);
            by_prior_mu[e] = -by_mu[e];
            by_prior_logvar[e] = -fma_(times(g[e], u), terms[e].half_u, by_logvar[e]);
            of_prior_mu[e] += by_prior_mu[e];
            of_prior_logvar[e] += by_prior_logvar[e];
        }
        if (out.d_mu) store<kWide>(out.d_mu + k, there, by_mu);
        if (out.d_logvar) store<kWide>(out.d_logvar + k, there, by_logvar);
        if (out.d_prior_mu) store<kWide>(out.d_prior_mu + k, there, by_prior_mu);
        if (out.d_prior_logvar) store<kWide>(out.d_prior_logvar + k, there, by_prior_logvar);
    }
    for (int k = 0; k < 2; ++k) {
        double *const partials = k ? out.prior_logvar_partials : out.prior_mu_partials;
        if (!partials) continue;
        double(&sums)[n] = k ? of_prior_logvar : of_prior_mu;
        sum_of_block(sums, n, division.width);
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e)
            if (threadIdx.x < division.width && e < there) partials[at.part * in.D + at.d + e] = sums[e];
    }
}

template <class In> KlInputs<In> inputs(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                                        const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                                        int64_t prior_logvar_stride, int64_t B, int64_t D) {
    const auto rows = [](const void *data, int64_t stride) { return Rows<In>{static_cast<const In *>(data), stride}; };
    return {rows(mu, mu_stride), rows(logvar, logvar_stride), rows(prior_mu, prior_mu_stride),
            rows(prior_logvar, prior_logvar_stride), B, D};
}

template <class In> bool is_wide(const KlInputs<In> &in) {
    return in.D % kColumns<In> == 0 && aligned(in.mu) && aligned(in.logvar) && aligned(in.prior_mu) &&
           aligned(in.prior_logvar);
}

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_kl_gauss_workspace(int dtype, int64_t B, int64_t D, int reduction, int backward) {
    return bytes_taken(dtype, [&](Arena &arena, auto one) {
        const Division division(B, D, kColumns<decltype(one)>, true);
        if (backward)
            arena.take<double>(division.rows.count * D), arena.take<double>(division.rows.count * D);
        else if (reduction >= FASTVAE_DIM && division.blocks() > 1)
            arena.take<double>(reduction == FASTVAE_DIM ? division.rows.count * D : division.blocks());
    });
}

int fastvae_cuda_kl_gauss(int dtype, const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                          const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                          int64_t prior_logvar_stride, int64_t B, int64_t D, int reduction, double scale, void *out_,
                          void *workspace, int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        T *const out = static_cast<T *>(out_);
        const KlInputs<In> in = inputs<In>(mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar,
                                           prior_logvar_stride, B, D);
        const bool wide = is_wide(in) && aligned(out, 0);
        if (reduction == FASTVAE_SAMPLE) {
            int lanes = 1;
            while (lanes < 32 && lanes * kColumns<In> < D) lanes *= 2;
            return launch(wide ? kl_of_rows<In, true> : kl_of_rows<In, false>, ceil_div(B * lanes, kThreads), 1, kThreads,
                          stream, in, lanes, scale, out);
        }
        const bool dim = reduction == FASTVAE_DIM;
        if (workspace_size < fastvae_cuda_kl_gauss_workspace(dtype, B, D, reduction, false))
            return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const Division division(B, D, kColumns<In>, reduction != FASTVAE_NONE);
        double *const partials = static_cast<double *>(workspace);
        FASTVAE_TRY(launch(wide ? kl_of_block<In, true> : kl_of_block<In, false>, division.blocks(), 1, kThreads, stream, in,
                           division, reduction, scale, out, partials));
        const int64_t parts = dim ? division.rows.count : division.blocks(), n = dim ? D : 1;
        if (reduction == FASTVAE_NONE || parts == 1) return FASTVAE_CUDA_OK;
        return launch(add_partials<T>, ceil_div(n * 32, kThreads), 1, kThreads, stream, partials, parts, n, scale, out);
    });
}

int fastvae_cuda_kl_gauss_backward(int dtype, const void *grad, int64_t grad_row, int64_t grad_col, double scale,
                                   const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                                   const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                                   int64_t prior_logvar_stride, int64_t B, int64_t D, void *d_mu, void *d_logvar,
                                   void *d_prior_mu, void *d_prior_logvar, void *workspace, int64_t workspace_size,
                                   void *stream_) {
    return with_dtype(dtype, [&](auto one) -> int {
        using In = decltype(one);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        const KlInputs<In> in = inputs<In>(mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar,
                                           prior_logvar_stride, B, D);
        const bool sum_mu = d_prior_mu && prior_mu_stride == 0, sum_logvar = d_prior_logvar && prior_logvar_stride == 0;
        const Division division(B, D, kColumns<In>, sum_mu || sum_logvar);
        Arena arena(workspace);
        KlGradients<In> out{static_cast<In *>(d_mu), static_cast<In *>(d_logvar), static_cast<In *>(d_prior_mu),
                            static_cast<In *>(d_prior_logvar), nullptr, nullptr};
        if (sum_mu) out.d_prior_mu = nullptr, out.prior_mu_partials = arena.take<double>(division.rows.count * D);
        if (sum_logvar) out.d_prior_logvar = nullptr, out.prior_logvar_partials = arena.take<double>(division.rows.count * D);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const T *const upstream = static_cast<const T *>(grad);
        const bool wide = is_wide(in) && (grad_col != 1 || aligned(upstream, grad_row)) && aligned(out.d_mu, D) &&
                          aligned(out.d_logvar, D) && aligned(out.d_prior_mu, D) && aligned(out.d_prior_logvar, D);
        FASTVAE_TRY(launch(wide ? kl_backward<In, true> : kl_backward<In, false>, division.blocks(), 1, kThreads, stream, in,
                           division, upstream, grad_row, grad_col, scale, out));
        for (int k = 0; k < 2; ++k) {
            const double *const partials = k ? out.prior_logvar_partials : out.prior_mu_partials;
            In *const sum = static_cast<In *>(k ? d_prior_logvar : d_prior_mu);
            if (partials)
                FASTVAE_TRY(launch(add_partials<In>, ceil_div(D * 32, kThreads), 1, kThreads, stream, partials,
                                   division.rows.count, D, 1.0, sum));
        }
        return FASTVAE_CUDA_OK;
    });
}
