// joint_i = log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

#include "early_exit.h"
#include "gradients.h"
#include "kernels.h"
#include "log_sum_exp.h"
#include "tile.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// How the forward divides its work, by the sizes alone: blocks of rows, and ranges of columns where the rows
// are too few to keep many threads busy.
struct ForwardGrid {
    static constexpr int64_t kUnits = 64, kMaxRows = 96, kMinColumns = 4096;
    int64_t rows, blocks, ranges;

    ForwardGrid(int64_t S, int64_t N) {
        ranges = clamp(kUnits * kMaxRows / (S + 1), 1, N / kMinColumns);
        const int64_t wanted = (kUnits + ranges - 1) / ranges;
        rows = round_up(clamp((S + wanted - 1) / wanted, 1, kMaxRows), kTileRows);
        blocks = (S + rows - 1) / rows;
    }
};

template <class T> int64_t forward_scratch(int64_t rows, int64_t D) {
    constexpr int64_t kSum = sizeof(LogSumExp<T>) / sizeof(T);
    return rows * kSum + (kTileRows + 1) * kMaxChunkColumns + round_up(rows, kLanes<T>) + round_up(rows * D, kLanes<T>);
}

// Rows [first, first + rows) of z against panels [begin, end).
template <class T> class RowSums {
    static constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    static constexpr int64_t kMaxPanels = kMaxChunkColumns / W;

public:
    RowSums(const Panels<T> &panels, const Weights<T> &weights, const T *z, int64_t S, int64_t first, int64_t rows,
            bool early, T *scratch)
        : panels_(panels), weights_(weights), z_(z), S_(S), D_(panels.D), first_(first), rows_(rows), early_(early),
          margin_(T(kExitMargin<T> + std::log2(double(panels.N)))), balance_(D_),
          sums_(reinterpret_cast<LogSumExp<T> *>(scratch)), squares_(reinterpret_cast<T *>(sums_ + rows)),
          live_cw_(squares_ + R * kMaxChunkColumns), likely_(live_cw_ + kMaxChunkColumns),
          packed_(likely_ + round_up(rows, L)) {}

    // A chunk of columns stays in the L2 cache while the rows go through it.
    void run(int64_t begin, int64_t end) {
        const int64_t chunk = chunk_panels<T>(D_);
        for (int64_t i = 0; i < rows_; ++i) sums_[i] = {}, likely_[i] = kNaN<T>;
        for (int64_t i = 0; i < rows_; i += R) pack_rows(panels_, z_, first_ + i, S_, packed_ + i * D_);
        for (int64_t p = begin; p < end; p += chunk)
            for (int64_t i = 0; i < rows_; i += R) {
                const int64_t count = p + chunk < end ? chunk : end - p;
                if (early_ && balance_.look())
                    add_unless_far(i, p, count);
                else
                    add(i, p, count);
            }
    }

    const LogSumExp<T> &operator[](int64_t i) const { return sums_[i]; }
    T likely(int64_t i) const { return likely_[i]; }
    int64_t saved() const { return balance_.saved(); }

private:
    void add(int64_t i, int64_t p, int64_t count) {
        square_sums(panels_, packed_ + i * D_, p, count, squares_);
        add_terms(i, p, count, count, panels_.cw() + p * W, [](int64_t k) { return k; });
    }

    // The squares of `live` of the panels lie side by side, with their cw; that of column k of the chunk at place(k).
    template <class F>
    FASTVAE_INLINE void add_terms(int64_t i, int64_t p, int64_t count, int64_t live, const T *cw, const F &place) {
        for (int64_t r = 0; r < R && first_ + i + r < S_; ++r) {
            T *const row = squares_ + r * count * W;
            Vec<T> replaced = splat(-kInf<T>);
            int n_replaced = 0;
            weights_.take_overrides(
                first_ + i + r, p * W, count * W, panels_.c(), row, [&](int64_t, T s) { replaced[n_replaced++] = s; },
                place);
            LogSumExp<T> &sum = sums_[i + r];
            if (n_replaced) sum.add(replaced);
            sum.add(live * W / L, [&](int64_t k) { return load(cw + k * L) - load(row + k * L); });
        }
    }

    void add_unless_far(int64_t i, int64_t p, int64_t count) {
        T floors[R], limits[R];
        find_floors(i, floors);
        bool kept[kMaxPanels];
        int64_t place[kMaxPanels], live = 0;
        keep_overridden(weights_, first_ + i, S_ - first_ - i < R ? S_ - first_ - i : R, p, count, kept);
        for (int64_t q = 0; q < count; ++q) {
            const T reach = panels_.reach(p + q);
            if (kept[q] || !(reach < kInf<T>)) {
                square_sums_unless_far<T>(panels_, packed_ + i * D_, p + q, squares_ + live * W, count * W, nullptr);
            } else {
                for (int64_t r = 0; r < R; ++r) limits[r] = reach - floors[r];
                const int64_t stopped = square_sums_unless_far(panels_, packed_ + i * D_, p + q, squares_ + live * W,
                                                               count * W, limits);
                balance_.add(stopped);
                if (stopped) continue;
            }
            for (int64_t l = 0; l < W; l += L) store(live_cw_ + live * W + l, load(panels_.cw() + (p + q) * W + l));
            place[q] = live++;
        }
        if (live) add_terms(i, p, count, live, live_cw_, [&](int64_t k) { return place[k / W] * W + k % W; });
    }

    // What the rows' sums are at the least, less the margin: infinity for rows that are not there.
    void find_floors(int64_t i, T *floors) {
        if (likely_[i] != likely_[i]) {
            likely_terms(panels_, weights_, first_ + i, S_, packed_ + i * D_, squares_, likely_ + i);
            for (int64_t r = 0; r < R && first_ + i + r < S_; ++r)
                if (!(likely_[i + r] > -kInf<T> && all_finite(z_ + (first_ + i + r) * D_, D_)))
                    likely_[i + r] = -kInf<T>;
        }
        for (int64_t r = 0; r < R; ++r) {
            const T known = likely_[i + r], max = sums_[i + r].max;
            floors[r] = first_ + i + r >= S_ ? kInf<T> : (max > known ? max : known) - margin_;
        }
    }

    const Panels<T> &panels_;
    const Weights<T> &weights_;
    const T *const z_;  // [S, D]
    const int64_t S_, D_, first_, rows_;
    const bool early_;
    const T margin_;
    Balance balance_;
    LogSumExp<T> *const sums_;  // [rows]
    T *const squares_;          // [6][columns of a chunk]
    T *const live_cw_;          // [columns of a chunk]
    T *const likely_;           // [rows] terms at likely columns; NaN where they are not known yet
    T *const packed_;           // [rows / 6][D][6]
};

// The sums of all rows, in blocks of rows and ranges of columns, which are put together in order.
template <class T> class Totals {
    using Total = typename LogSumExp<T>::Total;

public:
    Totals(const Panels<T> &panels, const Weights<T> &weights, const T *z, int64_t S, bool early, int threads)
        : panels_(panels), weights_(weights), z_(z), S_(S), early_(early), threads_(threads), grid_(S, panels.N),
          scratch_size_(forward_scratch<T>(grid_.rows, panels.D)), scratch_(scratch_size_ * threads),
          parts_(grid_.ranges * S), likely_(S) {}

    bool allocated() const { return scratch_ && parts_ && likely_; }
    const Total &operator[](int64_t i) const { return parts_[i]; }
    Total *data() const { return parts_; }

    void write(T *joint) const {
        for (int64_t i = 0; i < S_; ++i) joint[i] = T(parts_[i].log());
    }

    void run() {
        parallel_for(grid_.blocks * grid_.ranges, threads_, [&](int64_t unit, int worker) {
            const int64_t first = unit / grid_.ranges * grid_.rows, range = unit % grid_.ranges;
            const int64_t rows = first + grid_.rows < S_ ? grid_.rows : S_ - first;
            RowSums<T> sums(panels_, weights_, z_, S_, first, round_up(rows, kTileRows), early_,
                            scratch_ + worker * scratch_size_);
            sums.run(panels_.count * range / grid_.ranges, panels_.count * (range + 1) / grid_.ranges);
            for (int64_t i = 0; i < rows; ++i) parts_[range * S_ + first + i] = sums[i].total();
            for (int64_t i = 0; i < rows && range == 0; ++i) likely_[first + i] = sums.likely(i);
            __atomic_fetch_add(&saved_, sums.saved(), __ATOMIC_RELAXED);
        });
        for (int64_t range = 1; range < grid_.ranges; ++range)
            for (int64_t i = 0; i < S_; ++i) parts_[i].add(parts_[range * S_ + i]);
    }

    // Whether stopping early saved a share of the work worth looking for again.
    bool stopped_early() const {
        const int64_t tiles = (S_ + kTileRows - 1) / kTileRows * panels_.count;
        return saved_ > tiles * (panels_.D + Balance::kExponentials) / 10;
    }
    const T *likely() const { return likely_; }  // [S] see RowSums

private:
    const Panels<T> &panels_;
    const Weights<T> &weights_;
    const T *z_;  // [S, D]
    const int64_t S_;
    const bool early_;
    const int threads_;
    const ForwardGrid grid_;
    const int64_t scratch_size_;
    Buffer<T> scratch_;
    Buffer<Total> parts_;  // [ranges][S]
    Buffer<T> likely_;
    int64_t saved_ = 0;
};

// r_ij = g_i w_ij q(z_i | x_j) / sum_k w_ik q(z_i | x_k), 0 where that sum is empty. Where a tile is as wide as its
// rows it makes their sums too, of the same squares and exponentials.
template <class T> struct Responsibilities {
    using Total = typename LogSumExp<T>::Total;
    static constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    const Panels<T> &panels;
    const Weights<T> &weights;
    const T *d_joint;  // [S]
    Total *totals;     // [S]
    bool whole_rows;   // no totals yet
    const GradientReach<T> *reach;  // null: every tile is gone through

    // see Gradients::run
    void operator()(const Block &tile, const T *rows, T *r, T *shares) const {
        const int64_t columns = tile.count * W, first = tile.panel * W;
        const T *const cw = panels.cw() + first;
        struct {
            int64_t row, column;
            T r;
        } replaced[2 * R];
        int n_replaced = 0;

        bool far[kMaxChunkColumns / W] = {};
        if (reach)
            find_far(tile, rows, r, far);
        else
            square_sums(panels, rows, tile.panel, tile.count, r);
        __builtin_memset(r + tile.rows * columns, 0, uint64_t((R - tile.rows) * columns) * sizeof(T));
        for (int64_t i = 0; i < tile.rows; ++i) {
            T *const row = r + i * columns;
            Total &total = totals[tile.first + i];
            const auto term = [&](int64_t k) { return load(cw + k * L) - load(row + k * L); };
            const int before = n_replaced;
            Vec<T> terms = splat(-kInf<T>);
            weights.take_overrides(tile.first + i, first, columns, panels.c(), row, [&](int64_t j, T s) {
                terms[n_replaced - before] = s;
                replaced[n_replaced++] = {i, j, T(0)};
            });
            if (whole_rows) {
                LogSumExp<T> sum;
                if (n_replaced > before) sum.add(terms);
                sum.add(columns / L, term, [&](int64_t k, Vec<T> p) { store(row + k * L, p); });
                total = sum.total();
            }
            const Share<T> share(total, d_joint[tile.first + i]);
            for (int64_t q = 0; q < tile.count; ++q)
                for (int64_t k = q * W / L; k < (q + 1) * W / L && !far[q]; ++k)
                    store(row + k * L, whole_rows ? share.of(load(row + k * L)) : share(term(k)));
            for (int n = before; n < n_replaced; ++n) {
                replaced[n].r = share(splat(terms[n - before]))[0];
                row[replaced[n].column] = T(0);
            }
        }
        for (int64_t k = 0; k < columns; k += L) {
            T *const share = shares + k / W * 2 * W + k % W;
            const T *const x = r + k;
            const Vec<T> sum = ((load(x) + load(x + columns)) + (load(x + 2 * columns) + load(x + 3 * columns))) +
                               (load(x + 4 * columns) + load(x + 5 * columns));
            store(share, load(share) + sum);
        }
        for (int n = 0; n < n_replaced; ++n) {
            const auto [i, j, r_ij] = replaced[n];
            r[i * columns + j] = r_ij;
            shares[j / W * 2 * W + W + j % W] += r_ij;
        }
    }

    // Squares of the panels that are not far from all rows of the tile, and zeros, their r, of those that are.
    void find_far(const Block &tile, const T *rows, T *squares, bool *far) const {
        T limits[R];
        bool kept[kMaxChunkColumns / W];
        keep_overridden(weights, tile.first, tile.rows, tile.panel, tile.count, kept);
        for (int64_t q = 0; q < tile.count; ++q) {
            const bool can_be = !kept[q] && reach->limits(tile.panel + q, tile.first, tile.rows, limits);
            far[q] = square_sums_unless_far(panels, rows, tile.panel + q, squares + q * W, tile.count * W,
                                            can_be ? limits : nullptr) > 0;
            for (int64_t i = 0; i < R && far[q]; ++i) clear(squares + i * tile.count * W + q * W, W);
        }
    }
};

}  // namespace

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                 int64_t D, void *joint, int exact_skip, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    const bool early = exact_skip && N >= kMinExitColumns;
    Panels<T> panels(N, D);
    Totals<T> totals(panels, weights, static_cast<const T *>(z), S, early, threads);
    if (!panels.allocated() || !totals.allocated()) return FASTVAE_OUT_OF_MEMORY;

    if (early) panels.order_dimensions(static_cast<const T *>(mu), static_cast<const T *>(logvar));
    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); });
    totals.run();
    totals.write(static_cast<T *>(joint));
    return FASTVAE_OK;
}

template <class T>
int agg_log_prob_backward(const void *d_joint, const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                          int64_t S, int64_t N, int64_t D, void *joint, void *d_z, void *d_mu, void *d_logvar,
                          void *d_log_w, int exact_skip, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    const T *const samples = static_cast<const T *>(z), *const upstream = static_cast<const T *>(d_joint);
    const bool early = exact_skip && N >= kMinExitColumns;
    Panels<T> panels(N, D);
    Totals<T> totals(panels, weights, samples, S, early, threads);
    Gradients<T> gradients(panels, samples, S, d_z, d_mu || d_logvar, threads);
    GradientReach<T> reach(early ? S : 0, early ? panels.count : 0);
    if (!panels.allocated() || !totals.allocated() || !gradients.allocated() || !reach.allocated())
        return FASTVAE_OUT_OF_MEMORY;

    if (early) panels.order_dimensions(static_cast<const T *>(mu), static_cast<const T *>(logvar));
    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); }, !all_moderate(samples, S * D));
    const bool whole_rows = gradients.whole_rows();
    if (!whole_rows) totals.run();  // again, because the joint is these rounded
    // A column's pull on its own log_w leaves out the pairs that have another, so that the others have to be seen.
    const bool skip = early && totals.stopped_early() && !(d_log_w && weights.any_overrides());
    if (skip)
        reach.set(panels, weights, totals.data(), totals.likely(), upstream, S, d_z, d_mu || d_logvar || d_log_w);
    const Responsibilities<T> weigh{panels, weights, upstream, totals.data(), whole_rows, skip ? &reach : nullptr};
    if (!gradients.run(weigh)) return FASTVAE_OUT_OF_MEMORY;
    if (joint) totals.write(static_cast<T *>(joint));
    gradients.write(static_cast<T *>(d_z), static_cast<T *>(d_mu), static_cast<T *>(d_logvar),
                    static_cast<T *>(d_log_w));
    return FASTVAE_OK;
}

#define INSTANTIATE(T)                                                                                            \
    template int agg_log_prob<T>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t, int64_t,     \
                                 int64_t, void *, int, int);                                                      \
    template int agg_log_prob_backward<T>(const void *, const void *, const void *, const void *,                 \
                                          FASTVAE_WEIGHTS, int64_t, int64_t, int64_t, void *, void *, void *,     \
                                          void *, void *, int, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastvae::FASTVAE_ISA
