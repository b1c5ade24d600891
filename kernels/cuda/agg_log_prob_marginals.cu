// joint_i = log sum_j w_ij prod_d q(z_id | x_j) and marginal_id = log sum_j w_ij q(z_id | x_j), never forming [S, N],
// and their gradients. The joint is agg_log_prob.cu's. A marginal's block takes a panel of samples in one dimension and
// walks over columns; that is bound by exponentials, so that operands come straight from the cache.

#include "ops.h"
#include "pull.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// One dimension d of a tile: t, and the terms s_ij = log2 w_ij q(z_id | x_j).
template <class T, bool kOwnsRows> struct OneDimension {
    static constexpr int R = kSide<T>, W = kPanel<T>;
    const Packed<T> &p;
    const int64_t d;
    const Lanes<kOwnsRows> lanes;
    T z[R], a[R], b[R], cw[R];

    FASTVAE_DEVICE OneDimension(const Packed<T> &p, int64_t d) : p(p), d(d) {}
    FASTVAE_DEVICE void load_row(int64_t panel) { load_side(p.samples + (panel * p.D + d) * W, lanes.row, z); }
    FASTVAE_DEVICE void load_column(int64_t panel) {
        const T *const planes = p.columns + (panel * p.D + d) * 2 * W;
        load_side(planes, lanes.column, a);
        load_side(planes + W, lanes.column, b);
        load_side(p.marginal_cw + (panel * p.D + d) * W, lanes.column, cw);
    }
    // t of row r
    FASTVAE_DEVICE void standardize(int r, bool far_column, T (&t)[R]) const {
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k)
            t[k] = far_column ? standardized<true>(z[r], a[k], b[k]) : standardized<false>(z[r], a[k], b[k]);
    }
    // Finite for finite inputs, so that 0 t is 0
    FASTVAE_DEVICE static void hold_finite(bool far, T (&t)[R]) {
        if (!far) return;
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) t[k] = min_(max_(t[k], -largest<T>()), largest<T>());
    }
    FASTVAE_DEVICE void terms(int64_t row_panel, int64_t column_panel, bool meets, int r, const T (&t)[R], T (&s)[R]) const {
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) s[k] = minus_square(cw[k], t[k]);
        if (!meets) return;
        const Special<T> special(p, row_panel * W + place<T>(lanes.row, r), column_panel);
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) {
            const int at = place<T>(lanes.column, k);
            if (!special.has(at)) continue;
            const T c = p.marginal_c[(column_panel * p.D + d) * W + at];
            s[k] = minus_square(c + special.log2_w(at), t[k]);
        }
    }

private:
    static FASTVAE_DEVICE T minus_square(T c, T t) { return sizeof(T) == 4 ? fma_(-t, t, c) : minus_squares(c, t * t); }
};

// m and sum of each range, [ranges][D][S]; with kPull also sum_j 2^(s - m) t a.
template <class T, bool kPull>
__global__ __launch_bounds__(kThreads, kBlocks<T>) void marginal_sums(Packed<T> p, int64_t tiles, RangeSums<T> sums, T *pulls) {
    constexpr int R = kSide<T>;
    const int64_t panel = blockIdx.x / p.D, d = blockIdx.x % p.D, first = blockIdx.y * tiles;
    const int64_t last = first + tiles < p.column_panels ? first + tiles : p.column_panels;
    const bool far_row = p.far_rows[panel];
    OneDimension<T, true> tile(p, d);
    RowSum<T> rows[R];
    T pull[R] = {};
    tile.load_row(panel);
    for (int64_t column_panel = first; column_panel < last; ++column_panel) {
        const bool far_column = p.far_columns[column_panel], meets = meets_own(p, panel, column_panel);
        tile.load_column(column_panel);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            T t[R], s[R];
            tile.standardize(r, far_column, t);
            tile.terms(panel, column_panel, meets, r, t, s);
            const T rescale = rows[r].add(s, s);
            if (!kPull) continue;
            tile.hold_finite(far_row || far_column, t);
            pull[r] *= rescale;
            FASTVAE_UNROLL
            for (int k = 0; k < R; ++k) pull[r] = fma_(s[k] * t[k], tile.a[k], pull[r]);
        }
    }
    FASTVAE_UNROLL
    for (int r = 0; r < R; ++r) {
        rows[r].across_lanes(pull[r]);
        const int64_t i = panel * kPanel<T> + place<T>(tile.lanes.row, r), at = (blockIdx.y * p.D + d) * p.S + i;
        if (tile.lanes.column || i >= p.S) continue;
        sums.m[at] = rows[r].m;
        sums.sum[at] = rows[r].sum;
        if (kPull) pulls[at] = pull[r];
    }
}

// marginals [S, D]
template <class T> __global__ void combine_marginals(Packed<T> p, RangeSums<T> sums, T *marginals) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k < sums.size) marginals[k % p.S * p.D + k / p.S] = T(sums.total(k).log());
}

// The shares [D, S] in d_marginals [S, D], and where d_z is wanted the last of its parts
template <class T>
__global__ void combine_pulls(Packed<T> p, RangeSums<T> sums, const T *pulls, const T *d_marginals, Shares<T> shares,
                              RowParts<T> parts, bool d_z) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k >= sums.size) return;
    const int64_t i = k % p.S, d = k / p.S;
    const LogSum total = sums.total(k);
    shares.set(k, total, d_marginals[i * p.D + d]);
    if (!d_z) return;
    T pull = 0;
    for (int64_t range = 0; range < sums.ranges; ++range) {
        const int64_t at = range * sums.size + k;
        if (sums.sum[at] != T(0)) pull += times(exp2_(sums.m[at] - shares.m[k]), pulls[at]);
    }
    parts.of(p, parts.count - 1, i / kPanel<T>)[d * kPanel<T> + i % kPanel<T>] = times(shares.factor[k], pull);
}

// A block takes a panel of columns in one dimension; its sums are of r t and r (t^2 - kappa^2), so that no shares are to
// be subtracted.
template <class T>
__global__ __launch_bounds__(kThreads, kBlocks<T>) void pull_on_marginal_columns(Packed<T> p, int64_t tiles, Shares<T> shares,
                                                                        ColumnParts<T> parts) {
    constexpr int R = kSide<T>, W = kPanel<T>;
    const int64_t panel = blockIdx.x / p.D, d = blockIdx.x % p.D, first = blockIdx.y * tiles;
    const int64_t last = first + tiles < p.row_panels ? first + tiles : p.row_panels;
    const bool far_column = p.far_columns[panel];
    OneDimension<T, false> tile(p, d);
    T share[R] = {}, common[R] = {}, t_sum[R] = {}, tt_sum[R] = {};
    tile.load_column(panel);
    for (int64_t row_panel = first; row_panel < last; ++row_panel) {
        const bool far_row = p.far_rows[row_panel], meets = meets_own(p, row_panel, panel);
        tile.load_row(row_panel);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            const int64_t i = row_panel * W + place<T>(tile.lanes.row, r);
            if (i >= p.S) continue;
            const T m = shares.m[d * p.S + i], factor = shares.factor[d * p.S + i];
            T t[R], s[R];
            tile.standardize(r, far_column, t);
            tile.terms(row_panel, panel, meets, r, t, s);
            tile.hold_finite(far_row || far_column, t);
            const Special<T> special(p, meets ? i : p.S, panel);
            FASTVAE_UNROLL
            for (int k = 0; k < R; ++k) {
                const T weight = times(factor, exp2_(s[k] - m)), rt = weight * t[k];
                common[k] += special.has(place<T>(tile.lanes.column, k)) ? T(0) : weight;
                share[k] += weight;
                t_sum[k] += rt;
                tt_sum[k] = fma_(rt, t[k], tt_sum[k]);
            }
        }
    }
    FASTVAE_UNROLL
    for (int k = 0; k < R; ++k) tt_sum[k] -= share[k] / kInvKappa2<T>;
    const int64_t joint_parts = parts.share_count;
    const int64_t to = parts.at(p, joint_parts + blockIdx.y, panel) * p.D + d * W;
    const int64_t to_common = parts.at(p, joint_parts + blockIdx.y * p.D + d, panel);
    const T t = sum_over_lanes(t_sum), tt = sum_over_lanes(tt_sum), c = sum_over_lanes(common);
    if (!writes_sum<T>()) return;
    const int lane = place<T>(tile.lanes.column, summed_number<T>());
    parts.t[to + lane] = t;
    parts.tt[to + lane] = tt;
    parts.common[to_common + lane] = c;
}

// How the marginals' work is divided: dimensions are blocks of their own.
struct Ranges {
    Parts columns, rows;
    template <class T> explicit Ranges(const Packed<T> &p)
        : columns(p.column_panels, kFull / (p.row_panels * p.D + 1)), rows(p.row_panels, kFull / (p.column_panels * p.D + 1)) {}
};

template <class In> struct MarginalsForward {
    using T = Accumulator<In>;
    Packed<T> packed;
    Joint<T> joint;
    Ranges ranges;
    RangeSums<T> sums;
    MarginalsForward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights)
        : packed(arena, S, N, D, true, weights), joint(arena, packed, false), ranges(packed),
          sums(arena, ranges.columns.count, S * D) {}
};

template <class In> struct MarginalsBackward {
    using T = Accumulator<In>;
    Packed<T> packed;
    Ranges ranges;
    Joint<T> joint;
    Pull<In> pull;
    RangeSums<T> sums;
    Shares<T> shares;
    T *pulls;
    MarginalsBackward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights, bool with_joint = true,
             bool with_marginals = true)
        : packed(arena, S, N, D, true, weights), ranges(packed), joint(arena, packed, true),
          pull(arena, packed, with_joint, with_marginals ? 1 : 0, with_marginals ? ranges.rows.count : 0),
          sums(arena, ranges.columns.count, S * D), shares(arena, S * D),
          pulls(arena.take<T>(ranges.columns.count * S * D)) {}

    int run_marginals(const T *d_marginals, const Gradients<In> &out, Stream stream) const {
        const auto &[p, ranges, joint, pull, sums, shares, pulls] = *this;
        FASTVAE_TRY(launch(marginal_sums<T, true>, p.row_panels * p.D, ranges.columns.count, kThreads, stream, p,
                           ranges.columns.size, sums, pulls));
        FASTVAE_TRY(launch(combine_pulls<T>, ceil_div(sums.size, kThreads), 1, kThreads, stream, p, sums, pulls,
                           d_marginals, shares, pull.rows, out.d_z != nullptr));
        if (!out.columns()) return FASTVAE_CUDA_OK;
        return launch(pull_on_marginal_columns<T>, p.column_panels * p.D, ranges.rows.count, kThreads, stream, p,
                      ranges.rows.size, shares, pull.columns);
    }
};

}  // namespace

int64_t agg_log_prob_marginals_workspace(int dtype, int64_t S, int64_t N, int64_t D, bool backward) {
    return backward ? workspace_of<MarginalsBackward>(dtype, S, N, D) : workspace_of<MarginalsForward>(dtype, S, N, D);
}

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int fastvae_cuda_agg_log_prob_marginals(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                        void *joint, void *marginals, void *workspace, int64_t workspace_size,
                                        void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const MarginalsForward<In> forward(arena, S, N, D, {log_w, log_w_all, own, log_w_own, log_w_next, N});
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const auto &[p, joint_op, ranges, sums] = forward;
        FASTVAE_TRY(pack(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), p, stream));
        FASTVAE_TRY(joint_op.run(p, static_cast<T *>(joint), static_cast<const T *>(nullptr), stream));
        FASTVAE_TRY(launch(marginal_sums<T, false>, p.row_panels * D, ranges.columns.count, kThreads, stream, p,
                           ranges.columns.size, sums, static_cast<T *>(nullptr)));
        return launch(combine_marginals<T>, ceil_div(sums.size, kThreads), 1, kThreads, stream, p, sums,
                      static_cast<T *>(marginals));
    });
}

int fastvae_cuda_agg_log_prob_marginals_backward(int dtype, const void *d_joint, const void *d_marginals,
                                                 FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                                                 void *d_z, void *d_mu, void *d_logvar, void *d_log_w, void *workspace,
                                                 int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const MarginalsBackward<In> backward(arena, S, N, D, {log_w, log_w_all, own, log_w_own, log_w_next, N}, d_joint, d_marginals);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const Gradients<In> out{static_cast<In *>(d_z), static_cast<In *>(d_mu), static_cast<In *>(d_logvar),
                                static_cast<T *>(d_log_w)};
        const auto &p = backward.packed;
        FASTVAE_TRY(pack(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), p, stream));
        if (d_joint) {
            FASTVAE_TRY(backward.joint.run(p, static_cast<T *>(nullptr), static_cast<const T *>(d_joint), stream));
            FASTVAE_TRY(backward.pull.run(p, OfShares<T>{backward.joint.shares}, out, stream));
        }
        if (d_marginals) FASTVAE_TRY(backward.run_marginals(static_cast<const T *>(d_marginals), out, stream));
        return backward.pull.finish(p, out, stream);
    });
}
