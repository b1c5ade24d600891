// joint_i = log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

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
    return rows * kSum + kTileRows * kMaxChunkColumns + round_up(rows * D, kLanes<T>);
}

// The sum over panels [begin, end) for rows [first, first + rows) of z -> out [S]. A chunk of columns stays in
// the L2 cache while the rows go through it.
template <class T>
void log_sums(const Panels<T> &panels, const Weights<T> &weights, const T *z, int64_t S, int64_t first, int64_t rows,
              int64_t begin, int64_t end, T *scratch, typename LogSumExp<T>::Total *out) {
    constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    const int64_t D = panels.D, chunk = chunk_panels<T>(D);
    auto *const sums = reinterpret_cast<LogSumExp<T> *>(scratch);           // [rows]
    T *const squares = reinterpret_cast<T *>(sums + rows);                   // [6][columns of a chunk]
    T *const packed = squares + R * kMaxChunkColumns;                        // [rows / 6][D][6]
    for (int64_t i = 0; i < rows; ++i) sums[i] = {};
    for (int64_t i = 0; i < rows; i += R) pack_rows(z, first + i, S, D, panels.centre(), packed + i * D);

    for (int64_t p = begin; p < end; p += chunk) {
        const int64_t count = p + chunk < end ? chunk : end - p, columns = count * W;
        const T *const cw = panels.cw() + p * W;
        for (int64_t i = 0; i < rows; i += R) {
            square_sums(panels, packed + i * D, p, count, squares);
            for (int64_t r = 0; r < R && first + i + r < S; ++r) {
                T *const row = squares + r * columns;
                Vec<T> replaced = splat(-kInf<T>);
                int n_replaced = 0;
                weights.take_overrides(first + i + r, p * W, columns, panels.c(), row,
                                       [&](int64_t, T s) { replaced[n_replaced++] = s; });
                LogSumExp<T> &sum = sums[i + r];
                if (n_replaced) sum.add(replaced);
                sum.add(columns / L, [&](int64_t k) { return load(cw + k * L) - load(row + k * L); });
            }
        }
    }
    for (int64_t r = 0; r < rows && first + r < S; ++r) out[first + r] = sums[r].total();
}

// The sums of all rows, in blocks of rows and ranges of columns, which are put together in order.
template <class T> class Totals {
    using Total = typename LogSumExp<T>::Total;

public:
    Totals(const Panels<T> &panels, const Weights<T> &weights, const T *z, int64_t S, int threads)
        : panels_(panels), weights_(weights), z_(z), S_(S), threads_(threads), grid_(S, panels.N),
          scratch_size_(forward_scratch<T>(grid_.rows, panels.D)), scratch_(scratch_size_ * threads),
          parts_(grid_.ranges * S) {}

    bool allocated() const { return scratch_ && parts_; }
    const Total &operator[](int64_t i) const { return parts_[i]; }
    Total *data() const { return parts_; }

    void write(T *joint) const {
        for (int64_t i = 0; i < S_; ++i) joint[i] = T(parts_[i].log());
    }

    void run() {
        parallel_for(grid_.blocks * grid_.ranges, threads_, [&](int64_t unit, int worker) {
            const int64_t block = unit / grid_.ranges, range = unit % grid_.ranges;
            log_sums(panels_, weights_, z_, S_, block * grid_.rows, grid_.rows, panels_.count * range / grid_.ranges,
                     panels_.count * (range + 1) / grid_.ranges, scratch_ + worker * scratch_size_,
                     parts_ + range * S_);
        });
        for (int64_t range = 1; range < grid_.ranges; ++range)
            for (int64_t i = 0; i < S_; ++i) parts_[i].add(parts_[range * S_ + i]);
    }

private:
    const Panels<T> &panels_;
    const Weights<T> &weights_;
    const T *z_;  // [S, D]
    const int64_t S_;
    const int threads_;
    const ForwardGrid grid_;
    const int64_t scratch_size_;
    Buffer<T> scratch_;
    Buffer<Total> parts_;  // [ranges][S]
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

    // see Gradients::run
    void operator()(const Block &tile, const T *rows, T *r, T *shares) const {
        const int64_t columns = tile.count * W, first = tile.panel * W;
        const T *const cw = panels.cw() + first;
        struct {
            int64_t row, column;
            T r;
        } replaced[2 * R];
        int n_replaced = 0;

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
            for (int64_t k = 0; k < columns / L; ++k)
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
};

}  // namespace

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                 int64_t D, void *joint, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    Panels<T> panels(N, D);
    Totals<T> totals(panels, weights, static_cast<const T *>(z), S, threads);
    if (!panels.allocated() || !totals.allocated()) return FASTVAE_OUT_OF_MEMORY;

    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); });
    totals.run();
    totals.write(static_cast<T *>(joint));
    return FASTVAE_OK;
}

template <class T>
int agg_log_prob_backward(const void *d_joint, const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS,
                          int64_t S, int64_t N, int64_t D, void *joint, void *d_z, void *d_mu, void *d_logvar,
                          void *d_log_w, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    const T *const samples = static_cast<const T *>(z);
    Panels<T> panels(N, D);
    Totals<T> totals(panels, weights, samples, S, threads);
    Gradients<T> gradients(panels, samples, S, d_z, d_mu || d_logvar, threads);
    if (!panels.allocated() || !totals.allocated() || !gradients.allocated()) return FASTVAE_OUT_OF_MEMORY;

    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); }, !all_moderate(samples, S * D));
    const bool whole_rows = gradients.whole_rows();
    if (!whole_rows) totals.run();  // again, because the joint is these rounded
    const Responsibilities<T> weigh{panels, weights, static_cast<const T *>(d_joint), totals.data(), whole_rows};
    if (!gradients.run(weigh)) return FASTVAE_OUT_OF_MEMORY;
    if (joint) totals.write(static_cast<T *>(joint));
    gradients.write(static_cast<T *>(d_z), static_cast<T *>(d_mu), static_cast<T *>(d_logvar),
                    static_cast<T *>(d_log_w));
    return FASTVAE_OK;
}

#define INSTANTIATE(T)                                                                                            \
    template int agg_log_prob<T>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t, int64_t,     \
                                 int64_t, void *, int);                                                           \
    template int agg_log_prob_backward<T>(const void *, const void *, const void *, const void *,                 \
                                          FASTVAE_WEIGHTS, int64_t, int64_t, int64_t, void *, void *, void *,     \
                                          void *, void *, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastvae::FASTVAE_ISA
