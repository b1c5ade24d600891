// log w_ij of the weighted log-sum-exp (fastvae.h, FASTVAE_WEIGHTS), in base 2.
#pragma once

#include "fastvae.h"
#include "portable.h"

namespace fastvae::FASTVAE_ISA {

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942, kLog2Pi = 1.83787706640934548356;

template <class T> struct Weights {
    const T *log_w;  // [N] or null
    double log_w_all;
    const int64_t *own;  // [S] or null
    T log2_w_own, log2_w_next;  // NaN: the common one
    int64_t N;

    Weights(FASTVAE_WEIGHTS, int64_t N)
        : log_w(static_cast<const T *>(log_w)), log_w_all(log_w_all), own(own),
          log2_w_own(T(log_w_own * kLog2e)), log2_w_next(T(log_w_next * kLog2e)), N(N) {}

    FASTVAE_SHARED double log2_w(int64_t j) const { return (log_w ? double(log_w[j]) : log_w_all) * kLog2e; }

    FASTVAE_SHARED bool any_overrides() const { return own && (log2_w_own == log2_w_own || log2_w_next == log2_w_next); }

    // f(j, log2_w) for the columns, at most two, whose weight for sample i is not the common one.
    template <class F> FASTVAE_SHARED void overrides(int64_t i, const F &f) const {
        if (!own || own[i] < 0 || own[i] >= N) return;
        const int64_t next = own[i] + 1 < N ? own[i] + 1 : 0;
        const bool has_own = log2_w_own == log2_w_own, has_next = log2_w_next == log2_w_next;
        if (has_own) f(own[i], log2_w_own);
        if (has_next && !(has_own && next == own[i])) f(next, log2_w_next);
    }

    // Takes those pairs out of row i's sums of squares over columns [first, first + n): infinity stays behind,
    // whose density is 0, and f(j - first, s) gets the term s = c_j + log2_w - squares. The sum of column j is at
    // squares[place(j - first)].
    template <class F, class G>
    FASTVAE_SHARED void take_overrides(int64_t i, int64_t first, int64_t n, const T *c, T *squares, const F &f,
                                       const G &place) const {
        overrides(i, [&](int64_t j, T log2_w) {
            if (j < first || j >= first + n) return;
            T &square = squares[place(j - first)];
            f(j - first, c[j] - square + log2_w);
            square = T(__builtin_inf());
        });
    }
    template <class F>
    FASTVAE_SHARED void take_overrides(int64_t i, int64_t first, int64_t n, const T *c, T *squares, const F &f) const {
        take_overrides(i, first, n, c, squares, f, [](int64_t k) { return k; });
    }
};

}  // namespace fastvae::FASTVAE_ISA
