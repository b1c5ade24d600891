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

template <class T> struct Forward {
    const T *z;  // [S, D]
    int64_t S;
    const Panels<T> &panels;
    const Weights<T> &weights;

    static int64_t scratch(int64_t rows, int64_t D) { return rows * D + kTileRows * kMaxChunkColumns; }

    // log sum over panels [begin, end) for rows [first, first + rows) -> out
    template <bool kDirect>
    void block(int64_t first, int64_t rows, int64_t begin, int64_t end, T *scratch, double *out) const {
        constexpr int W = kPanelWidth<T>, L = kLanes<T>;
        const int64_t D = panels.D, chunk = chunk_panels<T>(D);
        T *packed = scratch, *squares = scratch + rows * D;  // [rows / 6][D][6], [6][columns of a chunk]
        LogSumExp<T> sums[ForwardGrid::kMaxRows];
        for (int64_t r = 0; r < rows; r += kTileRows)
            pack_rows(z, first + r, S, D, panels.centre(), packed + r * D);

        for (int64_t p = begin; p < end; p += chunk) {
            const int64_t n = p + chunk < end ? chunk : end - p;  // panels of this chunk
            for (int64_t tile = 0; tile < rows; tile += kTileRows) {
                for (int64_t k = 0; k < n; ++k)
                    square_sums<kDirect, T>(packed + tile * D, panels.planes(p + k), D, squares + k * W, n * W);
                for (int64_t r = 0; r < kTileRows && first + tile + r < S; ++r) {
                    T *row = squares + r * n * W;
                    const T *cw = panels.cw() + p * W;
                    Vec<T> extra = splat(-kInf<T>);
                    int extras = 0;
                    weights.take_overrides(first + tile + r, p * W, n * W, panels.c(), row,
                                           [&](int64_t, T s) { extra[extras++] = s; });
                    LogSumExp<T> &sum = sums[tile + r];
                    sum.add(n * W / L, [&](int64_t k) { return load(cw + k * L) - load(row + k * L); });
                    if (extras) sum.add(extra);
                }
            }
        }
        for (int64_t r = 0; r < rows && first + r < S; ++r) out[first + r] = sums[r].log();
    }
};

}  // namespace

template <class T>
int agg_log_prob(const void *z, const void *mu, const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N,
                 int64_t D, void *joint, int threads) {
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    Panels<T> panels(N, D);
    const ForwardGrid grid(S, N);
    const int64_t scratch_size = Forward<T>::scratch(grid.rows, D);
    Buffer<T> scratch(scratch_size * threads);
    Buffer<double> parts(grid.ranges * S);
    if (!panels.allocated() || !scratch || !parts) return FASTVAE_OUT_OF_MEMORY;

    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); });
    const Forward<T> forward{static_cast<const T *>(z), S, panels, weights};
    parallel_for(grid.blocks * grid.ranges, threads, [&](int64_t unit, int worker) {
        const int64_t first = unit / grid.ranges * grid.rows, range = unit % grid.ranges;
        const int64_t begin = panels.count * range / grid.ranges, end = panels.count * (range + 1) / grid.ranges;
        T *const mine = scratch + worker * scratch_size;
        double *const out = parts + range * S;
        if (panels.direct)
            forward.template block<true>(first, grid.rows, begin, end, mine, out);
        else
            forward.template block<false>(first, grid.rows, begin, end, mine, out);
    });

    T *out = static_cast<T *>(joint);
    for (int64_t i = 0; i < S; ++i) {
        double max = parts[i], sum = 0;
        for (int64_t k = 1; k < grid.ranges; ++k) max = parts[k * S + i] > max ? parts[k * S + i] : max;
        if (max - max != 0) max = 0;
        if (grid.ranges > 1)
            for (int64_t k = 0; k < grid.ranges; ++k) sum += std::exp(parts[k * S + i] - max);
        out[i] = T(grid.ranges > 1 ? max + std::log(sum) : parts[i]);
    }
    return FASTVAE_OK;
}

template <class T>
int agg_log_prob_backward(const void *d_joint, const void *joint, const void *z, const void *mu,
                          const void *logvar, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z,
                          void *d_mu, void *d_logvar, void *d_log_w, int threads) {
    constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>;
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    const T *const samples = static_cast<const T *>(z);
    Panels<T> panels(N, D);
    Gradients<T> gradients(panels, samples, S, d_z, d_mu || d_logvar, threads);
    if (!panels.allocated() || !gradients.allocated()) return FASTVAE_OUT_OF_MEMORY;
    panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads,
                [&](int64_t j) { return weights.log2_w(j); }, !all_moderate(samples, S * D));

    // r_ij = g_i w_ij q(z_i | x_j) / sum_k w_ik q(z_i | x_k), 0 where that sum is empty
    const auto weigh = [&](const Block &tile, const T *rows, T *r, T *shares) {
        const int64_t columns = tile.count * W, first = tile.panel * W;
        const T *const cw = panels.cw() + first;
        for (int64_t p = 0; p < tile.count; ++p)
            panels.direct ? square_sums<true>(rows, panels.planes(tile.panel + p), D, r + p * W, columns)
                          : square_sums<false>(rows, panels.planes(tile.panel + p), D, r + p * W, columns);
        T own_r[2 * kTileRows];
        int64_t own_j[2 * kTileRows], owns = 0;
        for (int64_t i = 0; i < kTileRows; ++i) {
            T *const row = r + i * columns;
            const bool inside = i < tile.rows;
            const Share<T> share(inside ? static_cast<const T *>(joint)[tile.first + i] : -kInf<T>,
                                 inside ? static_cast<const T *>(d_joint)[tile.first + i] : T(0));
            if (inside)
                weights.take_overrides(tile.first + i, first, columns, panels.c(), row, [&](int64_t j, T s) {
                    own_r[owns] = share(splat(s))[0];
                    own_j[owns++] = i * columns + j;
                });
            for (int64_t k = 0; k < columns; k += L)
                store(row + k, share(load(cw + k) - load(row + k)));
        }
        for (int64_t p = 0; p < tile.count; ++p)
            for (int64_t k = 0; k < W; k += L) {
                const T *x = r + p * W + k;
                const Vec<T> sum = ((load(x) + load(x + columns)) + (load(x + 2 * columns) + load(x + 3 * columns))) +
                                   (load(x + 4 * columns) + load(x + 5 * columns));
                store(shares + p * 2 * W + k, load(shares + p * 2 * W + k) + sum);
            }
        for (int64_t k = 0; k < owns; ++k) {
            const int64_t j = own_j[k] % columns;
            r[own_j[k]] = own_r[k];
            shares[j / W * 2 * W + W + j % W] += own_r[k];
        }
    };
    if (!gradients.run(weigh)) return FASTVAE_OUT_OF_MEMORY;
    gradients.write(static_cast<T *>(d_z), static_cast<T *>(d_mu), static_cast<T *>(d_logvar),
                    static_cast<T *>(d_log_w));
    return FASTVAE_OK;
}

#define INSTANTIATE(T)                                                                                            \
    template int agg_log_prob<T>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t, int64_t,     \
                                 int64_t, void *, int);                                                           \
    template int agg_log_prob_backward<T>(const void *, const void *, const void *, const void *, const void *,   \
                                          FASTVAE_WEIGHTS, int64_t, int64_t, int64_t, void *, void *, void *,     \
                                          void *, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastvae::FASTVAE_ISA
