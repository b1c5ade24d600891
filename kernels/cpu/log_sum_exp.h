// A streaming log2 sum_j 2^s_j: neutral element (-inf, 0), a chunk of terms at a time.
#pragma once

#include "elementary.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct LogSumExp {
    T max = -kInf<T>;
    Vec<T> sum = {};    // of 2^(s - shift()), per lane
    Vec<T> carry = {};  // what sum has too much, after Kahan: chunks may be thousands

    // Infinite maxima are sums' own business: 2^-inf is 0, and 2^inf infinite.
    T shift() const { return max - max == T(0) ? max : T(0); }

    // terms(k) for k in [0, n), twice: once for the maximum, and once for the exponentials
    template <class F> FASTVAE_INLINE void add(int64_t n, const F &terms) {
        Vec<T> top[2] = {splat(max), splat(max)};
        int64_t k = 0;
        for (; k + 2 <= n; k += 2) {
            top[0] = max_<T>(terms(k), top[0]);  // passes NaN over: the sum will have it
            top[1] = max_<T>(terms(k + 1), top[1]);
        }
        if (k < n) top[0] = max_<T>(terms(k), top[0]);
        const T before = max;
        max = max_lanes<T>(max_<T>(top[0], top[1]));
        const T m = shift();

        Vec<T> part[2] = {};
        for (k = 0; k + 2 <= n; k += 2) {
            part[0] += exp2_term<T>(terms(k) - m);
            part[1] += exp2_term<T>(terms(k + 1) - m);
        }
        if (k < n) part[0] += exp2_term<T>(terms(k) - m);
        const Vec<T> rescale = exp2_<T>(splat(before - m));  // exactly 1 while the maximum stays
        const Vec<T> old = sum * rescale, term = (part[0] + part[1]) - carry * rescale;
        sum = old + term;
        carry = (sum - old) - term;
    }
    FASTVAE_INLINE void add(Vec<T> terms) {
        add(1, [&](int64_t) { return terms; });
    }

    // In nats. The sum is taken apart in T and put together in double.
    double log() const { return double(shift()) * kLn2 + double(std::log(sum_lanes<T>(sum))); }
};

// g 2^(s - log2 sum): a term's share in its sum, given in nats and rounded to T, times g; 0 where the sum is empty.
//
// That rounding is |log sum| eps / 2, which would be the share's relative error. A term that is all of its sum up to
// this much counts as all of it, which keeps rows with one near posterior exact.
template <class T> class Share {
public:
    Share(T log_sum, T g) : g_(log_sum == -kInf<T> ? T(0) : g) {
        const double log2_sum = log_sum == -kInf<T> ? double(kInf<T>) : double(log_sum) * kLog2e;
        high_ = T(log2_sum);
        low_ = log_sum - log_sum == T(0) ? T(log2_sum - double(high_)) : T(0);
        slack_ = T(-0.5) * Elementary<T>::kEpsilon * (high_ < T(0) ? -high_ : high_);
    }
    FASTVAE_INLINE Vec<T> operator()(Vec<T> s) const {
        const Vec<T> x = (s - high_) - low_;
        return g_ * exp2_<T>(select<T>(x >= slack_, Vec<T>{}, x));
    }

private:
    T g_, high_, low_, slack_;
};

}  // namespace fastvae::FASTVAE_ISA
