// The gradients of z, mu and logvar from weights r_ij on the log-densities of the pairs. With t and a in units of kappa
// (panels.h):
//     d z_id      = -sum_j r_ij t a / kappa^2
//     d mu_jd     =  sum_i r_ij t a / kappa^2
//     d logvar_jd = (sum_i r_ij t^2 / kappa^2 - sum_i r_ij) / 2
// Where a number is extreme, the sum of r t^2 may overflow although the broadcast formula does not: it multiplies the
// sum of r (z - mu)^2 by 1 / sigma^2. Extreme panels therefore sum e = t / up, up = max(a, 1), and multiply sums by up.
// One pass makes them all: r of a tile of rows and a chunk of columns lies in the L1 cache while d runs, with columns
// in lanes. Sums are of two levels: within a block of rows and columns (rounds.h), and over blocks.
#pragma once

#include "rounds.h"
#include "tile.h"

namespace fastvae::FASTVAE_ISA {

// t, finite for finite inputs, so that 0 t is 0: panels that are not direct promise as much.
template <bool kDirect, class T> FASTVAE_INLINE Vec<T> finite_standardized(T z, Vec<T> a, Vec<T> b) {
    const Vec<T> t = standardized<kDirect>(z, a, b);
    if constexpr (!kDirect) return t;
    return max_<T>(splat(-kLargest<T>), min_<T>(splat(kLargest<T>), t));
}

// up = t / e where panels are extreme; elsewhere e is t
template <class T> FASTVAE_INLINE Vec<T> scale_up(Vec<T> a) { return max_<T>(splat(T(1)), a); }

// A tile's share over dimensions [0, D): r [6][W] with a stride, rows [D][6] and planes [D][2][W] as in square_sums;
// sums over rows, per column, of r e and r e^2 -> columns [D][2][W]; over columns, per lane, of r t a -> sums [D][6][L].
template <bool kDirect, bool kExtreme, bool kRows, bool kColumns, class T>
__attribute__((noinline)) void tile_gradient_sums(const T *r, int64_t stride, const T *rows, const T *planes,
                                                  int64_t D, T *columns, T *sums) {
    constexpr int V = kPanelVectors, R = kTileRows, L = kLanes<T>, W = kPanelWidth<T>;
    Vec<T> weight[R][V];
    IVec<T> any = {};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            weight[i][v] = load(r + i * stride + v * L);
            any |= (IVec<T>)weight[i][v];
        }
    if (!any_lane<T>(any << 1)) return;  // all 0, whatever the sign: far posteriors cost no more than their densities

    for (int64_t d = 0; d < D; ++d, rows += R, planes += 2 * W, columns += 2 * W, sums += R * L) {
        Vec<T> a[V], b[V], scale[V], re[V], ree[V];  // scale: of e, a / up
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            a[v] = load(planes + v * L);
            b[v] = load(planes + W + v * L);
            scale[v] = kExtreme ? min_<T>(splat(T(1)), a[v]) : a[v];
            if constexpr (kColumns) {
                re[v] = load(columns + v * L);
                ree[v] = load(columns + W + v * L);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            Vec<T> sum = {};
            if constexpr (kRows) sum = load(sums + i * L);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const Vec<T> e = finite_standardized<kDirect>(rows[i], scale[v], b[v]);
                const Vec<T> q = weight[i][v] * e;
                if constexpr (kColumns) {
                    re[v] += q;
                    ree[v] += kExtreme ? rounded<T>(q * e) : q * e;
                }
                if constexpr (kRows) sum += kExtreme ? q * a[v] * scale_up<T>(a[v]) : q * a[v];
            }
            if constexpr (kRows) store(sums + i * L, sum);
        }
        if constexpr (kColumns)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                store(columns + v * L, re[v]);
                store(columns + W + v * L, ree[v]);
            }
    }
}

template <class T> FASTVAE_INLINE void clear(T *x, int64_t n) { __builtin_memset(x, 0, uint64_t(n) * sizeof(T)); }

// to [n] += from [n], n a multiple of the lanes
template <class T> FASTVAE_INLINE void add(T *to, const T *from, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
}

// Rows [first, first + rows) of z against `count` panels from `panel` on.
struct Block {
    int64_t first, rows, panel, count;
};

template <class T> class Gradients {
    static constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    static constexpr int64_t kMinRows = 24, kMaxRows = 384, kSpan = 32;  // of a block; dimensions at a time

public:
    Gradients(const Panels<T> &panels, const T *z, int64_t S, bool want_rows, bool want_columns, int threads)
        : panels_(panels), z_(z), S_(S), D_(panels.D), want_rows_(want_rows), want_columns_(want_columns),
          threads_(threads), block_rows_(round_up(clamp(S / Rounds::kBlocks, kMinRows, kMaxRows), R)),
          block_panels_(clamp(chunk_panels<T>(D_), 1, panels.count)), tiles_((S + R - 1) / R),
          tile_size_(round_up(R * D_, L)), panel_size_(D_ * 2 * W),
          rounds_((S + block_rows_ - 1) / block_rows_, (panels.count + block_panels_ - 1) / block_panels_),
          row_size_(want_rows ? tiles_ * tile_size_ : 0), column_size_(want_columns ? panels.count * panel_size_ : 0),
          share_size_(panels.count * 2 * W), row_sums_(rounds_.row_copies() * row_size_),
          column_sums_(rounds_.column_copies() * column_size_), shares_(rounds_.column_copies() * share_size_),
          scratch_size_(tile_size_ + round_up(kSpan * R, L) * L + block_panels_ * (W * (R + 2) + panel_size_)),
          scratch_(scratch_size_ * threads) {}

    bool allocated() const { return row_sums_ && column_sums_ && shares_ && scratch_; }
    bool whole_rows() const { return rounds_.column_blocks == 1; }  // every tile holds all columns

    // weigh(tile, rows [D][6], r [6][columns of the tile], shares [columns / W][2][W]) for up to 6 rows: sets r, to 0 in
    // rows that are not there, and adds its sums over rows to shares, [0] where a pair's weight is the common one of its
    // column, [1] elsewhere; gives how many dimensions of pairs it left out. Gives a status.
    template <class F> [[nodiscard]] int run(const F &weigh) {
        clear<T>(row_sums_, rounds_.row_copies() * row_size_);
        clear<T>(column_sums_, rounds_.column_copies() * column_size_);
        clear<T>(shares_, rounds_.column_copies() * share_size_);
        return rounds_.run(threads_, [&](int64_t row_block, int64_t column_block, int64_t copy, const Worker &worker) {
            const int64_t first = row_block * block_rows_, panel = column_block * block_panels_;
            const Block block{first, S_ - first < block_rows_ ? S_ - first : block_rows_, panel,
                              panels_.count - panel < block_panels_ ? panels_.count - panel : block_panels_};
            const int64_t left_out = add_block(block, copy, scratch_ + worker.number * scratch_size_, weigh);
            __atomic_fetch_add(&left_out_, left_out, __ATOMIC_RELAXED);
        });
    }

    int64_t left_out() const { return left_out_; }  // dimensions of pairs, by weigh, in all

    // d_z [S, D], d_mu and d_logvar [N, D], d_log_w [N]; each may be null. Gives a status.
    [[nodiscard]] int write(T *d_z, T *d_mu, T *d_logvar, T *d_log_w) const {
        constexpr int64_t kUnit = 8;
        int status = FASTVAE_OK;
        if (d_z)
            status = parallel_for((tiles_ + kUnit - 1) / kUnit, threads_, [&](int64_t unit, const Worker &) {
                for (int64_t tile = unit * kUnit; tile < tiles_ && tile < (unit + 1) * kUnit; ++tile)
                    write_rows(tile, d_z);
            });
        if (status == FASTVAE_OK && (d_mu || d_logvar || d_log_w))
            status = parallel_for((panels_.count + kUnit - 1) / kUnit, threads_, [&](int64_t unit, const Worker &) {
                for (int64_t p = unit * kUnit; p < panels_.count && p < (unit + 1) * kUnit; ++p)
                    write_columns(p, d_mu, d_logvar, d_log_w);
            });
        return status;
    }

private:
    template <class F> int64_t add_block(const Block &block, int64_t copy, T *scratch, const F &weigh) const {
        T *rows = scratch, *lanes = rows + tile_size_;                 // [D][6], [kSpan][6][L]
        T *r = lanes + round_up(kSpan * R, L) * L;                     // [6][columns]
        T *shares = r + block_panels_ * W * R;                         // [count][2][W]
        T *column_sums = shares + block_panels_ * W * 2;               // [count][D][2][W]
        T *row_sums = row_sums_ + (rounds_.by_rows ? 0 : copy) * row_size_;  // [tiles][D][6]
        const int64_t column_copy = rounds_.by_rows ? copy : 0;
        int64_t left_out = 0;
        clear(shares, block.count * 2 * W);
        if (want_columns_) clear(column_sums, block.count * panel_size_);

        for (int64_t i = block.first; i < block.first + block.rows; i += R) {
            const Block tile{i, S_ - i < R ? S_ - i : R, block.panel, block.count};
            pack_rows(panels_, z_, i, S_, rows);
            left_out += weigh(tile, rows, r, shares);
            for (int64_t d = 0; d < D_; d += kSpan) {
                const int64_t span = D_ - d < kSpan ? D_ - d : kSpan;
                if (want_rows_) clear(lanes, round_up(span * R, L) * L);
                for (int64_t p = 0; p < block.count; ++p)
                    tile_gradients(r + p * W, block.count * W, rows + d * R,
                                   panels_.planes(block.panel + p) + d * 2 * W, span,
                                   column_sums + p * panel_size_ + d * 2 * W, lanes);
                if (want_rows_) add_lanes(row_sums + i / R * tile_size_ + d * R, lanes, span * R);
            }
        }
        if (want_columns_)
            add(column_sums_ + column_copy * column_size_ + block.panel * panel_size_, column_sums,
                block.count * panel_size_);
        add(shares_ + column_copy * share_size_ + block.panel * 2 * W, shares, block.count * 2 * W);
        return left_out;
    }

    void tile_gradients(const T *r, int64_t stride, const T *rows, const T *planes, int64_t span, T *columns,
                        T *lanes) const {
        const auto f = panels_.extreme  ? kernel<true, true>()
                       : panels_.direct ? kernel<true, false>()
                                        : kernel<false, false>();
        if (f) f(r, stride, rows, planes, span, columns, lanes);
    }
    template <bool kDirect, bool kExtreme> auto kernel() const {
        using F = decltype(&tile_gradient_sums<kDirect, kExtreme, true, true, T>);
        return want_rows_ && want_columns_ ? F(tile_gradient_sums<kDirect, kExtreme, true, true, T>)
               : want_rows_                ? F(tile_gradient_sums<kDirect, kExtreme, true, false, T>)
               : want_columns_             ? F(tile_gradient_sums<kDirect, kExtreme, false, true, T>)
                                           : F(nullptr);
    }

    // to [n] += the horizontal sums of lanes [n][L], both with room for n rounded up
    static void add_lanes(T *to, const T *lanes, int64_t n) {
        for (int64_t i = 0; i < n; i += L) {
            Vec<T> v[L];
            for (int64_t k = 0; k < L; ++k) v[k] = load(lanes + (i + k) * L);
            store(to + i, load(to + i) + sum_lanes_of_each<T>(v));
        }
    }

    void write_rows(int64_t tile, T *d_z) const {
        for (int64_t r = 0; r < R && tile * R + r < S_; ++r)
            for (int64_t d = 0; d < D_; ++d) {
                T sum = 0;
                for (int64_t k = 0; k < rounds_.row_copies(); ++k)
                    sum += row_sums_[k * row_size_ + tile * tile_size_ + d * R + r];
                d_z[(tile * R + r) * D_ + panels_.order()[d]] = T(-kInvKappa2) * sum;
            }
    }

    void write_columns(int64_t p, T *d_mu, T *d_logvar, T *d_log_w) const {
        const int64_t columns = panels_.columns(p);
        // the copies of [2][W] at an offset into those of a size, summed
        const auto total = [&](const T *x, int64_t size, int64_t at, Vec<T>(&sum)[2 * kPanelVectors]) {
            for (int v = 0; v < 2 * kPanelVectors; ++v) {
                sum[v] = load(x + at + v * L);
                for (int64_t k = 1; k < rounds_.column_copies(); ++k) sum[v] += load(x + k * size + at + v * L);
            }
        };
        Vec<T> share[2 * kPanelVectors], sums[2 * kPanelVectors];
        total(shares_, share_size_, p * 2 * W, share);
        if (d_log_w)
            for (int64_t l = 0; l < columns; ++l) d_log_w[p * W + l] = share[l / L][l % L];

        for (int64_t d = 0; d < D_ && want_columns_; ++d) {
            total(column_sums_, column_size_, p * panel_size_ + d * 2 * W, sums);
            T mu[W], logvar[W];
            for (int v = 0; v < kPanelVectors; ++v) {
                const Vec<T> a = load(panels_.planes(p) + d * 2 * W + v * L);
                const Vec<T> up = panels_.extreme ? scale_up<T>(a) : splat(T(1));
                store(mu + v * L, T(kInvKappa2) * sums[v] * up * a);
                store(logvar + v * L, T(kInvKappa2 / 2) * sums[kPanelVectors + v] * up * up -
                                          T(0.5) * (share[v] + share[kPanelVectors + v]));
            }
            const int64_t to = panels_.order()[d];
            for (int64_t l = 0; l < columns && d_mu; ++l) d_mu[(p * W + l) * D_ + to] = mu[l];
            for (int64_t l = 0; l < columns && d_logvar; ++l) d_logvar[(p * W + l) * D_ + to] = logvar[l];
        }
    }

    const Panels<T> &panels_;
    const T *z_;  // [S, D]
    const int64_t S_, D_;
    const bool want_rows_, want_columns_;
    const int threads_;
    const int64_t block_rows_, block_panels_, tiles_, tile_size_, panel_size_;
    const Rounds rounds_;
    const int64_t row_size_, column_size_, share_size_;  // of one copy
    Buffer<T> row_sums_;     // [copies][tiles][D][6]
    Buffer<T> column_sums_;  // [copies][panels][D][2][W]: of r e, of r e^2
    Buffer<T> shares_;       // [copies][panels][2][W]: of r, see run
    const int64_t scratch_size_;
    Buffer<T> scratch_;
    int64_t left_out_ = 0;
};

}  // namespace fastvae::FASTVAE_ISA
