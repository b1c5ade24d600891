// joint_i = log sum_j w_ij prod_d q(z_id | x_j) and marginal_id = log sum_j w_ij q(z_id | x_j), never forming [S, N],
// and their gradients. The joint is agg_log_prob.cu's, the marginals' sums are those of marginals.h.

#include "marginals.h"
#include "pull.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// marginals [S, D]
template <class T> __global__ void combine_marginals(Packed<T> p, RangeSums<T> sums, T *marginals) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k >= sums.size) return;
    LogSum total = sums.total(k);
    total.shift += double(p.marginal_base[k / p.S]);
    marginals[k % p.S * p.D + k / p.S] = T(total.log());
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

template <class In> int pack_with_bases(const Inputs<In> &in, const Packed<Accumulator<In>> &p, Stream stream) {
    FASTVAE_TRY(pack(in, p, stream));
    return launch(find_bases<Accumulator<In>>, p.D, 1, kThreads, stream, p);
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

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_agg_log_prob_marginals_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward) {
    return backward ? workspace_of<MarginalsBackward>(dtype, S, N, D) : workspace_of<MarginalsForward>(dtype, S, N, D);
}

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
        FASTVAE_TRY(pack_with_bases(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), p, stream));
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
        FASTVAE_TRY(pack_with_bases(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), p, stream));
        if (d_joint) {
            FASTVAE_TRY(backward.joint.run(p, static_cast<T *>(nullptr), static_cast<const T *>(d_joint), stream));
            FASTVAE_TRY(backward.pull.run(p, OfShares<T, false>{backward.joint.shares}, out, stream));
        }
        if (d_marginals) FASTVAE_TRY(backward.run_marginals(static_cast<const T *>(d_marginals), out, stream));
        return backward.pull.finish(p, out, stream);
    });
}
