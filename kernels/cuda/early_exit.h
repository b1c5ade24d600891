// Early exit: a tile stops at a chunk of dimensions by which every pair in it is known to be too far to show in the
// results. docs/beyond-brute-force.md derives the bounds; here a tile is the block's, of kPanel samples and columns.
//
// Squares only grow, so a pair's term is at most 2^(cw_j - squares so far), in bits. A tile stops when in all of its pairs
// these pass reach - floor_i: `reach` bounds what columns of the panel can be, `floor_i` is what the row's sum is known to
// be, less a margin. Everything here is of Packed::exit (panels.h); what is not finite gets no bound, so that it is seen.
#pragma once

#include "log_sum.h"
#include "panels.h"

namespace fastvae::FASTVAE_ISA {

// Columns may be left out that together come to no more than e^-18 (float) or e^-40 (double) of a sum.
template <class T> constexpr double kExitMargin = (sizeof(T) == 4 ? 18 : 40) * kLog2e;

// 2^-Q max(1, Q) <= 2^(kSteep - 15 Q / 16): by how much a pair's gradient, with t or t^2, can exceed its share.
constexpr double kSteep = 3.1;

template <class T> FASTVAE_DEVICE bool is_finite(T x) { return abs_(x) < infinity<T>(); }

// The column that a sample was drawn from, or where none is said for any sample, a guess: any column's term bounds the
// sum from below. -1: none.
template <class T> FASTVAE_DEVICE int64_t likely_column(const Weights<T> &weights, int64_t i) {
    if (!weights.own) return i % weights.N;
    return weights.own[i] >= 0 && weights.own[i] < weights.N ? weights.own[i] : -1;
}

// order [D]: the chunks of dimensions that tell columns apart first, by var(mu) / sigma^2, and in a chunk the other way
// round, as a sum rounds less that starts small. A thread finds a dimension's place.
template <class T> __global__ void order_dimensions(Packed<T> p) {
    const int64_t d = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (d >= p.D) return;
    const T *const spread = p.exit.spread;
    int64_t at = 0;
    for (int64_t k = 0; k < p.D; ++k) at += spread[k] > spread[d] || (spread[k] == spread[d] && k < d);
    const int64_t first = at - at % p.dims, last = (first + p.dims < p.D ? first + p.dims : p.D) - 1;
    p.exit.order[first + last - at] = int(d);
}

// likely [S]: the terms at the likely columns, -largest where that is no bound. A thread takes a sample.
template <class T> __global__ void likely_terms(Packed<T> p) {
    constexpr int W = kPanel<T>;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= p.S) return;
    const int64_t j = likely_column(p.weights, i);
    T term = -infinity<T>();
    if (j >= 0) {
        const T *const z = p.samples + i / W * p.D * W + i % W, *const planes = p.columns + j / W * p.D * 2 * W + j % W;
        const bool far = p.far_columns[j / W];
        T squares = 0;
        for (int64_t d = 0; d < p.D; ++d) {
            const T a = planes[d * 2 * W], b = planes[d * 2 * W + W], t = far ? (z[d * W] + b) * a : fma_(z[d * W], a, b);
            squares = fma_(t, t, squares);
        }
        const T bits = sizeof(T) == 4 ? squares : squares * T(0.5 * kLog2e);
        term = p.cw[j] - bits;
        p.weights.overrides(i, [&](int64_t k, T log2_w) {
            if (k == j) term = p.c[j] - bits + log2_w;
        });
    }
    p.exit.likely[i] = is_finite(term) ? term : -largest<T>();
}

// The bounds of a backward, once the rows' sums are known: floors of row i, of sum `total` and upstream gradient g.
template <class T> FASTVAE_DEVICE void set_floors(const Packed<T> &p, int64_t i, const LogSum &total, T g) {
    const double sum = total.shift + log2(total.sum), pull = log2(fabs(double(g)));
    p.exit.row_floor[i] = is_finite(sum) ? T(sum - (kExitMargin<T> + log2(double(p.N)))) : -largest<T>();
    const bool bounds = is_finite(sum) && pull < infinity<double>();
    p.exit.column_floor[i] = bounds ? T(sum - pull - (kExitMargin<T> + log2(double(p.S)))) : -largest<T>();
    p.exit.share[i] = bounds ? T(double(p.exit.likely[i]) - sum + pull) : -infinity<T>();
}

// row_reach and column_reach [panels]; the latter is how much larger a column's weighted density can be than the largest
// share that it is known to have. A block takes a panel of columns, which looks for its samples.
template <class T> __global__ void set_reaches(Packed<T> p) {
    constexpr int W = kPanel<T>, kGroups = kThreads / W;
    T(&shares)[kGroups][W] = shared_memory<T[kGroups][W]>();
    const int64_t panel = blockIdx.x;
    const int lane = int(threadIdx.x) % W, group = int(threadIdx.x) / W;
    const int64_t j = panel * W + lane;
    T share = -infinity<T>();
    for (int64_t q = 0; q < p.row_panels; ++q) {
        const int64_t first = q * W % p.N, low = p.weights.own ? p.own_low[q] : first + W <= p.N ? first : 0;
        const int64_t high = p.weights.own ? p.own_high[q] : first + W <= p.N ? first + W - 1 : p.N - 1;
        if (low >= (panel + 1) * W || high < panel * W) continue;
        for (int64_t i = q * W + group; i < (q + 1) * W && i < p.S; i += kGroups)
            if (likely_column(p.weights, i) == j) share = max_(share, p.exit.share[i]);
    }
    shares[group][lane] = share;
    __syncthreads();
    if (threadIdx.x) return;
    T least = infinity<T>(), reach = -infinity<T>();
    for (int64_t q = 0; q < p.column_panels; ++q) least = min_(least, p.exit.least_a[q]);
    for (int k = 0; k < W; ++k) {
        T strongest = -infinity<T>();
        for (int g = 0; g < kGroups; ++g) strongest = max_(strongest, shares[g][k]);
        const T more = p.cw[panel * W + k] - strongest;
        if (p.cw[panel * W + k] > -infinity<T>() && !(more <= reach)) reach = more;
    }
    p.exit.row_reach[panel] = p.exit.steep[panel] - log2(least);
    p.exit.column_reach[panel] = is_finite(p.exit.reach[panel]) ? reach : infinity<T>();
}

// Decides whether looking pays, by counting what it saved and cost, in chunks of a tile / 16: always while it does, and
// now and then to see if it does again. In the block's shared memory, where its first thread counts: a barrier is
// needed between start() or add() and look(), and the other way round.
class Balance {
public:
    FASTVAE_DEVICE void start() {
        if (threadIdx.x == 0) balance_ = passed_ = 0, look_ = 1;
    }
    FASTVAE_DEVICE bool look() const { return look_; }
    // A tile that was, if look(), looked at so many times.
    FASTVAE_DEVICE void add(int looks, int chunks_saved) {
        if (threadIdx.x) return;
        const int balance = balance_ + (look_ ? 16 * chunks_saved - looks : 0);
        balance_ = balance < -64 ? -64 : balance > 256 ? 256 : balance;
        look_ = balance_ >= 0 || ++passed_ % 16 == 0;
    }

private:
    int balance_, passed_, look_;
};

}  // namespace fastvae::FASTVAE_ISA
