// joint_i = log sum_j w_ij prod_d q(z_id | x_j) and marginal_id = log sum_j w_ij q(z_id | x_j), one pass for both,
// never forming [S, N].
//
// The terms of a marginal's sum are moderate (marginals.h), and those below 2^kMinExponent are lost. A sum that comes
// out so small that this could matter (its sample 10 sigma away from every column) is taken again with its maximum; so
// is any where a term could be too large for exp2_term.

#include "kernels.h"
#include "marginals.h"

namespace fastvae::FASTVAE_ISA {

namespace {

template <class T> struct Forward {
    static constexpr int W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    static constexpr double kLost = sizeof(T) == 4 ? 0x1p-96 : 0x1p-960, kHuge = 0x1p100;
    static constexpr double kHighest = 100;

    const T *z;  // [S, D]
    int64_t S;
    const MarginalColumns<T> &columns;
    T *joint, *marginals;  // [S], [S, D]

    // rows: [D][6]
    template <bool kDirect> void tile(int64_t first, T *rows, TileSums<T> sums) const {
        const int64_t D = columns.panels.D;
        const Overrides<T> overrides(columns, first, S);
        pack_rows(columns.panels, z, first, S, rows);
        sums.template add_up<kDirect>(first, S, rows, overrides, joint != nullptr, marginals != nullptr);
        for (int r = 0; r < R && first + r < S; ++r) {
            if (joint) joint[first + r] = T(sums.joint[r].total().log());
            if (!marginals) continue;
            T *out = marginals + (first + r) * D;
            for (int64_t d = 0; d < D; ++d) out[d] = T(sums.marginals[d * R + r]);
            for_each_vector<T>(D, [&](int64_t d, int64_t m) __attribute__((always_inline)) {
                store_some(out + d, log_<T>(load_some(out + d, m)), m);
            });
            for (int64_t d = 0; d < D; ++d) {
                const double sum = sums.marginals[d * R + r];
                const bool lost = sum <= kLost * double(columns.panels.N) || sum >= kHuge || !(columns.highest[d] <= kHighest);
                double log = double(out[d]);
                if (lost && sums.stopped()) return;
                if (lost) log = exact_marginal<kDirect>(columns, overrides, r, d, rows[d * R + r]).total().log();
                out[d] = T(log + (columns.normal[d] + columns.reference) * kLn2);
            }
        }
    }
};

}  // namespace

template <class T>
int agg_log_prob_marginals(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                           int64_t D, void *joint, void *marginals, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    MarginalColumns<T> columns(weights, N, D);
    const int64_t row_size = kTileRows * D, rows_size = round_up(row_size, kLanes<T>);
    const int64_t size = rows_size + TileSums<T>::size(D);
    Buffer<T> memory(size * threads);
    Buffer<double> totals(row_size * threads);
    if (!columns.allocated() || !memory || !totals) return FASTVAE_OUT_OF_MEMORY;

    const int status = columns.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), S, threads);
    if (status != FASTVAE_OK) return status;
    const Forward<T> forward{static_cast<const T *>(z), S, columns, static_cast<T *>(joint),
                             static_cast<T *>(marginals)};
    return parallel_for((S + kTileRows - 1) / kTileRows, threads, [&](int64_t tile, const Worker &worker) {
        T *const rows = memory + worker.number * size;
        const TileSums<T> sums(columns, worker, rows + rows_size, totals + worker.number * row_size);
        if (columns.panels.direct)
            forward.template tile<true>(tile * kTileRows, rows, sums);
        else
            forward.template tile<false>(tile * kTileRows, rows, sums);
    });
}

template decltype(agg_log_prob_marginals<float>) agg_log_prob_marginals<float>;
template decltype(agg_log_prob_marginals<double>) agg_log_prob_marginals<double>;

void add_agg_log_prob_marginals(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.agg_log_prob_marginals = agg_log_prob_marginals<float>;
    f64.agg_log_prob_marginals = agg_log_prob_marginals<double>;
}

}  // namespace fastvae::FASTVAE_ISA
