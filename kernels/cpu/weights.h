// log w_ij of the weighted log-sum-exp (fastvae.h, FASTVAE_WEIGHTS), in base 2.
#pragma once

#include "fastvae.h"
#include "simd.h"

namespace fastvae::FASTVAE_ISA {

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942, kLog2Pi = 1.83787706640934548356;

// What stands in place of the common column weight for one sample: at most the own and the next column.
template <class T> struct Overrides {
    int count = 0;
    int64_t column[2];
    T log2_w[2];
};

template <class T> struct Weights {
    const T *log_w;  // [N] or null
    double log_w_all;
    const int64_t *own;  // [S] or null
    double log_w_own, log_w_next;
    int64_t N;

    Weights(FASTVAE_WEIGHTS, int64_t N)
        : log_w(static_cast<const T *>(log_w)), log_w_all(log_w_all), own(own), log_w_own(log_w_own),
          log_w_next(log_w_next), N(N) {}

    double log2_w(int64_t j) const { return (log_w ? double(log_w[j]) : log_w_all) * kLog2e; }

    FASTVAE_INLINE Overrides<T> overrides(int64_t i) const {
        Overrides<T> o;
        if (!own || own[i] < 0 || own[i] >= N) return o;
        const int64_t next = own[i] + 1 < N ? own[i] + 1 : 0;
        const bool has_own = log_w_own == log_w_own, has_next = log_w_next == log_w_next;
        if (has_own) add(o, own[i], log_w_own);
        if (has_next && !(has_own && next == own[i])) add(o, next, log_w_next);
        return o;
    }

private:
    static FASTVAE_INLINE void add(Overrides<T> &o, int64_t column, double log_w) {
        o.column[o.count] = column;
        o.log2_w[o.count++] = T(log_w * kLog2e);
    }
};

}  // namespace fastvae::FASTVAE_ISA
