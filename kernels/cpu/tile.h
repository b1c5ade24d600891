// The register tile: kTileRows samples against one panel of columns, sum_d t^2 for every pair.
//
// Accumulators stay in registers while d runs, in two sets (even and odd d): 6 x 2 vectors x 2 sets of 32
// registers, or 6 x 1 x 2 of 16. Per d a tile reads 2 vectors per vector of columns and broadcasts 6 samples.
#pragma once

#include "panels.h"

namespace fastvae::FASTVAE_ISA {

constexpr int kTileRows = 6;

// Columns are taken a chunk at a time, whose panels stay in a share of the L2 cache while rows go through them.
constexpr int64_t kMaxChunkColumns = 512, kChunkBytes = 256 << 10;

FASTVAE_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
    x = x < high ? x : high;
    return x > low ? x : low;
}
FASTVAE_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class T> FASTVAE_INLINE int64_t chunk_panels(int64_t D) {
    constexpr int64_t W = kPanelWidth<T>, kMax = kMaxChunkColumns / W;
    return clamp(kChunkBytes / ((D + 1) * 2 * W * int64_t(sizeof(T))), 1, kMax);
}

// Rows first .. first + 5 of z [S, D], centred and in the panels' order, as [D][kTileRows]; rows past S are 0.
template <class T>
FASTVAE_INLINE void pack_rows(const Panels<T> &panels, const T *z, int64_t first, int64_t S, T *packed) {
    const int64_t D = panels.D, *const order = panels.order();
    for (int64_t r = 0; r < kTileRows; ++r) {
        const bool inside = first + r < S;
        const T *row = z + (first + r) * D;
        for (int64_t d = 0; d < D; ++d)
            packed[d * kTileRows + r] = inside ? row[order[d]] - panels.centre()[d] : T(0);
    }
}

// t of sample z against columns (a, b), see panels.h
template <bool kDirect, class T> FASTVAE_INLINE Vec<T> standardized(T z, Vec<T> a, Vec<T> b) {
    if constexpr (kDirect)
        return (splat(z) - b) * a;
    else
        return splat(z) * a - b;
}

constexpr int64_t kExitStep = 8;  // dimensions between two looks at whether a tile can stop (early_exit.h)

// rows [D][kTileRows], planes [D][2][W] -> out: row r at out + r * stride, W values each; 0.
// Where it may stop it does so, before out is written, once all sums of a row r are above limits[r], and returns how many
// dimensions it has seen.
template <bool kDirect, bool kMayStop = false, class T>
__attribute__((noinline)) int64_t square_sums(const T *rows, const T *planes, int64_t D, T *out, int64_t stride,
                                              const T *limits = nullptr) {
    constexpr int V = kPanelVectors, R = kTileRows, L = kLanes<T>, W = kPanelWidth<T>;
    constexpr int64_t kFold = 128;  // long sums are of two levels
    for (int64_t begin = 0; begin == 0 || begin < D; begin += kFold) {
        const int64_t end = D < begin + kFold ? D : begin + kFold;
        Vec<T> sum[2][R][V] = {};
        const auto add = [&](int set) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    const Vec<T> t = standardized<kDirect>(rows[r], load(planes + v * L), load(planes + W + v * L));
                    sum[set][r][v] += t * t;
                }
            rows += R;
            planes += 2 * W;
        };
        // Limits are no NaN where they count; see min_ on sums that are.
        const auto all_far = [&]() __attribute__((always_inline)) {
            Vec<T> least = splat(kInf<T>);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    Vec<T> so_far = sum[0][r][v] + sum[1][r][v];
                    if (begin) so_far += load(out + r * stride + v * L);
                    least = min_<T>(least, so_far - limits[r]);
                }
            return all_positive<T>(least);
        };
        int64_t d = begin;
        for (; d + 2 <= end; d += 2) {
            add(0);
            add(1);
            if constexpr (kMayStop)
                if ((d + 2) % kExitStep == 0 && d + 2 < D && all_far()) return d + 2;
        }
        if (d < end) add(0);
        if constexpr (kMayStop)
            if (end == D && all_far()) return D;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                T *const to = out + r * stride + v * L;
                const Vec<T> total = sum[0][r][v] + sum[1][r][v];
                store(to, begin ? load(to) + total : total);
            }
    }
    return 0;
}

// rows [D][kTileRows] against `count` panels from `first` on -> out [kTileRows][count W]
template <class T>
FASTVAE_INLINE void square_sums(const Panels<T> &panels, const T *rows, int64_t first, int64_t count, T *out) {
    constexpr int64_t W = kPanelWidth<T>;
    const auto tile = panels.direct ? &square_sums<true, false, T> : &square_sums<false, false, T>;
    for (int64_t p = 0; p < count; ++p)
        tile(rows, panels.planes(first + p), panels.D, out + p * W, count * W, nullptr);
}

// rows against panel p -> out and 0, or how many dimensions showed that it is far; null limits: it cannot be
template <class T>
FASTVAE_INLINE int64_t square_sums_unless_far(const Panels<T> &panels, const T *rows, int64_t p, T *out,
                                              int64_t stride, const T *limits) {
    const auto tile = panels.direct ? limits ? &square_sums<true, true, T> : &square_sums<true, false, T>
                      : limits      ? &square_sums<false, true, T>
                                    : &square_sums<false, false, T>;
    return tile(rows, panels.planes(p), panels.D, out, stride, limits);
}

}  // namespace fastvae::FASTVAE_ISA
