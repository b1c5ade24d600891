// The columns as the marginals see them, densities per dimension and weights per pair, and the sums over all of them
// for a tile of rows. Everything in bits.
//
// Columns enter relative to one density of that dimension and one weight, those nearest 0 in bits: then no column loses
// digits to another, however much larger, and one row's terms are moderate, so that no pass for the maximum is needed.
#pragma once

#include "log_sum_exp.h"
#include "tile.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct MarginalColumns {
    static constexpr int W = kPanelWidth<T>;
    Panels<T> panels;
    const Weights<T> &weights;
    Buffer<T> c;             // [panel][D][W] log normalizer less that of logvar `base`; padding: -inf
    Buffer<T> base;          // [D]
    Buffer<double> normal;   // [D] the log normalizer of `base`
    Buffer<double> highest;  // [D] of c + log_w
    Buffer<T> log_w;         // [count W] log weight less `reference`; padding: 0
    double reference;
    bool weighted;           // whether any of log_w is other than 0

    MarginalColumns(const Weights<T> &weights, int64_t N, int64_t D)
        : panels(N, D), weights(weights), c(panels.count * D * W), base(D), normal(D), highest(D),
          log_w(panels.count * W), least_(D) {}
    bool allocated() const { return panels.allocated() && c && base && normal && highest && log_w && least_; }

    // S: how many rows may have weights of their own. Gives a status.
    [[nodiscard]] int pack(const T *mu, const T *logvar, int64_t S, int threads, bool force_direct = false) {
        const int64_t N = panels.N, D = panels.D;
        const int status =
            panels.pack(mu, logvar, threads, [&](int64_t j) { return weights.log2_w(j); }, force_direct);
        if (status != FASTVAE_OK) return status;
        const double heaviest = pack_weights(S);

        find_range(logvar);
        for (int64_t d = 0; d < D; ++d) {
            const double least = least_[d], most = base[d];
            base[d] = T(nearest_0(least, most));
            normal[d] = -0.5 * kLog2e * (double(base[d]) + kLog2Pi);
            highest[d] = 0.5 * kLog2e * (double(base[d]) - least) + heaviest;
        }
        return panels.for_each(threads, [&](int64_t p) {
            for (int64_t l = 0; l < W; ++l)
                for (int64_t d = 0; d < D; ++d) {
                    const double less = double(base[d]) - double(logvar[(p * W + l < N ? p * W + l : 0) * D + d]);
                    // NaN of logvar -inf: inf - t^2 is none where FMA keeps t^2 finite
                    c[(p * D + d) * W + l] = p * W + l >= N ? -kInf<T> : less < kInf<T> ? T(0.5 * kLog2e * less) : kNaN<T>;
                }
        });
    }

private:
    static double nearest_0(double low, double high) {
        constexpr double kMost = double(kLargest<T>);
        return low > 0 ? (low < kMost ? low : kMost) : high < 0 ? (high > -kMost ? high : -kMost) : 0;
    }

    // The smallest logvar of each dimension, and the largest, in base
    void find_range(const T *logvar) {
        const int64_t N = panels.N, D = panels.D;
        for (int64_t d = 0; d < D; ++d) least_[d] = kInf<T>, base[d] = -kInf<T>;
        if (D == 1) {
            Vec<T> low = splat(kInf<T>), high = -low;
            for_each_vector<T>(N, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                low = min_<T>(load_some(logvar + j, n, kInf<T>), low);
                high = max_<T>(load_some(logvar + j, n, -kInf<T>), high);
            });
            least_[0] = -max_lanes<T>(-low), base[0] = max_lanes<T>(high);
        } else {
            for (int64_t j = 0; j < N; ++j)
                for (int64_t d = 0; d < D; ++d) {
                    const T x = logvar[j * D + d];
                    least_[d] = x < least_[d] ? x : least_[d];
                    base[d] = x > base[d] ? x : base[d];
                }
        }
    }

    // Gives the largest log_w that a pair may have.
    double pack_weights(int64_t S) {
        const int64_t N = panels.N;
        const double common = N ? weights.log2_w(0) : 0;
        double low = kInf<double>, high = -low;
        bool even = !weights.log_w && common - common == 0;  // whether the common weight can stand for all
        const auto see = [&](double log2_w) {
            if (!(log2_w - log2_w == 0)) return;
            const double less = __builtin_fabs(log2_w - common);
            even &= less <= kEven || less <= __builtin_fabs(log2_w);
            low = log2_w < low ? log2_w : low, high = log2_w > high ? log2_w : high;
        };
        for (int64_t j = 0; j < (weights.log_w ? N : 1); ++j) see(weights.log2_w(j));
        bool drawn = false;
        for (int64_t i = 0; i < S && weights.any_overrides() && !drawn; ++i)
            weights.overrides(i, [&](int64_t, T) { drawn = true; });
        if (drawn) see(weights.log2_w_own), see(weights.log2_w_next);
        weighted = !even;
        reference = even ? common : low <= high ? nearest_0(low, high) : 0;
        for (int64_t j = 0; j < panels.count * W; ++j)
            log_w[j] = weighted && j < N ? T(weights.log2_w(j) - reference) : T(0);
        return high - reference;
    }

    static constexpr double kEven = 16;  // bits that cost a float no digits worth mentioning
    Buffer<T> least_;                    // [D] the smallest logvar
};

// The pairs of a tile's rows whose weight is not the common one.
template <class T> struct Overrides {
    int count = 0, row[2 * kTileRows];
    int64_t column[2 * kTileRows];
    T log_w[2 * kTileRows];  // less the reference

    Overrides(const MarginalColumns<T> &columns, int64_t first, int64_t S) {
        for (int r = 0; r < kTileRows && first + r < S; ++r)
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
    const T *weights_of(const MarginalColumns<T> &columns, int64_t p, T *scratch, int64_t &stride) const {
        constexpr int W = kPanelWidth<T>;
        const T *common = columns.log_w + p * W;
        bool any = false;
        in_panel(p, [&](int, int, T) { any = true; });
        stride = 0;
        if (!any) return columns.weighted ? common : nullptr;
        for (int r = 0; r < kTileRows; ++r) std::memcpy(scratch + r * W, common, W * sizeof(T));
        in_panel(p, [&](int r, int lane, T w) { scratch[r * W + lane] = w; });
        stride = W;
        return scratch;
    }
};

// rows [D][6] against one panel: adds 2^(c + log_w - t^2) to sums [D][6][lanes]; for the joint, sums of t^2 -> squares;
// for the gradients, adds 2^(c + log_w - t^2 + offset).
// log_w: row r's at r * log_w_stride; offsets [D][6].
template <bool kDirect, bool kWeighted, bool kSquares, bool kOffset, class T>
__attribute__((noinline)) void add_densities(const T *rows, const T *planes, const T *c, const T *log_w,
                                             int64_t log_w_stride, const T *offsets, int64_t D, T *sums, T *squares,
                                             int64_t stride) {
    constexpr int V = kPanelVectors, L = kLanes<T>, W = kPanelWidth<T>, R = kTileRows;
    Vec<T> square[R][V] = {};
    for (int64_t d = 0; d < D; ++d, rows += R, offsets += kOffset ? R : 0, planes += 2 * W, c += W, sums += R * L)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec<T> sum = load(sums + r * L);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const Vec<T> t = standardized<kDirect>(rows[r], load(planes + v * L), load(planes + W + v * L));
                Vec<T> log_p = load(c + v * L);
                if (kWeighted) log_p += load(log_w + r * log_w_stride + v * L);
                if (kSquares) square[r][v] += t * t;
                log_p = minus_product<T>(log_p, t, t);
                sum += kOffset ? exp2_share<T>(log_p + offsets[r]) : exp2_term<T>(log_p);
            }
            store(sums + r * L, sum);
        }
#pragma GCC unroll 8
    for (int r = 0; r < R && kSquares; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(squares + r * stride + v * L, square[r][v]);
}

// As above where D is 1: rows [6] against `count` panels, with sums [6][lanes] that stay in registers.
template <bool kDirect, bool kWeighted, class T>
__attribute__((noinline)) void add_densities_of_one(const T *rows, const T *planes, const T *c, const T *log_w,
                                                    int64_t count, T *sums) {
    constexpr int V = kPanelVectors, L = kLanes<T>, W = kPanelWidth<T>, R = kTileRows;
    Vec<T> sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(sums + r * L);
    for (int64_t p = 0; p < count; ++p, planes += 2 * W, c += W, log_w += W)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const Vec<T> a = load(planes + v * L), b = load(planes + W + v * L);
            Vec<T> log_p = load(c + v * L);
            if (kWeighted) log_p += load(log_w + v * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec<T> t = standardized<kDirect>(rows[r], a, b);
                sum[r] += exp2_term<T>(minus_product<T>(log_p, t, t));
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(sums + r * L, sum[r]);
}

// One marginal, its terms relative to their true maximum, which is found first.
template <bool kDirect, class T>
LogSumExp<T> exact_marginal(const MarginalColumns<T> &columns, const Overrides<T> &overrides, int row, int64_t d, T z) {
    constexpr int L = kLanes<T>, W = kPanelWidth<T>;
    const Panels<T> &panels = columns.panels;
    LogSumExp<T> sum;
    for (int64_t p = 0; p < panels.count; ++p) {
        alignas(64) T scratch[kTileRows * W];
        int64_t stride;
        const T *log_w = overrides.weights_of(columns, p, scratch, stride);
        const T *plane = panels.planes(p) + d * 2 * W, *c = columns.c + (p * panels.D + d) * W;
        sum.add(W / L, [&](int64_t v) {
            const Vec<T> t = standardized<kDirect>(z, load(plane + v * L), load(plane + W + v * L));
            Vec<T> log_p = load(c + v * L);
            if (log_w) log_p += load(log_w + row * stride + v * L);
            return minus_product<T>(log_p, t, t);
        });
    }
    return sum;
}

// The sums over all columns for one tile of rows, in memory that one worker uses again and again.
template <class T> class TileSums {
public:
    static constexpr int W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;

    LogSumExp<T> joint[R];
    double *const marginals;  // [D][6]

    // The memory for one worker.
    static int64_t size(int64_t D) { return round_up(D * R, L) * L + R * (kMaxChunkColumns + W); }

    TileSums(const MarginalColumns<T> &columns, const Worker &worker, T *memory, double *marginals)
        : marginals(marginals), columns_(columns), panels_(columns.panels), worker_(worker), sums_(memory),
          squares_(sums_ + round_up(panels_.D * R, L) * L), log_w_(squares_ + R * kMaxChunkColumns) {}

    // Whether the call is given up. Sums are then of a part of the columns.
    bool stopped() const { return worker_.stopped(); }

    // The joint or not, and the marginals of all dimensions or none. rows: [D][6]
    template <bool kDirect>
    void add_up(int64_t first, int64_t S, const T *rows, const Overrides<T> &overrides, bool with_joint,
                bool with_marginals) {
        if (panels_.D == 1 && !with_joint && with_marginals && !overrides.count) return add_up_one<kDirect>(rows);
        const auto add = [&](int64_t p, const T *log_w, int64_t stride, T *squares, int64_t n) {
            if (!with_marginals)
                square_sums<kDirect>(rows, panels_.planes(p), panels_.D, squares, n);
            else if (with_joint)
                add_span<kDirect, true, false>(p, 0, panels_.D, rows, log_w, stride, nullptr, squares, n);
            else
                add_span<kDirect, false, false>(p, 0, panels_.D, rows, log_w, stride, nullptr, nullptr, 0);
        };
        add_panels(first, S, overrides, with_joint, add);
    }

    // The joint, and the marginals of the dimensions wanted, each term times 2^offset. offsets: [D][6]
    template <bool kDirect>
    void add_up(int64_t first, int64_t S, const T *rows, const Overrides<T> &overrides, const T *offsets,
                const bool *wanted) {
        add_panels(first, S, overrides, true, [&](int64_t p, const T *log_w, int64_t stride, T *squares, int64_t n) {
            square_sums<kDirect>(rows, panels_.planes(p), panels_.D, squares, n);  // as the gradients', to the last bit
            for (int64_t d = 0, end; d < panels_.D; d = end + 1) {
                for (end = d; end < panels_.D && wanted[end];) ++end;
                if (d < end) add_span<kDirect, false, true>(p, d, end - d, rows, log_w, stride, offsets, nullptr, 0);
            }
        });
    }

private:
    static constexpr int64_t kSpan = 4096;  // columns summed in T; their sums are added in double

    template <bool kDirect> void add_up_one(const T *rows) const {
        clear();
        for (int64_t p = 0, next = 0; p < panels_.count && !stopped(); p = next) {
            next = p + kSpan / W < panels_.count ? p + kSpan / W : panels_.count;
            (columns_.weighted ? add_densities_of_one<kDirect, true, T> : add_densities_of_one<kDirect, false, T>)(
                rows, panels_.planes(p), columns_.c + p * W, columns_.log_w + p * W, next - p, sums_);
            flush();
        }
    }

    // Dimensions [d, d + n) of one panel
    template <bool kDirect, bool kSquares, bool kOffset>
    void add_span(int64_t p, int64_t d, int64_t n, const T *rows, const T *log_w, int64_t log_w_stride,
                  const T *offsets, T *squares, int64_t stride) const {
        (log_w ? add_densities<kDirect, true, kSquares, kOffset, T>
               : add_densities<kDirect, false, kSquares, kOffset, T>)(
            rows + d * R, panels_.planes(p) + d * 2 * W, columns_.c + (p * panels_.D + d) * W, log_w, log_w_stride,
            kOffset ? offsets + d * R : nullptr, n, sums_ + d * R * L, squares, stride);
    }

    // add(panel, log weights, their stride, sums of squares, their stride) for every panel
    template <class F>
    void add_panels(int64_t first, int64_t S, const Overrides<T> &overrides, bool with_joint, const F &add) {
        const int64_t D = panels_.D, chunk = chunk_panels<T>(D);
        clear();
        for (int64_t p = 0, next = 0; p < panels_.count && !stopped(); p = next) {
            next = p + chunk < panels_.count ? p + chunk : panels_.count;
            const int64_t n = (next - p) * W;
            for (int64_t k = p; k < next; ++k) {
                int64_t stride;
                const T *log_w = overrides.weights_of(columns_, k, log_w_, stride);
                add(k, log_w, stride, squares_ + (k - p) * W, n);
            }
            for (int r = 0; r < R && first + r < S && with_joint; ++r)
                add_joint(joint[r], first + r, p, n, squares_ + r * n);
            if (next == panels_.count || next * W / kSpan > p * W / kSpan) flush();
        }
    }

    void add_joint(LogSumExp<T> &sum, int64_t i, int64_t p, int64_t n, T *squares) const {
        const T *cw = panels_.cw() + p * W;
        Vec<T> extra = splat(-kInf<T>);
        int extras = 0;
        columns_.weights.take_overrides(i, p * W, n, panels_.c(), squares, [&](int64_t, T s) { extra[extras++] = s; });
        sum.add(n / L, [&](int64_t k) { return load(cw + k * L) - load(squares + k * L); });
        if (extras) sum.add(extra);
    }

    void clear() const {
        for (int64_t k = 0; k < panels_.D * R; ++k) marginals[k] = 0;
        for (int64_t k = 0; k < round_up(panels_.D * R, L) * L; ++k) sums_[k] = T(0);
    }

    // sums [D][6][lanes] -> marginals, and from 0 again
    void flush() const {
        for (int64_t k = 0; k < panels_.D * R; k += L) {
            Vec<T> v[L];
            for (int i = 0; i < L; ++i) v[i] = load(sums_ + (k + i) * L), store(sums_ + (k + i) * L, Vec<T>{});
            T sum[L];
            store(sum, sum_lanes_of_each<T>(v));
            for (int64_t i = 0; i < L && k + i < panels_.D * R; ++i) marginals[k + i] += double(sum[i]);
        }
    }

    const MarginalColumns<T> &columns_;
    const Panels<T> &panels_;
    const Worker &worker_;
    T *const sums_, *const squares_, *const log_w_;  // [D][6][lanes], [6][columns of a chunk], [6][W]
};

}  // namespace fastvae::FASTVAE_ISA
