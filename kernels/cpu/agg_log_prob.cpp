// joint_i = log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

#include "gradients.h"
#include "kernels.h"
#include "totals.h"

namespace fastvae::FASTVAE_ISA {

namespace {

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
    int64_t operator()(const Block &tile, const T *rows, T *r, T *shares) const {
        const int64_t columns = tile.count * W, first = tile.panel * W;
        const T *const cw = panels.cw() + first;
        struct {
            int64_t row, column;
            T r;
        } replaced[2 * R];
        int n_replaced = 0;

        int64_t left_out = 0;
        bool far[kMaxChunkColumns / W] = {};
        if (reach)
            left_out = find_far(tile, rows, r, far);
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
        return left_out;
    }

    // Squares of the panels that are not far from all rows of the tile, and zeros, their r, of those that are. Gives how
    // many dimensions of pairs it left out.
    int64_t find_far(const Block &tile, const T *rows, T *squares, bool *far) const {
        int64_t left_out = 0;
        T limits[R];
        bool kept[kMaxChunkColumns / W];
        keep_overridden(weights, tile.first, tile.rows, tile.panel, tile.count, kept);
        for (int64_t q = 0; q < tile.count; ++q) {
            const bool can_be = !kept[q] && reach->limits(tile.panel + q, tile.first, tile.rows, limits);
            const int64_t stopped = square_sums_unless_far(panels, rows, tile.panel + q, squares + q * W, tile.count * W,
                                                           can_be ? limits : nullptr);
            if (!(far[q] = stopped > 0)) continue;
            left_out += tile.rows * panels.columns(tile.panel + q) * (panels.D - stopped);
            for (int64_t i = 0; i < R; ++i) clear(squares + i * tile.count * W + q * W, W);
        }
        return left_out;
    }
};

}  // namespace

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                 int64_t D, void *joint, int exact_skip, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
    // In one dimension the joint is a marginal, whose sum needs no pass for its maximum; with few rows, threads divide
    // columns.
    if (D == 1 && S >= ForwardGrid::kMaxRows) {
        count_visits(S * N, S * N);
        return agg_log_prob_marginals<T>(z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D, nullptr,
                                         joint, threads);
    }
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    const bool early = exact_skip && N >= kMinExitColumns;
    Panels<T> panels(N, D);
    Totals<T> totals(panels, weights, static_cast<const T *>(z), S, early, threads);
    if (!panels.allocated() || !totals.allocated()) return FASTVAE_OUT_OF_MEMORY;

    if (early) panels.order_dimensions(static_cast<const T *>(mu), static_cast<const T *>(logvar));
    int status = panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                             [&](int64_t j) { return weights.log2_w(j); });
    if (status == FASTVAE_OK) status = totals.run();
    if (status == FASTVAE_OK) totals.write(static_cast<T *>(joint));
    return status;
}

template <class T>
int agg_log_prob_backward(const void *d_joint, const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                          int64_t S, int64_t N, int64_t D, void *joint, void *d_z, void *d_mu, void *d_logvar,
                          void *d_log_w, int exact_skip, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
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
    int status = panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                             [&](int64_t j) { return weights.log2_w(j); }, !all_moderate(samples, S * D));
    const bool whole_rows = gradients.whole_rows();
    if (status == FASTVAE_OK && !whole_rows) status = totals.run();  // again, because the joint is these rounded
    if (status != FASTVAE_OK) return status;
    // A column's pull on its own log_w leaves out the pairs that have another, so that the others have to be seen.
    const bool skip = early && totals.stopped_early() && !(d_log_w && weights.any_overrides());
    if (skip)
        reach.set(panels, weights, totals.data(), totals.likely(), upstream, S, d_z, d_mu || d_logvar || d_log_w);
    const Responsibilities<T> weigh{panels, weights, upstream, totals.data(), whole_rows, skip ? &reach : nullptr};
    status = gradients.run(weigh);
    if (status != FASTVAE_OK) return status;
    count_visits(S * N * D - gradients.left_out(), S * N * D);
    if (joint) totals.write(static_cast<T *>(joint));
    return gradients.write(static_cast<T *>(d_z), static_cast<T *>(d_mu), static_cast<T *>(d_logvar),
                           static_cast<T *>(d_log_w));
}

template decltype(agg_log_prob<float>) agg_log_prob<float>;
template decltype(agg_log_prob<double>) agg_log_prob<double>;
template decltype(agg_log_prob_backward<float>) agg_log_prob_backward<float>;
template decltype(agg_log_prob_backward<double>) agg_log_prob_backward<double>;

void add_agg_log_prob(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.agg_log_prob = agg_log_prob<float>, f64.agg_log_prob = agg_log_prob<double>;
    f32.agg_log_prob_backward = agg_log_prob_backward<float>, f64.agg_log_prob_backward = agg_log_prob_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
