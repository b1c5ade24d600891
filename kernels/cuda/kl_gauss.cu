// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) and its gradients, each in one pass over the inputs. With
// x = logvar - prior_logvar and u = (mu - prior_mu) e^(-prior_logvar / 2): KL = ((e^x - 1 - x) + u^2) / 2.
//
// A block takes a range of rows, and each of its threads one column in some of them. Sums over rows become partials in
// float64, which a second kernel adds up in order, unless there was only one block.

#include "exponentials.h"
#include "ops.h"
#include "panels.h"

namespace fastvae::FASTVAE_ISA {

namespace {

template <class In> struct KlInputs {
    Rows<In> mu, logvar, prior_mu, prior_logvar;  // priors without data are 0
    int64_t B, D;
};

template <class T> struct Terms {
    T x, half_u, inverse_sigma;  // halves keep differences of finite numbers finite

    template <class In> FASTVAE_DEVICE Terms(const KlInputs<In> &in, int64_t b, int64_t d) {
        T half_x = T(0.5) * load(in.logvar(b) + d);
        half_u = T(0.5) * load(in.mu(b) + d);
        inverse_sigma = 1;
        if (in.prior_mu.data) half_u -= T(0.5) * load(in.prior_mu(b) + d);
        if (in.prior_logvar.data) {
            const T half_prior = T(0.5) * load(in.prior_logvar(b) + d);
            half_x -= half_prior;
            inverse_sigma = clip(exp_(-half_prior), T(0), largest<T>());
            half_u *= inverse_sigma;
        }
        x = half_x + half_x;
    }
    FASTVAE_DEVICE T kl() const { return fma_(T(2) * half_u, half_u, T(0.5) * exp_tail(x)); }
};

// How rows and columns are spread over a block's threads, and rows over blocks.
struct Spread {
    static constexpr int64_t kOfOneBlock = 16384, kOfManyBlocks = 2048, kMaxPartials = 1024;
    int64_t width, column_blocks;
    Parts rows;
    Spread(int64_t B, int64_t D, bool sums)
        : width(clamp_width(D)), column_blocks(D < 1 ? 1 : ceil_div(D, width)), rows(B, wanted(B, D, sums)) {}

private:
    static int64_t clamp_width(int64_t D) {
        int64_t width = 4;
        while (width < D && width < kThreads) width *= 2;
        return width;
    }
    static int64_t wanted(int64_t B, int64_t D, bool sums) {
        if (!sums) return B * D / kOfManyBlocks + 1;
        const int64_t parts = B * D / kOfOneBlock + 1;
        return parts < kMaxPartials ? parts : kMaxPartials;
    }
};

struct Place {  // a thread's column, and its first and last row and the step between
    int64_t d, first, last, step;
    FASTVAE_DEVICE Place(const Spread &spread, int64_t B)
        : d(blockIdx.y * spread.width + threadIdx.x % spread.width),
          first(blockIdx.x * spread.rows.size + threadIdx.x / spread.width),
          last((blockIdx.x + 1) * spread.rows.size < B ? (blockIdx.x + 1) * spread.rows.size : B),
          step(kThreads / spread.width) {}
};

// Adds up what the block's threads of one column have, or all of them, in a fixed order; valid in the first `width`
// threads, or in the first.
FASTVAE_DEVICE double sum_of_block(double x, int64_t width) {
    double(&sums)[kThreads] = shared_memory<double[kThreads]>();
    __syncthreads();
    sums[threadIdx.x] = x;
    for (int64_t half = kThreads / 2; half >= width; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[threadIdx.x];
}

// out [B, D], or for DIM partials [parts, D], for SUM [parts * column blocks]; where there is one, the result itself
template <class In>
__global__ void kl_of_block(KlInputs<In> in, Spread spread, int reduction, double scale, Accumulator<In> *out, double *partials) {
    using T = Accumulator<In>;
    const Place at(spread, in.B);
    double sum = 0;
    for (int64_t b = at.first; b < at.last && at.d < in.D; b += at.step) {
        const T kl = Terms<T>(in, b, at.d).kl();
        if (reduction == FASTVAE_NONE)
            out[b * in.D + at.d] = kl;
        else
            sum += kl;
    }
    if (reduction == FASTVAE_NONE) return;
    sum = sum_of_block(sum, reduction == FASTVAE_DIM ? spread.width : 1);
    const bool writes = reduction == FASTVAE_DIM ? threadIdx.x < spread.width && at.d < in.D : threadIdx.x == 0;
    if (!writes) return;
    const bool alone = gridDim.x * (reduction == FASTVAE_DIM ? 1 : gridDim.y) == 1;
    if (alone)
        out[reduction == FASTVAE_DIM ? at.d : 0] = T(scale * sum);
    else
        partials[reduction == FASTVAE_DIM ? blockIdx.x * in.D + at.d : blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

// out [B]; `lanes`, a power of 2 up to 32, take a row
template <class In> __global__ void kl_of_rows(KlInputs<In> in, int lanes, double scale, Accumulator<In> *out) {
    using T = Accumulator<In>;
    const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, b = thread / lanes;
    T sum = 0;
    for (int64_t d = thread % lanes; d < in.D && b < in.B; d += lanes) sum += Terms<T>(in, b, d).kl();
    for (int offset = lanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (thread % lanes == 0 && b < in.B) out[b] = T(scale * sum);
}

// out[k] = scale * sum_p partials[p, k]: a warp adds one up
template <class Out> __global__ void add_partials(const double *partials, int64_t parts, int64_t n, double scale, Out *out) {
    const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    double sum = 0;
    for (int64_t p = threadIdx.x % 32; p < parts && k < n; p += 32) sum += partials[p * n + k];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0 && k < n) store(out + k, Accumulator<Out>(scale * sum));
}

template <class In> struct KlGradients {  // [B, D] each, or null
    In *d_mu, *d_logvar, *d_prior_mu, *d_prior_logvar;
    double *prior_mu_partials, *prior_logvar_partials;  // [parts, D] of priors that are one row, or null
};

template <class In>
__global__ void kl_backward(KlInputs<In> in, Spread spread, const Accumulator<In> *grad, int64_t grad_row, int64_t grad_col,
                            double scale, KlGradients<In> out) {
    using T = Accumulator<In>;
    const Place at(spread, in.B);
    double prior_mu = 0, prior_logvar = 0;
    for (int64_t b = at.first; b < at.last && at.d < in.D; b += at.step) {
        const int64_t k = b * in.D + at.d;
        const T g = T(scale) * grad[b * grad_row + at.d * grad_col];
        const Terms<T> terms(in, b, at.d);
        const T by_mu = times(g, T(2) * terms.half_u * terms.inverse_sigma), half_growth = T(0.5) * expm1_(terms.x);
        const T by_prior_logvar = -times(g, fma_(T(2) * terms.half_u, terms.half_u, half_growth));
        if (out.d_mu) store(out.d_mu + k, by_mu);
        if (out.d_logvar) store(out.d_logvar + k, times(g, half_growth));
        if (out.d_prior_mu) store(out.d_prior_mu + k, -by_mu);
        if (out.d_prior_logvar) store(out.d_prior_logvar + k, by_prior_logvar);
        prior_mu -= by_mu;
        prior_logvar += by_prior_logvar;
    }
    for (int k = 0; k < 2; ++k) {
        double *const partials = k ? out.prior_logvar_partials : out.prior_mu_partials;
        if (!partials) continue;
        const double sum = sum_of_block(k ? prior_logvar : prior_mu, spread.width);
        if (threadIdx.x < spread.width && at.d < in.D) partials[blockIdx.x * in.D + at.d] = sum;
    }
}

template <class In> KlInputs<In> inputs(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride,
                                        const void *prior_mu, int64_t prior_mu_stride, const void *prior_logvar,
                                        int64_t prior_logvar_stride, int64_t B, int64_t D) {
    const auto rows = [](const void *data, int64_t stride) { return Rows<In>{static_cast<const In *>(data), stride}; };
    return {rows(mu, mu_stride), rows(logvar, logvar_stride), rows(prior_mu, prior_mu_stride),
            rows(prior_logvar, prior_logvar_stride), B, D};
}

}  // namespace

int64_t kl_gauss_workspace(int, int64_t B, int64_t D, bool backward) {
    const Spread spread(B, D, true);
    Arena counting(nullptr);
    counting.take<double>(spread.rows.count * (D < spread.column_blocks ? spread.column_blocks : D));
    if (backward) counting.take<double>(spread.rows.count * D);
    return counting.used();
}

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

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
        if (reduction == FASTVAE_SAMPLE) {
            int lanes = 1;
            while (lanes < 32 && lanes < D) lanes *= 2;
            return launch(kl_of_rows<In>, ceil_div(B * lanes, kThreads), 1, kThreads, stream, in, lanes, scale, out);
        }
        if (reduction != FASTVAE_NONE && workspace_size < kl_gauss_workspace(dtype, B, D, false))
            return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const Spread spread(B, D, reduction != FASTVAE_NONE);
        double *const partials = static_cast<double *>(workspace);
        FASTVAE_TRY(launch(kl_of_block<In>, spread.rows.count, spread.column_blocks, kThreads, stream, in, spread, reduction,
                           scale, out, partials));
        const bool dim = reduction == FASTVAE_DIM;
        const int64_t parts = spread.rows.count * (dim ? 1 : spread.column_blocks), n = dim ? D : 1;
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
        const Spread spread(B, D, sum_mu || sum_logvar);
        Arena arena(workspace);
        KlGradients<In> out{static_cast<In *>(d_mu), static_cast<In *>(d_logvar), static_cast<In *>(d_prior_mu),
                            static_cast<In *>(d_prior_logvar), nullptr, nullptr};
        if (sum_mu) out.d_prior_mu = nullptr, out.prior_mu_partials = arena.take<double>(spread.rows.count * D);
        if (sum_logvar) out.d_prior_logvar = nullptr, out.prior_logvar_partials = arena.take<double>(spread.rows.count * D);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        FASTVAE_TRY(launch(kl_backward<In>, spread.rows.count, spread.column_blocks, kThreads, stream, in, spread,
                           static_cast<const T *>(grad), grad_row, grad_col, scale, out));
        for (int k = 0; k < 2; ++k) {
            const double *const partials = k ? out.prior_logvar_partials : out.prior_mu_partials;
            In *const sum = static_cast<In *>(k ? d_prior_logvar : d_prior_mu);
            if (partials)
                FASTVAE_TRY(launch(add_partials<In>, ceil_div(D * 32, kThreads), 1, kThreads, stream, partials,
                                   spread.rows.count, D, 1.0, sum));
        }
        return FASTVAE_CUDA_OK;
    });
}
