// Early exit: a register tile stops at a dimension by which every pair in it is known to be too far to show in the
// results, before the other dimensions and the exponentials. docs/beyond-brute-force.md derives the bounds.
//
// Sums of squares only grow, so a pair's term is at most 2^(cw_j - squares so far). A tile stops when in all of its
// pairs these squares pass limit_i = reach - floor_i: `reach` bounds what columns of the panel can be, `floor_i` is what
// the row's sum is known to be, less a margin. All in bits.
#pragma once

#include "tile.h"

namespace fastvae {

// Adds a pass over pairs to what fastvae_take_visits gives (dispatch.cpp).
void count_visits(int64_t visited, int64_t all);

}  // namespace fastvae

namespace fastvae::FASTVAE_ISA {

// Columns may be left out that together come to no more than e^-18 (float) or e^-40 (double) of a sum.
template <class T> constexpr double kExitMargin = (sizeof(T) == 4 ? 18 : 40) * kLog2e;

constexpr int64_t kMinExitColumns = 1024;  // fewer are not worth a look

// Decides whether looking pays, by counting what it saved and what it cost in dimensions of a tile, not by time: so
// that the decision is the same in every run.
class Balance {
public:
    explicit Balance(int64_t D) : D_(D) {}

    // Whether to look at the next tiles: always while it pays, and now and then to see if it does again.
    bool look() { return balance_ >= 0 || ++passed_ % 16 == 0; }

    // A tile that was looked at stopped at dimension d, or not at all (0).
    void add(int64_t d) {
        const int64_t looks = ((d ? d : D_) + kExitStep - 1) / kExitStep;
        if (d) saved_ += D_ - d + kExponentials;
        balance_ = clamp(balance_ + (d ? D_ - d + kExponentials : 0) - looks, -4 * D_, 16 * D_);
    }
    int64_t saved() const { return saved_; }

    static constexpr int64_t kExponentials = 7;  // of a tile, in the time of so many dimensions

private:
    const int64_t D_;
    int64_t balance_ = 0, passed_ = 0, saved_ = 0;
};

// Sets kept[q] for those of the `count` panels from `panel` on that hold a column whose weight for a row is not the
// common one: the bound of the other columns does not hold for it.
template <class T>
void keep_overridden(const Weights<T> &weights, int64_t first, int64_t rows, int64_t panel, int64_t count, bool *kept) {
    __builtin_memset(kept, 0, uint64_t(count));
    for (int64_t i = first; i < first + rows; ++i)
        weights.overrides(i, [&](int64_t j, T) {
            const int64_t q = j / kPanelWidth<T> - panel;
            if (q >= 0 && q < count) kept[q] = true;
        });
}

// The column that a sample was drawn from; a guess where that is not said. Any column's term bounds the sum from below.
template <class T> int64_t likely_column(const Weights<T> &weights, int64_t i) {
    return weights.own && weights.own[i] >= 0 && weights.own[i] < weights.N ? weights.own[i] : i % weights.N;
}

// log2 of w_ij q(z_i | x_j) for rows first .. first + 5 and their likely columns -> terms [6]
template <class T>
void likely_terms(const Panels<T> &panels, const Weights<T> &weights, int64_t first, int64_t S, const T *rows,
                  T *squares, T *terms) {
    constexpr int64_t W = kPanelWidth<T>;
    int64_t there = -1;
    for (int64_t r = 0; r < kTileRows && first + r < S; ++r) {
        const int64_t j = likely_column(weights, first + r), p = j / W;
        if (p != there) square_sums(panels, rows, there = p, 1, squares);
        const T square = squares[r * W + j % W];
        terms[r] = panels.cw()[j] - square;
        weights.overrides(first + r, [&](int64_t k, T log2_w) {
            if (k == j) terms[r] = panels.c()[j] - square + log2_w;
        });
    }
}

// The bounds of a backward's tiles. Its margin is wider than a forward's: a pair pulls with |t| a on d_z and
// d_mu, and with t^2 on d_logvar. As t^2 <= Q = sum_d t^2 and 2^-Q max(1, Q) <= 2^(kSteep - 15 Q / 16), squares P > 16/15
// (L + kSteep) keep that below 2^-L.
template <class T> class GradientReach {
    static constexpr int64_t W = kPanelWidth<T>;
    static constexpr T kSteep = T(3.1);

public:
    GradientReach(int64_t S, int64_t panels)
        : row_floor_(S), column_floor_(S), row_reach_(panels), column_reach_(panels), strongest_(panels * W) {}
    bool allocated() const { return row_floor_ && column_floor_ && row_reach_ && column_reach_ && strongest_; }

    // likely [S]: the rows' terms at their likely columns; each of `rows` and `columns`: whether any of its gradients is
    // wanted.
    template <class Total>
    void set(const Panels<T> &panels, const Weights<T> &weights, const Total *totals, const T *likely, const T *g,
             int64_t S, bool rows, bool columns) {
        const T row_margin = T(kExitMargin<T> + std::log2(double(panels.N)));
        const T column_margin = T(kExitMargin<T> + std::log2(double(S)));
        const T least_a = panels.least_a();
        for (int64_t j = 0; j < panels.count * W; ++j) strongest_[j] = -kInf<T>;
        for (int64_t i = 0; i < S; ++i) {
            const double sum = totals[i].shift + std::log2(totals[i].sum), pull = std::log2(std::fabs(double(g[i])));
            row_floor_[i] = std::isfinite(sum) ? T(sum) - row_margin : -kInf<T>;
            column_floor_[i] = std::isfinite(sum) && pull < kInf<double> ? T(sum - pull) - column_margin : -kInf<T>;
            const T share = T(double(likely[i]) - sum + pull);  // of the row in its likely column
            T &strongest = strongest_[likely_column(weights, i)];
            if (share > strongest && share < kInf<T>) strongest = share;
        }
        for (int64_t p = 0; p < panels.count; ++p) {
            row_reach_[p] = rows ? panels.steep(p) - least_a : -kInf<T>;
            T reach = -kInf<T>;
            for (int64_t j = p * W; j < (p + 1) * W && columns; ++j)
                if (panels.cw()[j] > -kInf<T> && !(panels.cw()[j] - strongest_[j] <= reach))
                    reach = panels.cw()[j] - strongest_[j];
            column_reach_[p] = reach;
        }
    }

    // Whether panel p can be far from any row at all; if so, writes limits [6] of rows first .. first + rows - 1.
    FASTVAE_INLINE bool limits(int64_t p, int64_t first, int64_t rows, T *limits) const {
        const T row = row_reach_[p], column = column_reach_[p];
        if (!(row < kInf<T> && column < kInf<T>)) return false;
        for (int64_t r = 0; r < kTileRows; ++r) {
            const T by_row = row - row_floor_[first + (r < rows ? r : 0)];
            const T by_column = column - column_floor_[first + (r < rows ? r : 0)];
            limits[r] = T(16) / T(15) * ((by_row > by_column ? by_row : by_column) + kSteep);
        }
        return true;
    }

private:
    Buffer<T> row_floor_, column_floor_;  // [S]
    Buffer<T> row_reach_, column_reach_;  // [panels]
    Buffer<T> strongest_;                 // [columns] log2 of the largest known |r_ij| of the column
};

}  // namespace fastvae::FASTVAE_ISA
