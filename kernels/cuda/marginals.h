// The sums of marginals over columns: a block takes a panel of samples in one dimension and walks over columns. Bound
// by exponentials, so that operands come straight from the cache.
//
// There is no running maximum. Terms are relative to a base that is known before (marginal_base): of the largest terms
// that the columns can have in that dimension, the one nearest 0. So no column loses digits to another, however much
// larger, and terms are moderate. A sum that comes out so small that lost terms could matter (its sample 10 sigma away
// from every column), or that is not finite, is taken again by its block, with its own maximum; in a dimension where
// terms may be too large for exp2_by_polynomial (marginal_known) all are taken so.
#pragma once

#include "exponentials.h"
#include "row_sums.h"

namespace fastvae::FASTVAE_ISA {

// How many of 64 pairs have their exponential from a polynomial of ten instructions, while the others' come from the
// special-function unit, which takes the time of eight instructions. The best number depends on what else a pair takes,
// with kPull or without.
template <class T, bool kPull> constexpr int kByPolynomial = sizeof(T) == 8 ? 0 : kPull ? 4 : 11;
template <class T, bool kPull> FASTVAE_DEVICE T exp2_of_pair(int pair, T s) {
    constexpr int n = kByPolynomial<T, kPull>;
    return (pair + 1) * n / 64 > pair * n / 64 ? exp2_by_polynomial(s) : exp2_(s);
}

// One dimension d of a tile: t, and the terms s_ij = log2 w_ij q(z_id | x_j) less the dimension's base.
template <class T, bool kOwnsRows> struct OneDimension {
    static constexpr int R = kSide<T>, W = kPanel<T>;
    const Packed<T> &p;
    const int64_t d;
    const Lanes<kOwnsRows> lanes;
    const T base;
    T z[R], a[R], b[R], cw[R];

    FASTVAE_DEVICE OneDimension(const Packed<T> &p, int64_t d) : p(p), d(d), base(p.marginal_base[d]) {}
    FASTVAE_DEVICE void load_row(int64_t panel) { load_side(p.samples + (panel * p.D + d) * W, lanes.row, z); }
    FASTVAE_DEVICE void load_column(int64_t panel) {
        const int64_t at = (panel * p.D + d) * W;
        load_side(p.columns + 2 * at, lanes.column, a);
        load_side(p.columns + 2 * at + W, lanes.column, b);
        load_side(p.marginal_cw + at, lanes.column, cw);
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) cw[k] -= base;
    }
    // t of row r
    FASTVAE_DEVICE void standardize(int r, bool far_column, T (&t)[R]) const {
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) t[k] = standardized<false>(z[r], a[k], b[k]);
        if (!far_column) return;
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) t[k] = standardized<true>(z[r], a[k], b[k]);
    }
    // Finite for finite inputs, so that 0 t is 0
    FASTVAE_DEVICE static void hold_finite(bool far, T (&t)[R]) {
        if (!far) return;
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) t[k] = min_(max_(t[k], -largest<T>()), largest<T>());
    }
    FASTVAE_DEVICE void terms(int64_t row_panel, int64_t column_panel, bool meets, int r, const T (&t)[R],
                              T (&s)[R]) const {
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) s[k] = minus_square(cw[k], t[k]);
        if (!meets) return;
        const Special<T> special(p, row_panel * W + place<T>(lanes.row, r), column_panel);
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) {
            const int at = place<T>(lanes.column, k);
            if (!special.has(at)) continue;
            const T c = p.marginal_c[(column_panel * p.D + d) * W + at];
            s[k] = minus_square(c + special.log2_w(at) - base, t[k]);
        }
    }

private:
    static FASTVAE_DEVICE T minus_square(T c, T t) { return sizeof(T) == 4 ? fma_(-t, t, c) : minus_squares(c, t * t); }
};

// marginal_base and marginal_known [D], of cw, and of c with the weights that stand instead. A block takes a dimension.
template <class T> __global__ void find_bases(Packed<T> p) {
    constexpr int W = kPanel<T>, kWarps = kThreads / 32;
    constexpr T kHighest = 100;
    T(&extremes)[2][kWarps] = shared_memory<T[2][kWarps]>();
    const int64_t d = blockIdx.x;
    const Weights<T> &w = p.weights;
    T high = -largest<T>(), minus_low = -largest<T>();
    const auto see = [&](T cw) {
        if (abs_(cw) < infinity<T>()) high = max_(high, cw), minus_low = max_(minus_low, -cw);
    };
    for (int64_t k = threadIdx.x; k < p.column_panels * W; k += kThreads) {
        const int64_t at = (k / W * p.D + d) * W + k % W;
        see(p.marginal_cw[at]);
        if (k < p.N && w.own) see(p.marginal_c[at] + w.log2_w_own), see(p.marginal_c[at] + w.log2_w_next);
    }
    for (int offset = 16; offset; offset /= 2) {
        high = max_(high, __shfl_xor_sync(~0u, high, offset));
        minus_low = max_(minus_low, __shfl_xor_sync(~0u, minus_low, offset));
    }
    if (threadIdx.x % 32 == 0) extremes[0][threadIdx.x / 32] = high, extremes[1][threadIdx.x / 32] = minus_low;
    __syncthreads();
    if (threadIdx.x) return;
    for (int k = 1; k < kWarps; ++k) high = max_(high, extremes[0][k]), minus_low = max_(minus_low, extremes[1][k]);
    const T base = high < -minus_low ? T(0) : high < T(0) ? high : -minus_low > T(0) ? -minus_low : T(0);
    p.marginal_base[d] = base;
    p.marginal_known[d] = high - base <= kHighest;
}

// A panel of samples in one dimension against panels of columns.
template <class T, bool kPull> struct MarginalRows {
    static constexpr int R = kSide<T>;
    OneDimension<T, true> tile;
    RowSum<T> rows[R];
    T pull[R];  // with kPull, sum_j 2^(s - m) t a

    // All panels of columns; with m = 0, and then again with the maximum if sums were lost
    FASTVAE_DEVICE void add_up(int64_t panel, int first, int last) {
        const Packed<T> &p = tile.p;
        const OwnPanels<T> own(p, panel);
        FASTVAE_NO_UNROLL
        for (bool known = p.marginal_known[tile.d];; known = false) {
            const int plain_until = known && !p.far_rows[panel] ? last : first;
            FASTVAE_UNROLL
            for (int r = 0; r < R; ++r) rows[r] = {known ? T(0) : -largest<T>()}, pull[r] = T(0);
            for (int at = first; at < last; ++at) {
                for (; at < plain_until && !p.far_columns[at] && !own.has(at); ++at) add_tile<true>(panel, at, true);
                if (at < last) add_tile<false>(panel, at, known);
            }
            FASTVAE_UNROLL
            for (int r = 0; r < R; ++r) rows[r].across_lanes(pull[r]);
            if (!known || !__syncthreads_or(any_lost(panel, int64_t(last - first) * kPanel<T>))) return;
        }
    }

private:
    // Whether a sum with m = 0 is one that terms of less than 2^-126 could have added to, or not finite.
    FASTVAE_DEVICE bool any_lost(int64_t panel, int64_t columns) const {
        constexpr T kLost = sizeof(T) == 4 ? T(0x1p-96) : T(0x1p-960), kHuge = T(0x1p100);
        bool lost = false;
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            const bool there = panel * kPanel<T> + place<T>(tile.lanes.row, r) < tile.p.S;
            lost |= there && !(rows[r].sum > kLost * T(columns) && rows[r].sum < kHuge);
        }
        return lost;
    }
    // kPlain: nothing is far, nor are own columns near, and m is known; `known`: whether m is, or the maximum so far.
    template <bool kPlain> FASTVAE_DEVICE void add_tile(int64_t panel, int64_t column_panel, bool known) {
        const Packed<T> &p = tile.p;
        const bool far_column = !kPlain && p.far_columns[column_panel];
        const bool far = !kPlain && (far_column || p.far_rows[panel]);
        const bool meets = !kPlain && meets_own(p, panel, column_panel);
        tile.load_column(column_panel);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            T t[R], s[R];
            tile.standardize(r, far_column, t);
            tile.terms(panel, column_panel, meets, r, t, s);
            if (kPlain) {
                FASTVAE_UNROLL
                for (int k = 0; k < R; ++k) s[k] = exp2_of_pair<T, kPull>(r * R + k, s[k]);
                rows[r].add(s);
            } else {
                pull[r] *= rows[r].add(s, s, known);
            }
            if (!kPull) continue;
            tile.hold_finite(far, t);
            FASTVAE_UNROLL
            for (int k = 0; k < R; ++k) pull[r] = fma_(s[k] * t[k], tile.a[k], pull[r]);
        }
    }
};

// m and sum of each range, [ranges][D][S], m less the dimension's base; with kPull also sum_j 2^(s - m) t a.
template <class T, bool kPull>
__global__ __launch_bounds__(kThreads, kBlocks<T>) void marginal_sums(Packed<T> p, int64_t tiles, RangeSums<T> sums,
                                                                      T *pulls) {
    const int64_t panel = blockIdx.x / p.D, d = blockIdx.x % p.D;
    const int first = int(blockIdx.y * tiles);
    const int last = int(first + tiles < p.column_panels ? first + tiles : p.column_panels);
    MarginalRows<T, kPull> all{{p, d}, {}, {}};
    all.tile.load_row(panel);
    all.add_up(panel, first, last);
    FASTVAE_UNROLL
    for (int r = 0; r < kSide<T>; ++r) {
        const int64_t i = panel * kPanel<T> + place<T>(all.tile.lanes.row, r), at = (blockIdx.y * p.D + d) * p.S + i;
        if (all.tile.lanes.column || i >= p.S) continue;
        sums.m[at] = all.rows[r].m;
        sums.sum[at] = all.rows[r].sum;
        if (kPull) pulls[at] = all.pull[r];
    }
}

}  // namespace fastvae::FASTVAE_ISA
