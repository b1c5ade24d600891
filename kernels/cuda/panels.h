// The samples and the columns (posteriors) of the cross-evaluated kernels, packed once per call. kPanel samples or
// columns make a panel, [D][planes][kPanel], so that a chunk of dimensions is one piece of memory. A sample has one
// plane, z - centre. A column has two,
//     a = kappa exp(-logvar / 2),   b = -(mu - centre) a,
// so that t = (z - centre) a + b is one FMA, and the Gaussian's quadratic form in bits is a multiple of sum_d t^2:
//     log2 q(z_i | x_j) = c_j - log2(e) / (2 kappa^2) sum_d t_ijd^2.
// In float32, where a is rounded once from float64, kappa = sqrt(log2(e) / 2) and the multiple is 1. In float64, which
// nothing wider is at hand to round from, kappa is 1.
//
// b costs |b| eps / 2 of t, no more than a half-ulp change of the centred mu would. A panel of columns where some |b|
// passes kMaxOffset, or a number is extreme or not finite, is `far`: b is -(mu - centre), and t = (z - centre + b) a
// takes three operations and rounds as the broadcast formula does. A panel of samples is far where one is extreme or
// not finite; that matters to gradients, where 0 t must be 0.
#pragma once

#include "launch.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

constexpr int kThreads = 256, kLanes = 16;  // of a block; its threads are kLanes x kLanes
template <class T> constexpr int kSide = sizeof(T) == 4 ? 8 : 4;      // a thread has kSide x kSide pairs
template <class T> constexpr int kPanel = kLanes * kSide<T>;

constexpr double kMaxOffset = 128, kModerate = 0x1p60;  // a and z - centre within it cannot overflow together
template <class T> constexpr double kKappa = sizeof(T) == 4 ? 0.84932180028801904272 : 1;  // sqrt(log2(e) / 2)
template <class T> constexpr T kInvKappa2 = T(sizeof(T) == 4 ? 1.38629436111989061883 : 1);  // 2 ln 2

template <class T> struct Packed {
    int64_t S, N, D, row_panels, column_panels;
    T *centre;                 // [D], of the columns
    T *samples;                // [row panels][D][kPanel]
    T *columns;                // [column panels][D][2][kPanel]
    int *far_rows, *far_columns;  // [panels]
    T *c, *cw;                 // [N up to panels]: log2 normalizer, and with log2 w; cw is -inf where there is no column
    T *marginal_c, *marginal_cw;  // [column panels][D][kPanel], the same of each dimension alone; or null
    T *marginal_top;           // [D], no marginal's term is larger by much; or null
    int64_t *own_low, *own_high;  // [row panels]: the range of the own columns of a panel's samples
    Weights<T> weights;

    Packed(Arena &arena, int64_t S, int64_t N, int64_t D, bool marginals, const Weights<T> &weights)
        : S(S), N(N), D(D), row_panels(ceil_div(S, kPanel<T>)), column_panels(ceil_div(N, kPanel<T>)), weights(weights) {
        constexpr int W = kPanel<T>;
        centre = arena.take<T>(D);
        samples = arena.take<T>(row_panels * D * W);
        columns = arena.take<T>(column_panels * D * 2 * W);
        far_rows = arena.take<int>(row_panels);
        far_columns = arena.take<int>(column_panels);
        c = arena.take<T>(column_panels * W);
        cw = arena.take<T>(column_panels * W);
        marginal_c = marginals ? arena.take<T>(column_panels * D * W) : nullptr;
        marginal_cw = marginals ? arena.take<T>(column_panels * D * W) : nullptr;
        marginal_top = marginals ? arena.take<T>(D) : nullptr;
        own_low = arena.take<int64_t>(row_panels);
        own_high = arena.take<int64_t>(row_panels);
    }
};

template <class In> struct Rows {  // [n][D], a stride apart
    const In *data;
    int64_t stride;
    FASTVAE_DEVICE const In *operator()(int64_t i) const { return data + i * stride; }
};
template <class In> struct Inputs {
    Rows<In> z, mu, logvar;
    explicit Inputs(FASTVAE_CUDA_PAIRS)
        : z{static_cast<const In *>(z), z_stride}, mu{static_cast<const In *>(mu), mu_stride},
          logvar{static_cast<const In *>(logvar), logvar_stride} {}
};

// A finite double stays finite as a T.
template <class T> FASTVAE_DEVICE T to_finite(double x) {
    return T(abs_(x) == infinity<double>() ? x : clip(x, -double(largest<T>()), double(largest<T>())));
}

// centre [D]: the mean of up to 64 columns spread evenly, the largest and the smallest left out. Any will do that makes
// most offsets small. A warp takes a dimension.
template <class In> __global__ void find_centre(Rows<In> mu, Packed<Accumulator<In>> p) {
    using T = Accumulator<In>;
    const int64_t d = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    const int lane = int(threadIdx.x) % 32, n = p.N < 64 ? int(p.N) : 64;
    T sum = 0, high = -largest<T>(), low = largest<T>();
    for (int k = lane; k < n && d < p.D; k += 32) {
        const T x = load(mu(k * p.N / n) + d);
        sum += x;
        high = max_(high, x);
        low = min_(low, x);
    }
    for (int offset = 16; offset; offset /= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        high = max_(high, __shfl_xor_sync(~0u, high, offset));
        low = min_(low, __shfl_xor_sync(~0u, low, offset));
    }
    const T mean = n > 2 ? (sum - high - low) / T(n - 2) : sum / T(n);
    if (lane == 0 && d < p.D) p.centre[d] = abs_(mean) < T(kModerate / 2) ? mean : T(0);
}

// a, rounded once; finite for finite inputs, so that 0 a is 0 and infinity a is infinity
template <class T> FASTVAE_DEVICE T inverse_sigma(double logvar) {
    constexpr double kSmallest = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022;
    const double a = exp(-0.5 * logvar) * kKappa<T>;
    return T(abs_(logvar) == infinity<double>() ? a : clip(a, kSmallest, double(largest<T>())));
}

template <class In> FASTVAE_DEVICE void pack_columns(int64_t panel, const Inputs<In> &in, const Packed<Accumulator<In>> &p) {
    using T = Accumulator<In>;
    constexpr int W = kPanel<T>, kGroups = kThreads / W;
    double(&sums)[kGroups][W] = shared_memory<double[kGroups][W]>();
    const int lane = int(threadIdx.x) % W, group = int(threadIdx.x) / W;
    const int64_t j = panel * W + lane;
    const bool inside = j < p.N;
    T *const planes = p.columns + panel * p.D * 2 * W + lane;
    const double w = p.weights.log2_w(inside ? j : 0);

    double sum_logvar = 0;
    bool too_far = false;
    for (int64_t d = group; d < p.D; d += kGroups) {
        T a = 1, b = 0;
        double c = 0;
        if (inside) {
            const double logvar = load(in.logvar(j) + d);
            a = inverse_sigma<T>(logvar);
            b = (p.centre[d] - load(in.mu(j) + d)) * a;
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
        planes[d * 2 * W + W] = p.centre[d] - load(in.mu(j) + d);
    if (threadIdx.x == 0) p.far_columns[panel] = far;
    if (group) return;
    for (int g = 1; g < kGroups; ++g) sum_logvar += sums[g][lane];
    const double c = -0.5 * kLog2e * (sum_logvar + kLog2Pi * double(p.D));
    p.c[j] = inside ? to_finite<T>(c) : T(0);
    p.cw[j] = inside ? to_finite<T>(c + w) : -infinity<T>();
}

template <class In> FASTVAE_DEVICE void pack_samples(int64_t panel, const Inputs<In> &in, const Packed<Accumulator<In>> &p) {
    using T = Accumulator<In>;
    constexpr int W = kPanel<T>, kGroups = kThreads / W;
    const int lane = int(threadIdx.x) % W, group = int(threadIdx.x) / W;
    const int64_t i = panel * W + lane;
    bool too_far = false;
    for (int64_t d = group; d < p.D; d += kGroups) {
        const T x = i < p.S ? load(in.z(i) + d) - p.centre[d] : T(0);
        too_far |= !(abs_(x) <= T(kModerate / 2));
        p.samples[(panel * p.D + d) * W + lane] = x;
    }
    const bool far = __syncthreads_or(too_far);
    if (threadIdx.x == 0) p.far_rows[panel] = far;
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
    FASTVAE_TRY(launch(find_centre<In>, ceil_div(p.D, kThreads / 32), 1, kThreads, stream, in.mu, p));
    return launch(pack_panels<In>, p.column_panels + p.row_panels, 1, kThreads, stream, in, p);
}

}  // namespace fastvae::FASTVAE_ISA
