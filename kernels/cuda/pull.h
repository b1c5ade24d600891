// The gradients of z, mu and logvar from weights r_ij on the log-densities of the pairs. With t and a in units of kappa
// (panels.h):
//     d z_id      = -sum_j r_ij t a / kappa^2
//     d mu_jd     =  sum_i r_ij t a / kappa^2
//     d logvar_jd = (sum_i r_ij t^2 / kappa^2 - sum_i r_ij) / 2
// Where a number is extreme, the sum of r t^2 may overflow although the broadcast formula does not: it multiplies the
// sum of r (z - mu)^2 by 1 / sigma^2. What is far therefore sums e = t / up, up = max(a, 1), and multiplies sums by up.
// One kernel for samples, one for columns: a block owns a panel of these and walks over a range of the others. A tile's
// r stay in registers while d runs; what they sum up to goes to the block's own part of the memory, which a last kernel
// adds up. A tile whose r are all 0 ends there: far posteriors cost no more than their densities.
#pragma once

#include "row_sums.h"

namespace fastvae::FASTVAE_ISA {

// r from a tile's densities; kEarly: of tiles that may stop early.
template <class T, bool kEarly> struct OfShares {
    static constexpr bool kWeighted = true;  // columns, and samples' own ones otherwise
    Shares<T> shares;
    bool all_columns = false;  // no tile of pull_on_columns may stop early

    template <bool kFold, bool kOwnsRows>
    FASTVAE_DEVICE void operator()(const Packed<T> &p, Sweep<T, kOwnsRows> &sweep, int64_t owner, int64_t passing,
                                   const Lanes<kOwnsRows> &lanes, Pairs<T> &x) const {
        int row_panel = int(kOwnsRows ? owner : passing), column_panel = int(kOwnsRows ? passing : owner);
        const bool may = kEarly && may_stop(p, row_panel, column_panel) && (kOwnsRows || !all_columns);
        const auto limit = [&](int r) {
            int panel = row_panel;
            forget(panel);
            const int64_t i = int64_t(panel) * kPanel<T> + place<T>(lanes.row, r);
            if (i >= p.S) return -largest<T>();
            const T reach = kOwnsRows ? p.exit.row_reach[column_panel] : p.exit.column_reach[column_panel];
            return T(16.0 / 15) * (reach + T(kSteep) - (kOwnsRows ? p.exit.row_floor[i] : p.exit.column_floor[i]));
        };
        sweep.start(owner, passing, passing + 1);
        if (square_sums<kFold, kEarly>(sweep, p.far_columns[column_panel], lanes, x, may, limit)) return clear<T>(x);
        forget(row_panel), forget(column_panel);
        to_terms(p, row_panel, column_panel, meets_own(p, row_panel, column_panel), lanes, x);
        FASTVAE_UNROLL
        for (int r = 0; r < kSide<T>; ++r) {
            const int64_t i = int64_t(row_panel) * kPanel<T> + place<T>(lanes.row, r);
            const T m = i < p.S ? shares.m[i] : T(0), factor = i < p.S ? shares.factor[i] : T(0);
            FASTVAE_UNROLL
            for (int c = 0; c < kSide<T>; ++c) x[r][c] = times(factor, exp2_(x[r][c] - m));
        }
    }
};

// r as given
template <class T> struct OfMatrix {
    static constexpr bool kWeighted = false;
    const T *grad;  // [S, N]

    template <bool kFold, bool kOwnsRows>
    FASTVAE_DEVICE void operator()(const Packed<T> &p, Sweep<T, kOwnsRows> &, int64_t owner, int64_t passing,
                                   const Lanes<kOwnsRows> &lanes, Pairs<T> &x) const {
        const int64_t first_row = (kOwnsRows ? owner : passing) * kPanel<T>;
        const int64_t first_column = (kOwnsRows ? passing : owner) * kPanel<T>;
        const int rows = p.S - first_row < kPanel<T> ? int(p.S - first_row) : kPanel<T>;
        const int columns = p.N - first_column < kPanel<T> ? int(p.N - first_column) : kPanel<T>;
        const T *const tile = grad + first_row * p.N + first_column;
        FASTVAE_UNROLL
        for (int r = 0; r < kSide<T>; ++r) {
            const int i = place<T>(lanes.row, r);
            FASTVAE_UNROLL
            for (int c = 0; c < kSide<T>; ++c) {
                const int j = place<T>(lanes.column, c);
                x[r][c] = i < rows && j < columns ? tile[i * p.N + j] : T(0);
            }
        }
    }
};

// Whether a panel of columns has sums of e, for all samples.
template <class T> FASTVAE_DEVICE bool sums_far(const Packed<T> &p, int64_t column_panel) {
    return p.far_columns[column_panel] || *p.any_far_row;
}
template <class T> FASTVAE_DEVICE T scale_up(T a) { return max_(a, T(1)); }

// e of samples and a column in one dimension; t where nothing is far.
template <bool kFar, class T> struct Scaled {
    bool far_column;
    T a, b;
    FASTVAE_DEVICE Scaled(bool far_column, T a, T b) : far_column(far_column), a(a), b(b) {
        if (kFar && !far_column) this->b = b / scale_up(a);
        if (kFar) this->a = min_(a, T(1));
    }
    // Finite for finite inputs, so that 0 e is 0
    FASTVAE_DEVICE T operator()(T z) const {
        if (!kFar) return fma_(z, a, b);
        return min_(max_(far_column ? (z + b) * a : fma_(z, a, b), -largest<T>()), largest<T>());
    }
};

// The sums that blocks leave in memory, parts of those over all that passes by; [parts][panels][D][kPanel] each.
template <class T> struct RowParts {
    T *ta;  // r t a
    int64_t count;
    RowParts(Arena &arena, const Packed<T> &p, int64_t count)
        : ta(arena.take<T>(count * p.row_panels * p.D * kPanel<T>)), count(count) {}
    FASTVAE_DEVICE T *of(const Packed<T> &p, int64_t part, int64_t panel) const {
        return ta + (part * p.row_panels + panel) * p.D * kPanel<T>;
    }
};
template <class T> struct ColumnParts {
    T *t, *tt;             // r t, r t^2; or of e, in the first share_count parts
    T *common, *special;   // [parts][panels][kPanel] of r, where the weight is the common one and where it is not
    int64_t count, share_count, common_count;
    ColumnParts(Arena &arena, const Packed<T> &p, int64_t count, int64_t share_count, int64_t common_count)
        : count(count), share_count(share_count), common_count(common_count) {
        const int64_t size = p.column_panels * kPanel<T>;
        t = arena.take<T>(count * size * p.D);
        tt = arena.take<T>(count * size * p.D);
        common = arena.take<T>(common_count * size);
        special = arena.take<T>(share_count * size);
    }
    FASTVAE_DEVICE int64_t at(const Packed<T> &p, int64_t part, int64_t panel) const {
        return (part * p.column_panels + panel) * kPanel<T>;
    }
};

template <class T> FASTVAE_DEVICE void clear_part(T *part, int64_t size) {
    for (int64_t k = threadIdx.x; k < size; k += kThreads) part[k] = T(0);
}

// Adds the sums over lanes of a thread's numbers, one for each of what it owns, to to[kPanel].
template <class T> FASTVAE_DEVICE void add_up(T (&v)[kSide<T>], int owner_lane, T *to) {
    const T sum = sum_over_lanes(v);
    if (writes_sum<T>()) to[place<T>(owner_lane, summed_number<T>())] += sum;
}

template <bool kFar, class T>
FASTVAE_DEVICE void pull_rows(const Stage<T> &stage, int n, bool far_column, const Lanes<true> &lanes, const Pairs<T> &x,
                              T *to) {
    constexpr int R = kSide<T>;
    FASTVAE_NO_UNROLL
    for (int d = 0; d < n; ++d) {
        T z[R], a[R], b[R], ta[R];
        load_side(stage.z[d], lanes.row, z);
        load_side(stage.ab[d][0], lanes.column, a);
        load_side(stage.ab[d][1], lanes.column, b);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) ta[r] = 0;
        FASTVAE_UNROLL
        for (int c = 0; c < R; ++c) {
            const Scaled<kFar, T> scaled(far_column, a[c], b[c]);
            FASTVAE_UNROLL
            for (int r = 0; r < R; ++r) {
                const T xe = x[r][c] * scaled(z[r]);
                ta[r] = fma_(kFar ? xe * scale_up(a[c]) : xe, a[c], ta[r]);
            }
        }
        add_up(ta, lanes.row, to + d * kPanel<T>);
    }
}

template <bool kFar, class T>
FASTVAE_DEVICE void pull_columns(const Stage<T> &stage, int n, bool far_column, const Lanes<false> &lanes,
                                 const Pairs<T> &x, T *to_t, T *to_tt) {
    constexpr int R = kSide<T>;
    FASTVAE_NO_UNROLL
    for (int d = 0; d < n; ++d) {
        T z[R], a[R], b[R], t[R], tt[R];
        load_side(stage.z[d], lanes.row, z);
        load_side(stage.ab[d][0], lanes.column, a);
        load_side(stage.ab[d][1], lanes.column, b);
        FASTVAE_UNROLL
        for (int c = 0; c < R; ++c) {
            const Scaled<kFar, T> scaled(far_column, a[c], b[c]);
            t[c] = tt[c] = 0;
            FASTVAE_UNROLL
            for (int r = 0; r < R; ++r) {
                const T one = scaled(z[r]), rt = x[r][c] * one;
                t[c] += rt;
                tt[c] = kFar ? tt[c] + mul_(rt, one) : fma_(rt, one, tt[c]);
            }
        }
        add_up(t, lanes.column, to_t + d * kPanel<T>);
        add_up(tt, lanes.column, to_tt + d * kPanel<T>);
    }
}

// Adds the shares in columns whose weight is special, or those where it is not, to to[kPanel].
template <class T>
FASTVAE_DEVICE void add_shares(const Packed<T> &p, int64_t row_panel, int64_t column_panel, bool meets, bool special,
                               const Lanes<false> &lanes, const Pairs<T> &x, T *to) {
    constexpr int R = kSide<T>;
    T sum[R] = {};
    FASTVAE_UNROLL
    for (int r = 0; r < R; ++r) {
        const Special<T> of_row(p, meets ? row_panel * kPanel<T> + place<T>(lanes.row, r) : p.S, column_panel);
        FASTVAE_UNROLL
        for (int c = 0; c < R; ++c) sum[c] += of_row.has(place<T>(lanes.column, c)) == special ? x[r][c] : T(0);
    }
    add_up(sum, lanes.column, to);
}

template <class T> FASTVAE_DEVICE bool any_nonzero(const Pairs<T> &x) {
    bool any = false;
    FASTVAE_UNROLL
    for (int r = 0; r < kSide<T>; ++r) {
        FASTVAE_UNROLL
        for (int c = 0; c < kSide<T>; ++c) any |= x[r][c] != T(0);
    }
    return any;
}

template <class T, class Weigh, bool kFold>
__global__ __launch_bounds__(kThreads, kBlocks<T, kFold>) void pull_on_rows(Packed<T> p, Weigh weigh, int64_t tiles,
                                                                        RowParts<T> parts) {
    int panel = int(blockIdx.x);
    const int first = int(blockIdx.y * tiles);
    const int last = int(first + tiles < p.column_panels ? first + tiles : p.column_panels);
    const Lanes<true> lanes;
    Sweep<T, true> sweep(p);
    clear_part(parts.of(p, blockIdx.y, panel), p.D * kPanel<T>);
    __syncthreads();
    for (int column_panel = first; column_panel < last; ++column_panel) {
        forget(panel), forget(column_panel);
        Pairs<T> x;
        weigh.template operator()<kFold>(p, sweep, panel, column_panel, lanes, x);
        if (!__syncthreads_or(any_nonzero<T>(x))) continue;
        forget(panel), forget(column_panel);
        T *const to = parts.of(p, blockIdx.y, panel);
        const bool far_column = p.far_columns[column_panel], far = far_column || p.far_rows[panel];
        sweep.start(panel, column_panel, column_panel + 1);
        sweep.run([&](const Stage<T> &stage, int chunk, int n) {
            T *const at = to + int64_t(chunk) * p.dims * kPanel<T>;
            if (far)
                pull_rows<true>(stage, n, far_column, lanes, x, at);
            else
                pull_rows<false>(stage, n, far_column, lanes, x, at);
        });
    }
}

template <class T, class Weigh, bool kFold>
__global__ __launch_bounds__(kThreads, kBlocks<T, kFold>) void pull_on_columns(Packed<T> p, Weigh weigh, int64_t tiles,
                                                                           ColumnParts<T> parts) {
    int panel = int(blockIdx.x);
    const int first = int(blockIdx.y * tiles);
    const int last = int(first + tiles < p.row_panels ? first + tiles : p.row_panels);
    const Lanes<false> lanes;
    int64_t part = parts.at(p, blockIdx.y, panel);
    Sweep<T, false> sweep(p);
    clear_part(parts.t + part * p.D, p.D * kPanel<T>);
    clear_part(parts.tt + part * p.D, p.D * kPanel<T>);
    clear_part(parts.common + part, kPanel<T>);
    clear_part(parts.special + part, kPanel<T>);
    __syncthreads();
    for (int row_panel = first; row_panel < last; ++row_panel) {
        forget(panel), forget(row_panel);
        Pairs<T> x;
        weigh.template operator()<kFold>(p, sweep, panel, row_panel, lanes, x);
        if (!__syncthreads_or(any_nonzero<T>(x))) continue;
        forget(panel), forget(row_panel);
        part = parts.at(p, blockIdx.y, panel);
        const bool far_column = p.far_columns[panel], far = sums_far(p, panel);
        sweep.start(panel, row_panel, row_panel + 1);
        const bool meets = Weigh::kWeighted && meets_own(p, row_panel, panel);
        FASTVAE_NO_UNROLL
        for (int special = 0; special <= int(meets); ++special)
            add_shares(p, row_panel, panel, meets, special, lanes, x, (special ? parts.special : parts.common) + part);
        sweep.run([&](const Stage<T> &stage, int chunk, int n) {
            const int64_t at = part * p.D + int64_t(chunk) * p.dims * kPanel<T>;
            if (far)
                pull_columns<true>(stage, n, far_column, lanes, x, parts.t + at, parts.tt + at);
            else
                pull_columns<false>(stage, n, far_column, lanes, x, parts.t + at, parts.tt + at);
        });
    }
}

// d_z [S, D]
template <class In>
__global__ void finish_rows(Packed<Accumulator<In>> p, RowParts<Accumulator<In>> parts, In *d_z) {
    using T = Accumulator<In>;
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k >= p.S * p.D) return;
    const int64_t i = k / p.D, d = k % p.D;
    T sum = 0;
    for (int64_t part = 0; part < parts.count; ++part)
        sum += parts.of(p, part, i / kPanel<T>)[d * kPanel<T> + i % kPanel<T>];
    store(d_z + i * p.D + p.dimension(d), -kInvKappa2<T> * sum);
}

// d_mu and d_logvar [N, D], d_log_w [N]; those not wanted are null.
template <class In>
__global__ void finish_columns(Packed<Accumulator<In>> p, ColumnParts<Accumulator<In>> parts, In *d_mu, In *d_logvar,
                               Accumulator<In> *d_log_w) {
    using T = Accumulator<In>;
    constexpr int W = kPanel<T>;
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x, width = p.D < 1 ? 1 : p.D;
    if (k >= p.N * width) return;
    const int64_t j = k / width, d = k % width, panel = j / W, lane = j % W;
    T share = 0, common = 0;
    for (int64_t part = 0; part < parts.common_count; ++part) {
        const int64_t at = parts.at(p, part, panel) + lane;
        common += parts.common[at];
        if (part < parts.share_count) share += parts.common[at] + parts.special[at];
    }
    if (d == 0 && d_log_w) d_log_w[j] = common;
    if (p.D == 0) return;
    const T a = p.columns[(panel * p.D + d) * 2 * W + lane], up = sums_far(p, panel) ? scale_up(a) : T(1);
    const auto total = [&](const T *x, int64_t first, int64_t last) {
        T sum = 0;
        for (int64_t part = first; part < last; ++part) sum += x[parts.at(p, part, panel) * p.D + d * W + lane];
        return sum;
    };
    const int64_t scaled = parts.share_count;
    const T t = total(parts.t, 0, scaled) * up + total(parts.t, scaled, parts.count);
    const T tt = total(parts.tt, 0, scaled) * up * up + total(parts.tt, scaled, parts.count);
    const int64_t to = j * p.D + p.dimension(d);
    if (d_mu) store(d_mu + to, t * a * kInvKappa2<T>);
    if (d_logvar) store(d_logvar + to, T(0.5) * (tt * kInvKappa2<T> - share));
}

template <class In> struct Gradients {
    In *d_z, *d_mu, *d_logvar;
    Accumulator<In> *d_log_w;
    bool columns() const { return d_mu || d_logvar || d_log_w; }
};

// The gradients in all; `more` parts are another's to fill (agg_log_prob_marginals.cu), after this one's.
template <class In> struct Pull {
    using T = Accumulator<In>;
    Parts over_columns, over_rows;
    RowParts<T> rows;
    ColumnParts<T> columns;
    Pull(Arena &arena, const Packed<T> &p, bool joint, int64_t more_rows = 0, int64_t more_columns = 0)
        : over_columns(p.column_panels, kFull / (p.row_panels + 1)), over_rows(p.row_panels, kFull / (p.column_panels + 1)),
          rows(arena, p, (joint ? over_columns.count : 0) + more_rows),
          columns(arena, p, (joint ? over_rows.count : 0) + more_columns, joint ? over_rows.count : 0,
                  (joint ? over_rows.count : 0) + more_columns * p.D) {}

    template <class Weigh> int run(const Packed<T> &p, const Weigh &weigh, const Gradients<In> &out, Stream stream) const {
        if (out.d_z) {
            const auto kernel = folds(p.D) ? pull_on_rows<T, Weigh, true> : pull_on_rows<T, Weigh, false>;
            FASTVAE_TRY(launch(kernel, p.row_panels, over_columns.count, kThreads, stream, p, weigh, over_columns.size, rows));
        }
        if (out.columns()) {
            const auto kernel = folds(p.D) ? pull_on_columns<T, Weigh, true> : pull_on_columns<T, Weigh, false>;
            FASTVAE_TRY(launch(kernel, p.column_panels, over_rows.count, kThreads, stream, p, weigh, over_rows.size, columns));
        }
        return FASTVAE_CUDA_OK;
    }
    int finish(const Packed<T> &p, const Gradients<In> &out, Stream stream) const {
        if (out.d_z) FASTVAE_TRY(launch(finish_rows<In>, ceil_div(p.S * p.D, kThreads), 1, kThreads, stream, p, rows, out.d_z));
        if (!out.columns()) return FASTVAE_CUDA_OK;
        return launch(finish_columns<In>, ceil_div(p.N * (p.D < 1 ? 1 : p.D), kThreads), 1, kThreads, stream, p, columns,
                      out.d_mu, out.d_logvar, out.d_log_w);
    }
};

}  // namespace fastvae::FASTVAE_ISA
