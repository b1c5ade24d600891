// The rows' sums of agg_log_prob: streaming, in blocks of rows and ranges of columns, far tiles stopped early.
#pragma once

#include "early_exit.h"
#include "log_sum_exp.h"

namespace fastvae::FASTVAE_ISA {

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
    void run(int64_t begin, int64_t end, const Worker &worker) {
        const int64_t chunk = chunk_panels<T>(D_);
        for (int64_t i = 0; i < rows_; ++i) sums_[i] = {}, likely_[i] = kNaN<T>;
        for (int64_t i = 0; i < rows_; i += R) pack_rows(panels_, z_, first_ + i, S_, packed_ + i * D_);
        for (int64_t p = begin; p < end && !worker.stopped(); p += chunk)
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
    int64_t left_out() const { return left_out_; }  // dimensions of pairs

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
        const int64_t rows = S_ - first_ - i < R ? S_ - first_ - i : R;
        keep_overridden(weights_, first_ + i, rows, p, count, kept);
        for (int64_t q = 0; q < count; ++q) {
            const T reach = panels_.reach(p + q);
            if (kept[q] || !(reach < kInf<T>)) {
                square_sums_unless_far<T>(panels_, packed_ + i * D_, p + q, squares_ + live * W, count * W, nullptr);
            } else {
                for (int64_t r = 0; r < R; ++r) limits[r] = reach - floors[r];
                const int64_t stopped = square_sums_unless_far(panels_, packed_ + i * D_, p + q, squares_ + live * W,
                                                               count * W, limits);
                balance_.add(stopped);
                if (stopped) {
                    left_out_ += rows * panels_.columns(p + q) * (D_ - stopped);
                    continue;
                }
            }
            for (int64_t l = 0; l < W; l += L) store(live_cw_ + live * W + l, load(panels_.cw() + (p + q) * W + l));
            place[q] = live++;
        }
        if (live) add_terms(i, p, count, live, live_cw_, [&](int64_t k) { return place[k / W] * W + k % W; });
    }

    // Lower bounds of the rows' sums, less the margin; infinity for rows that are not there.
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
    int64_t left_out_ = 0;
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

    // Gives a status.
    [[nodiscard]] int run() {
        int64_t left_out = 0;
        const int status = parallel_for(grid_.blocks * grid_.ranges, threads_, [&](int64_t unit, const Worker &worker) {
            const int64_t first = unit / grid_.ranges * grid_.rows, range = unit % grid_.ranges;
            const int64_t rows = first + grid_.rows < S_ ? grid_.rows : S_ - first;
            RowSums<T> sums(panels_, weights_, z_, S_, first, round_up(rows, kTileRows), early_,
                            scratch_ + worker.number * scratch_size_);
            sums.run(panels_.count * range / grid_.ranges, panels_.count * (range + 1) / grid_.ranges, worker);
            for (int64_t i = 0; i < rows; ++i) parts_[range * S_ + first + i] = sums[i].total();
            for (int64_t i = 0; i < rows && range == 0; ++i) likely_[first + i] = sums.likely(i);
            __atomic_fetch_add(&saved_, sums.saved(), __ATOMIC_RELAXED);
            __atomic_fetch_add(&left_out, sums.left_out(), __ATOMIC_RELAXED);
        });
        if (status != FASTVAE_OK) return status;
        count_visits(S_ * panels_.N * panels_.D - left_out, S_ * panels_.N * panels_.D);
        for (int64_t range = 1; range < grid_.ranges; ++range)
            for (int64_t i = 0; i < S_; ++i) parts_[i].add(parts_[range * S_ + i]);
        return FASTVAE_OK;
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

}  // namespace fastvae::FASTVAE_ISA
