// The streaming log2 sum_j 2^s_ij of samples, in ranges of columns, and how these meet. The joint's rows have a maximum
// and a sum in one lane of 16, the marginals' in each lane, of its own columns; m is finite, so that no difference is NaN:
// the neutral element is (-largest, 0). NaN is passed over by the maximum, and found in the sum.
#pragma once

#include "log_sum.h"
#include "tile.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct RowSum {
    T m = -largest<T>(), sum = 0;  // 2^m sum
    T carry = 0;                   // what sum has too much, after Kahan: tiles may be thousands

    // Adds numbers 2^(s - m).
    template <int n> FASTVAE_DEVICE void add(const T (&p)[n]) {
        T part = p[0];
        FASTVAE_UNROLL
        for (int k = 1; k < n; ++k) part += p[k];
        add(part);
    }
    FASTVAE_DEVICE void add(T part) {
        const T old = sum, term = part - carry;
        sum = old + term;
        carry = (sum - old) - term;
    }
    // Terms s; p = 2^(s - m) and what earlier sums were multiplied by come back. `fixed`: m stays what it is.
    template <int n> FASTVAE_DEVICE T add(const T (&s)[n], T (&p)[n], bool fixed = false) {
        T top = m;
        FASTVAE_UNROLL
        for (int k = 0; k < n && !fixed; ++k) top = max_(s[k], top);
        top = min_(top, largest<T>());
        T part = 0;
        FASTVAE_UNROLL
        for (int k = 0; k < n; ++k) {
            p[k] = exp2_(s[k] - top);
            part += p[k];
        }
        return add(part, top);
    }
    // Adds numbers 2^(s - top); m becomes top, which is no less than m.
    FASTVAE_DEVICE T add(T part, T top) {
        const T rescale = exp2_(m - top), old = sum * rescale, term = fma_(-carry, rescale, part);
        sum = old + term;
        carry = (sum - old) - term;
        m = top;
        return rescale;
    }
    // Adds up with 16 neighbouring lanes; `extra` is a sum that is added up along with it.
    FASTVAE_DEVICE void across_lanes(T &extra) {
        const T mine = m;
        FASTVAE_UNROLL
        for (int offset = kLanes / 2; offset; offset /= 2) m = max_(m, __shfl_xor_sync(~0u, m, offset));
        const T rescale = exp2_(mine - m);
        sum = (sum - carry) * rescale;
        extra = times(rescale, extra);
        FASTVAE_UNROLL
        for (int offset = kLanes / 2; offset; offset /= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            extra += __shfl_xor_sync(~0u, extra, offset);
        }
    }
};

// m and sum of each range of columns, [ranges][size]
template <class T> struct RangeSums {
    T *m, *sum;
    int64_t ranges, size;
    RangeSums(Arena &arena, int64_t ranges, int64_t size)
        : m(arena.take<T>(ranges * size)), sum(arena.take<T>(ranges * size)), ranges(ranges), size(size) {}
    FASTVAE_DEVICE LogSum total(int64_t at) const {
        LogSum total{0, 0};
        for (int64_t k = 0; k < ranges; ++k) total.add({double(m[k * size + at]), double(sum[k * size + at])});
        return total;
    }
};

// Shares of row i in g_i are factor_i 2^(s_ij - m_i): they add up to g_i, as the terms, seen again to the last bit, add
// up to the total.
template <class T> struct Shares {
    T *m, *factor;
    Shares(Arena &arena, int64_t size) : m(arena.take<T>(size)), factor(arena.take<T>(size)) {}
    FASTVAE_DEVICE void set(int64_t at, const LogSum &total, T g) const {
        m[at] = T(total.shift);
        factor[at] = total.sum == 0 ? T(0) : T(double(g) / total.sum);
    }
};

// A block takes a panel of samples and a range of `tiles` panels of columns.
template <class T, bool kFold, bool kEarly>
__global__ __launch_bounds__(kThreads, kBlocks<T, kFold>) void joint_sums(Packed<T> p, int64_t tiles, RangeSums<T> sums) {
    constexpr int R = kSide<T>;
    int panel = int(blockIdx.x);
    const int first = int(blockIdx.y * tiles);
    const int last = int(first + tiles < p.column_panels ? first + tiles : p.column_panels);
    const Lanes<true> lanes;
    int mine = place<T>(lanes.row, summed_number<T>());  // the row that this lane sums up
    const auto i = [&] { return int64_t(panel) * kPanel<T> + mine; };
    RowSum<T> row;
    T(&tops)[kPanel<T>] = shared_memory<Stages<T>>().tops;
    // A sum may be relative to any of the row's terms, also those of other blocks.
    if (kEarly) row.m = i() < p.S ? p.exit.likely[i()] : largest<T>();
    tops[mine] = row.m;
    Sweep<T, true> sweep(p);
    sweep.start(panel, first, last);
    for (int column_panel = first; column_panel < last; ++column_panel) {
        Pairs<T> s;
        const auto limit = [&](int r) { return p.exit.reach[column_panel] - tops[place<T>(lanes.row, r)]; };
        const bool may = kEarly && may_stop(p, panel, column_panel);
        if (square_sums<kFold, kEarly>(sweep, p.far_columns[column_panel], lanes, s, may, limit)) continue;
        int here = column_panel;
        forget(here);
        to_terms(p, panel, here, meets_own(p, panel, here), lanes, s);
        T part[R], m[R];
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            part[r] = s[r][0];
            FASTVAE_UNROLL
            for (int c = 1; c < R; ++c) part[r] = max_(s[r][c], part[r]);
        }
        const T top = min_(max_(max_over_lanes(part), row.m), largest<T>());
        tops[mine] = top;  // which nobody has read since a barrier
        __syncwarp();
        load_side(tops, lanes.row, m);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            part[r] = 0;
            FASTVAE_UNROLL
            for (int c = 0; c < R; ++c) part[r] += exp2_(s[r][c] - m[r]);
        }
        row.add(sum_over_lanes(part), top);
    }
    forget(panel), forget(mine);
    if (!writes_sum<T>() || i() >= p.S) return;
    sums.m[blockIdx.y * p.S + i()] = row.m;
    sums.sum[blockIdx.y * p.S + i()] = row.sum - row.carry;
}

// joint [S], unless it is null, and where there is an upstream gradient the shares in it
template <class T>
__global__ void combine_joint(Packed<T> p, RangeSums<T> sums, T *joint, const T *d_joint, Shares<T> shares) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= sums.size) return;
    const LogSum total = sums.total(i);
    if (joint) joint[i] = T(total.log());
    if (!d_joint) return;
    shares.set(i, total, d_joint[i]);
    if (p.early) set_floors(p, i, total, d_joint[i]);
}

// The joint in all: how its work is divided, what it needs, and its kernels
template <class T> struct Joint {
    Parts ranges;
    RangeSums<T> sums;
    Shares<T> shares;
    Joint(Arena &arena, const Packed<T> &p, bool backward)
        : ranges(p.column_panels, kFull / (p.row_panels + 1)), sums(arena, ranges.count, p.S),
          shares(arena, backward ? p.S : 0) {}

    int run(const Packed<T> &p, T *joint, const T *d_joint, Stream stream) const {
        const auto early = folds(p.D) ? joint_sums<T, true, true> : joint_sums<T, false, true>;
        const auto plain = folds(p.D) ? joint_sums<T, true, false> : joint_sums<T, false, false>;
        const auto kernel = p.early ? early : plain;
        FASTVAE_TRY(launch(kernel, p.row_panels, ranges.count, kThreads, stream, p, ranges.size, sums));
        FASTVAE_TRY(launch(combine_joint<T>, ceil_div(p.S, kThreads), 1, kThreads, stream, p, sums, joint, d_joint, shares));
        return p.early && d_joint ? launch(set_reaches<T>, p.column_panels, 1, kThreads, stream, p) : FASTVAE_CUDA_OK;
    }
};

}  // namespace fastvae::FASTVAE_ISA
