// joint_i = log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

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

template int agg_log_prob<float>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t, int64_t,
                                 int64_t, void *, int);
template int agg_log_prob<double>(const void *, const void *, const void *, FASTVAE_WEIGHTS, int64_t, int64_t,
                                  int64_t, void *, int);

}  // namespace fastvae::FASTVAE_ISA
