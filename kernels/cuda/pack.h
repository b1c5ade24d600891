// Packs samples and columns as panels.h says, and finds what bounds tiles that may stop early.
#pragma once

#include "early_exit.h"

namespace fastvae::FASTVAE_ISA {

// A finite double stays finite as a T.
template <class T> FASTVAE_DEVICE T to_finite(double x) {
    return T(abs_(x) == infinity<double>() ? x : clip(x, -double(largest<T>()), double(largest<T>())));
}

// centre [D]: the mean of up to 64 columns spread evenly, the largest and the smallest left out. Any will do that makes
// most offsets small. And spread [D], where asked for, of the same columns. A warp takes a dimension.
template <class In> __global__ void find_centre(Rows<In> mu, Rows<In> logvar, Packed<Accumulator<In>> p) {
    using T = Accumulator<In>;
    const int64_t d = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    const int lane = int(threadIdx.x) % 32, n = p.N < 64 ? int(p.N) : 64;
    if (d == 0 && lane == 0) *p.any_far_row = 0;
    T sum = 0, high = -largest<T>(), low = largest<T>(), squares = 0, sum_logvar = 0;
    const T some = n && d < p.D ? load(mu(0) + d) : T(0);
    for (int k = lane; k < n && d < p.D; k += 32) {
        const T x = load(mu(k * p.N / n) + d);
        if (p.early) squares += (x - some) * (x - some), sum_logvar += load(logvar(k * p.N / n) + d);
        sum += x;
        high = max_(high, x);
        low = min_(low, x);
    }
    for (int offset = 16; offset; offset /= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        high = max_(high, __shfl_xor_sync(~0u, high, offset));
        low = min_(low, __shfl_xor_sync(~0u, low, offset));
        squares += __shfl_xor_sync(~0u, squares, offset);
        sum_logvar += __shfl_xor_sync(~0u, sum_logvar, offset);
    }
    const T mean = n > 2 ? (sum - high - low) / T(n - 2) : sum / T(n);
    if (lane || d >= p.D) return;
    p.centre[d] = abs_(mean) < T(kModerate / 2) ? mean : T(0);
    if (!p.early) return;
    const double variance = double(squares) / n - (double(sum) / n - some) * (double(sum) / n - some);
    const double spread = variance > 0 ? log(variance) - double(sum_logvar) / n : -double(largest<T>());
    p.exit.spread[d] = spread == spread ? T(clip(spread, -double(largest<T>()), double(largest<T>()))) : T(0);
}

// a, rounded once; finite for finite inputs, so that 0 a is 0 and infinity a is infinity
template <class T> FASTVAE_DEVICE T inverse_sigma(double logvar) {
    constexpr double kSmallest = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022;
    const double a = exp(-0.5 * logvar) * kKappa<T>;
    return T(abs_(logvar) == infinity<double>() ? a : clip(a, kSmallest, double(largest<T>())));
}

template <class T> struct PackMemory {
    double sums[kThreads / kPanel<T>][kPanel<T>];
    T tops[kThreads / 32];
};

// The largest x of the block's threads, in all of them
template <class T> FASTVAE_DEVICE T largest_of_block(T x, T (&tops)[kThreads / 32]) {
    for (int offset = 16; offset; offset /= 2) x = max_(x, __shfl_xor_sync(~0u, x, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = x;
    __syncthreads();
    for (int k = 0; k < kThreads / 32; ++k) x = max_(x, tops[k]);
    return x;
}

template <class In> FASTVAE_DEVICE void pack_columns(int64_t panel, const Inputs<In> &in, const Packed<Accumulator<In>> &p) {
    using T = Accumulator<In>;
    constexpr int W = kPanel<T>, kGroups = kThreads / W;
    auto &[sums, tops] = shared_memory<PackMemory<T>>();
    const int lane = int(threadIdx.x) % W, group = int(threadIdx.x) / W;
    const int64_t j = panel * W + lane;
    const bool inside = j < p.N;
    T *const planes = p.columns + panel * p.D * 2 * W + lane;
    const double w = p.weights.log2_w(inside ? j : 0);

    double sum_logvar = 0;
    bool too_far = false, finite = true;
    T most_a = 0, least_a = infinity<T>();
    for (int64_t d = group; d < p.D; d += kGroups) {
        T a = 1, b = T(0x1p30);  // of no column: far from everything
        double c = 0;
        if (inside) {
            const int64_t from = p.dimension(d);
            const double logvar = load(in.logvar(j) + from);
            const T mu = load(in.mu(j) + from);
            a = inverse_sigma<T>(logvar);
            b = T((double(p.centre[from]) - double(mu)) * double(a));
            most_a = max_(a, most_a), least_a = min_(a, least_a);
            finite &= mu - mu == T(0) && logvar - logvar == 0;
            too_far |= !(abs_(b) <= T(kMaxOffset) && a <= T(kModerate));
            sum_logvar += logvar;
            c = -0.5 * kLog2e * (logvar + kLog2Pi);
        }
        planes[d * 2 * W] = a;
        planes[d * 2 * W + W] = b;
        if (!p.marginal_c) continue;
        const int64_t at = (panel * p.D + d) * W + lane;
        p.marginal_c[at] = to_finite<T>(c);
        p.marginal_cw[at] = inside ? to_finite<T>(c + w) : -infinity<T>();
    }
    sums[group][lane] = sum_logvar;
    const bool far = __syncthreads_or(too_far);
    for (int64_t d = group; far && inside && d < p.D; d += kGroups)
        planes[d * 2 * W + W] = p.centre[p.dimension(d)] - load(in.mu(j) + p.dimension(d));
    if (threadIdx.x == 0) p.far_columns[panel] = far;
    sum_logvar = 0;
    for (int g = 0; g < kGroups; ++g) sum_logvar += sums[g][lane];
    const double c = -0.5 * kLog2e * (sum_logvar + kLog2Pi * double(p.D));
    const T cw = inside ? to_finite<T>(c + w) : -infinity<T>();
    if (group == 0) p.c[j] = inside ? to_finite<T>(c) : T(0), p.cw[j] = cw;
    if (!p.early) return;
    const bool bounds = !__syncthreads_or(!(finite && cw < infinity<T>()));
    const T reach = largest_of_block(cw, tops), steep = largest_of_block(T(cw + log2(most_a)), tops);
    const T least = -largest_of_block(-least_a, tops);
    if (threadIdx.x) return;
    const T margin = T(kExitMargin<T> + log2(double(p.N)));
    p.exit.reach[panel] = bounds && reach > -infinity<T>() ? reach + margin : infinity<T>();
    p.exit.steep[panel] = bounds && reach > -infinity<T>() ? steep : infinity<T>();
    p.exit.least_a[panel] = least;
}

template <class In> FASTVAE_DEVICE void pack_samples(int64_t panel, const Inputs<In> &in, const Packed<Accumulator<In>> &p) {
    using T = Accumulator<In>;
    constexpr int W = kPanel<T>, kGroups = kThreads / W;
    const int lane = int(threadIdx.x) % W, group = int(threadIdx.x) / W;
    const int64_t i = panel * W + lane;
    bool too_far = false;
    for (int64_t d = group; d < p.D; d += kGroups) {
        const T x = i < p.S ? load(in.z(i) + p.dimension(d)) - p.centre[p.dimension(d)] : T(0);
        too_far |= !(abs_(x) <= T(kModerate / 2));
        p.samples[(panel * p.D + d) * W + lane] = x;
    }
    const bool far = __syncthreads_or(too_far);
    if (threadIdx.x == 0) p.far_rows[panel] = far;
    if (threadIdx.x == 0 && far) *p.any_far_row = 1;
    if (threadIdx.x >= 32) return;
    int64_t low = p.N, high = -1;
    for (int64_t k = panel * W + threadIdx.x; p.weights.own && k < p.S && k < panel * W + W; k += 32) {
        const int64_t own = p.weights.own[k];
        if (own < 0 || own >= p.N) continue;
        low = own < low ? own : low;
        high = own > high ? own : high;
    }
    for (int offset = 16; offset; offset /= 2) {
        const int64_t lower = __shfl_xor_sync(~0u, low, offset), higher = __shfl_xor_sync(~0u, high, offset);
        low = lower < low ? lower : low;
        high = higher > high ? higher : high;
    }
    if (threadIdx.x) return;
    p.own_low[panel] = low;
    p.own_high[panel] = high;
}

// A block for each panel of columns, then for each of samples
template <class In> __global__ void pack_panels(Inputs<In> in, Packed<Accumulator<In>> p) {
    if (blockIdx.x < p.column_panels)
        pack_columns(blockIdx.x, in, p);
    else
        pack_samples(blockIdx.x - p.column_panels, in, p);
}

template <class In> int pack(const Inputs<In> &in, const Packed<Accumulator<In>> &p, Stream stream) {
    using T = Accumulator<In>;
    FASTVAE_TRY(launch(find_centre<In>, ceil_div(p.D, kThreads / 32), 1, kThreads, stream, in.mu, in.logvar, p));
    if (p.early) FASTVAE_TRY(launch(order_dimensions<T>, ceil_div(p.D, kThreads), 1, kThreads, stream, p));
    FASTVAE_TRY(launch(pack_panels<In>, p.column_panels + p.row_panels, 1, kThreads, stream, in, p));
    return p.early ? launch(likely_terms<T>, ceil_div(p.S, kThreads), 1, kThreads, stream, p) : FASTVAE_CUDA_OK;
}

}  // namespace fastvae::FASTVAE_ISA
