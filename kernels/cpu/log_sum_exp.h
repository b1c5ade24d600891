// A streaming log2 sum_j 2^s_j: neutral element (-inf, 0), a chunk of terms at a time.
#pragma once

#include "elementary.h"
#include "log_sum.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct LogSumExp {
    T max = -kInf<T>;
    Vec<T> sum = {};    // of 2^(s - shift()), per lane
    Vec<T> carry = {};  // what sum has too much, after Kahan: chunks may be thousands

    // An infinite maximum is not subtracted: the terms then are 2^-inf = 0 or 2^inf, which is infinite.
    T shift() const { return max - max == T(0) ? max : T(0); }

    // terms(k) for k in [0, n), twice: once for the maximum, and once for the exponentials, of which seen(k, 2^(s - m))
    // is told, m being shift() from then on
    template <class F, class G> FASTVAE_INLINE void add(int64_t n, const F &terms, const G &seen) {
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
        const auto term = [&](int64_t at) __attribute__((always_inline)) {
            const Vec<T> p = exp2_share<T>(terms(at) - m);
            seen(at, p);
            return p;
        };
        for (k = 0; k + 2 <= n; k += 2) {
            part[0] += term(k);
            part[1] += term(k + 1);
        }
        if (k < n) part[0] += term(k);
        const Vec<T> rescale = exp2_<T>(splat(before - m));  // exactly 1 while the maximum stays
        const Vec<T> old = sum * rescale, more = (part[0] + part[1]) - carry * rescale;
        sum = old + more;
        carry = (sum - old) - more;
    }
    template <class F> FASTVAE_INLINE void add(int64_t n, const F &terms) {
        add(n, terms, [](int64_t, Vec<T>) {});
    }
    FASTVAE_INLINE void add(Vec<T> terms) {
        add(1, [&](int64_t) { return terms; });
    }

    using Total = LogSum;
    Total total() const { return {double(shift()), double(sum_lanes<T>(sum))}; }
};

// g 2^s / total: a term's share in its sum times g, 0 where the sum is empty. Shares of one row add up to g as the
// terms, seen again to the last bit, add up to the total; from the rounded log of the sum they would not.
template <class T> class Share {
public:
    Share(const typename LogSumExp<T>::Total &total, T g)
        : shift_(T(total.shift)), factor_(total.sum == 0 ? T(0) : T(double(g) / total.sum)) {}
    FASTVAE_INLINE Vec<T> operator()(Vec<T> s) const { return of(exp2_share<T>(s - shift_)); }
    FASTVAE_INLINE Vec<T> of(Vec<T> p) const { return factor_ * p; }  // p = 2^(s - the total's shift)

private:
    T shift_, factor_;
};

}  // namespace fastvae::FASTVAE_ISA
