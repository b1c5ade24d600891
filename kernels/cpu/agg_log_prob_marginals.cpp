// joint_i = log sum_j w_ij prod_d q(z_id | x_j) and marginal_id = log sum_j w_ij q(z_id | x_j) in one pass, and
// their gradients, never forming [S, N].
//
// A marginal needs no pass for its maximum: columns enter relative to the largest density that any has in that
// dimension, and to the largest weight, so that no term passes 1 by much and one below 2^kMinExponent is lost. A sum
// that comes out so small that this could matter (a sample 10 sigma away from every column) is taken again, exactly.

#include "kernels.h"
#include "log_sum_exp.h"
#include "tile.h"

namespace fastvae::FASTVAE_ISA {

namespace {

constexpr int kRows = kTileRows;

// What the marginals know of the columns beyond what the joint does. Everything in bits.
template <class T> struct Columns {
    static constexpr int W = kPanelWidth<T>;
    Panels<T> panels;
    const Weights<T> &weights;
    Buffer<T> c;         // [panel][D][W] log normalizer less its maximum over columns, `top`; padding: -inf
    Buffer<double> top;  // [D]
    Buffer<T> least;     // [D] the smallest logvar, whose column has it
    Buffer<T> log_w;     // [count W] log weight less `reference`; padding: 0
    double reference;
    bool weighted;       // whether any of log_w is other than 0

    Columns(const Weights<T> &weights, int64_t N, int64_t D)
        : panels(N, D), weights(weights), c(panels.count * D * W), top(D), least(D), log_w(panels.count * W) {}
    bool allocated() const { return panels.allocated() && c && top && least && log_w; }

    void pack(const T *mu, const T *logvar, int threads) {
        const int64_t N = panels.N, D = panels.D;
        panels.pack(mu, logvar, threads, [&](int64_t j) { return weights.log2_w(j); });
        pack_weights();

        for (int64_t d = 0; d < D; ++d) least[d] = kInf<T>;
        for (int64_t j = 0; j < N; ++j)
            for (int64_t d = 0; d < D; ++d) least[d] = logvar[j * D + d] < least[d] ? logvar[j * D + d] : least[d];
        for (int64_t d = 0; d < D; ++d) top[d] = -0.5 * kLog2e * (double(least[d]) + kLog2Pi);
        parallel_for(panels.count, threads, [&](int64_t p, int) {
            for (int64_t l = 0; l < W; ++l)
                for (int64_t d = 0; d < D; ++d)
                    c[(p * D + d) * W + l] =
                        p * W + l < N ? (least[d] - logvar[(p * W + l) * D + d]) * T(0.5 * kLog2e) : -kInf<T>;
        });
    }

private:
    void pack_weights() {
        const int64_t N = panels.N;
        double largest = -kInf<double>;
        const auto see = [&](double log2_w) { largest = log2_w > largest && log2_w < kInf<double> ? log2_w : largest; };
        for (int64_t j = 0; j < (weights.log_w ? N : 1); ++j) see(weights.log2_w(j));
        const double common = N ? weights.log2_w(0) : 0;
        if (weights.own) see(weights.log_w_own * kLog2e), see(weights.log_w_next * kLog2e);
        // One weight for all but the overrides is divided out, unless far below those.
        weighted = weights.log_w || !(largest - common < 60);
        reference = !weighted ? common : largest > -kInf<double> ? largest : 0;
        for (int64_t j = 0; j < panels.count * W; ++j)
            log_w[j] = weighted && j < N ? T(weights.log2_w(j) - reference) : T(0);
    }
};

// The pairs of a tile's rows whose weight is not the common one.
template <class T> struct Overrides {
    int count = 0, row[2 * kRows];
    int64_t column[2 * kRows];
    T log_w[2 * kRows];  // less the reference

    Overrides(const Columns<T> &columns, int64_t first, int64_t S) {
        for (int r = 0; r < kRows && first + r < S; ++r)
            columns.weights.overrides(first + r, [&](int64_t j, T log2_w) {
                row[count] = r, column[count] = j, log_w[count++] = T(double(log2_w) - columns.reference);
            });
    }
    // f(row, lane, log weight) for those in panel p
    template <class F> FASTVAE_INLINE void in_panel(int64_t p, const F &f) const {
        for (int k = 0; k < count; ++k)
            if (column[k] / kPanelWidth<T> == p) f(row[k], int(column[k] % kPanelWidth<T>), log_w[k]);
    }
    // The log weights of panel p: row r's at pointer + r * stride. Null where they are all 0.
    const T *weights_of(const Columns<T> &columns, int64_t p, T *scratch, int64_t &stride) const {
        constexpr int W = kPanelWidth<T>;
        const T *common = columns.log_w + p * W;
        bool any = false;
        in_panel(p, [&](int, int, T) { any = true; });
        stride = 0;
        if (!any) return columns.weighted ? common : nullptr;
        for (int r = 0; r < kRows; ++r) std::memcpy(scratch + r * W, common, W * sizeof(T));
        in_panel(p, [&](int r, int lane, T w) { scratch[r * W + lane] = w; });
        stride = W;
        return scratch;
    }
};

// rows [D][6] against one panel: adds the densities to sums [D][6][lanes], the sums of squares go to `squares`.
template <bool kDirect, bool kWeighted, class T>
__attribute__((noinline)) void add_densities(const T *rows, const T *planes, const T *c, const T *log_w,
                                             int64_t log_w_stride, int64_t D, T *sums, T *squares, int64_t stride) {
    constexpr int V = kPanelVectors, L = kLanes<T>, W = kPanelWidth<T>;
    Vec<T> square[kRows][V] = {};
    for (int64_t d = 0; d < D; ++d, rows += kRows, planes += 2 * W, c += W, sums += kRows * L)
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            Vec<T> sum = load(sums + r * L);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const Vec<T> t = standardized<kDirect>(rows[r], load(planes + v * L), load(planes + W + v * L));
                Vec<T> log_p = load(c + v * L);
                if (kWeighted) log_p += load(log_w + r * log_w_stride + v * L);
                square[r][v] += t * t;
                sum += exp2_term<T>(log_p - t * t);
            }
            store(sums + r * L, sum);
        }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(squares + r * stride + v * L, square[r][v]);
}

template <class T> struct Forward {
    static constexpr int W = kPanelWidth<T>, L = kLanes<T>;
    static constexpr int64_t kSpan = 4096;  // columns summed in T; their sums are added in double
    static constexpr double kLost = sizeof(T) == 4 ? 0x1p-96 : 0x1p-960, kHuge = 0x1p100;

    const T *z;  // [S, D]
    int64_t S;
    const Columns<T> &columns;
    T *joint, *marginals;

    static int64_t scratch(int64_t D) { return kRows * (2 * D + (D + L) * L + kMaxChunkColumns + W); }

    template <bool kDirect> void tile(int64_t first, T *scratch, double *totals) const {
        const Panels<T> &panels = columns.panels;
        const int64_t D = panels.D, chunk = chunk_panels<T>(D);
        T *rows = scratch, *sums = rows + round_up(kRows * D, L), *squares = sums + kRows * round_up(D, L) * L;
        T *row_weights = squares + kRows * kMaxChunkColumns;
        const Overrides<T> overrides(columns, first, S);
        LogSumExp<T> joints[kRows];
        pack_rows(z, first, S, D, panels.centre(), rows);
        for (int64_t k = 0; k < kRows * D; ++k) totals[k] = 0;
        for (int64_t k = 0; k < kRows * round_up(D, L) * L; ++k) sums[k] = T(0);

        for (int64_t p = 0, next = 0; p < panels.count; p = next) {
            next = p + chunk < panels.count ? p + chunk : panels.count;
            const int64_t n = (next - p) * W;
            for (int64_t k = p; k < next; ++k) {
                int64_t stride;
                const T *log_w = overrides.weights_of(columns, k, row_weights, stride);
                (log_w ? add_densities<kDirect, true, T> : add_densities<kDirect, false, T>)(
                    rows, panels.planes(k), columns.c + k * D * W, log_w, stride, D, sums, squares + (k - p) * W, n);
            }
            for (int r = 0; r < kRows && first + r < S; ++r) add_joint(joints[r], first + r, p, n, squares + r * n);
            if (next == panels.count || next * W / kSpan > p * W / kSpan) flush(sums, totals);
        }

        for (int64_t r = 0; r < kRows && first + r < S; ++r) {
            if (joint) joint[first + r] = T(joints[r].log());
            if (!marginals) continue;
            T *out = marginals + (first + r) * D;
            for (int64_t d = 0; d < D; ++d) out[d] = T(totals[d * kRows + r]);
            for_each_vector<T>(D, [&](int64_t d, int64_t m) __attribute__((always_inline)) {
                store_some(out + d, log_<T>(load_some(out + d, m)), m);
            });
            for (int64_t d = 0; d < D; ++d) {
                const double sum = totals[d * kRows + r];
                const bool lost = sum <= kLost * double(panels.N) || sum >= kHuge;
                out[d] = T((lost ? exactly<kDirect>(overrides, int(r), d, rows[d * kRows + r]) : double(out[d])) +
                           (columns.top[d] + columns.reference) * kLn2);
            }
        }
    }

private:
    void add_joint(LogSumExp<T> &sum, int64_t i, int64_t p, int64_t n, T *squares) const {
        const T *cw = columns.panels.cw() + p * W;
        Vec<T> extra = splat(-kInf<T>);
        int extras = 0;
        columns.weights.take_overrides(i, p * W, n, columns.panels.c(), squares,
                                       [&](int64_t, T s) { extra[extras++] = s; });
        sum.add(n / L, [&](int64_t k) { return load(cw + k * L) - load(squares + k * L); });
        if (extras) sum.add(extra);
    }

    // sums [D][6][lanes] -> totals [D][6], and from 0 again
    void flush(T *sums, double *totals) const {
        for (int64_t k = 0; k < kRows * panels_d(); k += L) {
            Vec<T> v[L];
            for (int i = 0; i < L; ++i) v[i] = load(sums + (k + i) * L), store(sums + (k + i) * L, Vec<T>{});
            T sum[L];
            store(sum, sum_lanes_of_each<T>(v));
            for (int64_t i = 0; i < L && k + i < kRows * panels_d(); ++i) totals[k + i] += double(sum[i]);
        }
    }
    int64_t panels_d() const { return columns.panels.D; }

    // log of the same sum with its true maximum
    template <bool kDirect> double exactly(const Overrides<T> &overrides, int row, int64_t d, T z) const {
        const Panels<T> &panels = columns.panels;
        LogSumExp<T> sum;
        for (int64_t p = 0; p < panels.count; ++p) {
            T scratch[kRows * W];
            int64_t stride;
            const T *log_w = overrides.weights_of(columns, p, scratch, stride);
            const T *plane = panels.planes(p) + d * 2 * W, *c = columns.c + (p * panels.D + d) * W;
            sum.add(W / L, [&](int64_t v) {
                const Vec<T> t = standardized<kDirect>(z, load(plane + v * L), load(plane + W + v * L));
                return (load(c + v * L) + (log_w ? load(log_w + row * stride + v * L) : Vec<T>{})) - t * t;
            });
        }
        return sum.log();
    }
};

}  // namespace

template <class T>
int agg_log_prob_marginals(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                           int64_t D, void *joint, void *marginals, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    Columns<T> columns(weights, N, D);
    const int64_t scratch_size = Forward<T>::scratch(D);
    Buffer<T> scratch(scratch_size * threads);
    Buffer<double> totals(kRows * D * threads);
    if (!columns.allocated() || !scratch || !totals) return FASTVAE_OUT_OF_MEMORY;

    columns.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads);
    const Forward<T> forward{static_cast<const T *>(z), S, columns, static_cast<T *>(joint),
                             static_cast<T *>(marginals)};
    parallel_for((S + kRows - 1) / kRows, threads, [&](int64_t unit, int worker) {
        T *const mine = scratch + worker * scratch_size;
        double *const mine_totals = totals + worker * kRows * D;
        if (columns.panels.direct)
            forward.template tile<true>(unit * kRows, mine, mine_totals);
        else
            forward.template tile<false>(unit * kRows, mine, mine_totals);
    });
    return FASTVAE_OK;
}

#define INSTANTIATE(T)                                                                                              \
    template int agg_log_prob_marginals<T>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t,      \
                                           int64_t, int64_t, void *, void *, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastvae::FASTVAE_ISA
