// The columns (posteriors) of the cross-evaluated kernels, packed once per call so that vector lanes run over
// columns: panel p holds columns [p W, (p + 1) W), its planes [D][2][W]:
//     a = kappa exp(-logvar / 2),   b = (mu - centre) a,   kappa = sqrt(log2(e) / 2),
// so that t = (z - centre) a - b is one FMA and sum_d t^2 is the Gaussian's quadratic form in bits:
//     log2 q(z_i | x_j) = c_j - sum_d t_ijd^2.
//
// b costs |b| eps / 2 of t, no more than a half-ulp change of the centred mu would. Where some |b| passes
// kMaxOffset, or a number is extreme or not finite, the panels are `direct`: b is mu itself, nothing is centred,
// and t = (z - mu) a takes three operations and rounds as the broadcast formula does.
#pragma once

#include "buffer.h"
#include "elementary.h"
#include "parallel.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

// 32 vector registers hold the accumulators of two vectors of columns, 16 those of one (tile.h).
#if FASTVAE_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kPanelVectors = 2;
#else
constexpr int kPanelVectors = 1;
#endif
template <class T> constexpr int kPanelWidth = kPanelVectors * kLanes<T>;

constexpr double kMaxOffset = 128;
constexpr double kModerate = 0x1p30;  // a, and z - centre within half of it: t^2 cannot overflow
constexpr double kKappaHigh = 0x1.b2da4e8p-1, kKappaLow = 2.7978991086394715e-09;  // sqrt(log2(e) / 2)
constexpr double kKappa = kKappaHigh + kKappaLow;
constexpr double kInvKappa2 = 1.38629436111989061883;  // 1 / kappa^2 = 2 ln 2

template <class T> constexpr T kLargest = sizeof(T) == 4 ? T(3.40282346638528859812e38) : T(1.7976931348623157e308);

// Whether all of x [n] can be standardized, and squared, without overflow. A backward needs it: 0 * infinity is NaN.
template <class T> bool all_moderate(const T *x, int64_t n) {
    IVec<T> outside = {};
    for_each_vector<T>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
        const Vec<T> v = load_some(x + i, lanes);
        outside |= ~((v <= T(kModerate / 2)) & (v >= T(-kModerate / 2)));
    });
    return !any_lane<T>(outside);
}

template <class T> bool all_finite(const T *x, int64_t n) {
    IVec<T> odd = {};
    for_each_vector<T>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
        const Vec<T> v = load_some(x + i, lanes);
        odd |= ~(v - v == T(0));
    });
    return !any_lane<T>(odd);
}

// A finite double stays finite as a T.
template <class T> FASTVAE_INLINE T to_finite(double x) {
    constexpr double kMax = double(kLargest<T>);
    if constexpr (sizeof(T) == 8) return x;
    return T(__builtin_isinf(x) ? x : x > kMax ? kMax : x < -kMax ? -kMax : x);
}

template <class T> class Panels {
public:
    static constexpr int W = kPanelWidth<T>;
    const int64_t N, D, count;
    bool direct = false;
    bool extreme = false;  // t^2 may overflow; then `direct` too

    Panels(int64_t N, int64_t D)
        : N(N), D(D), count((N + W - 1) / W), planes_(count * D * 2 * W), c_(count * W), cw_(count * W), centre_(D),
          order_(D), spread_(D), reach_(count), steep_(count), least_a_(count) {
        for (int64_t d = 0; d < D && order_; ++d) order_[d] = d;
    }

    bool allocated() const {
        return planes_ && c_ && cw_ && centre_ && order_ && spread_ && reach_ && steep_ && least_a_;
    }

    int64_t columns(int64_t p) const { return N - p * W < W ? N - p * W : W; }  // of panel p, without padding
    const T *planes(int64_t p) const { return planes_ + p * D * 2 * W; }  // [D][2][W]
    const T *c() const { return c_; }            // [count W] log2 normalizer, -sum_d (logvar + ln 2 pi) / 2 in bits
    const T *cw() const { return cw_; }          // [count W] c + log2 w; padding columns: -inf
    const T *centre() const { return centre_; }  // [D] what is to be subtracted from z; 0 where `direct`
    const int64_t *order() const { return order_; }  // [D] the dimensions as they are packed

    // The bounds of panel p: its largest cw, and its largest cw + log2 a; infinity where they bound nothing, as a
    // number is not finite or all weights are zero. And of all panels: the least log2 a.
    T reach(int64_t p) const { return reach_[p]; }
    T steep(int64_t p) const { return steep_[p]; }
    T least_a() const {
        T least = kInf<T>;
        for (int64_t p = 0; p < count; ++p) least = least_a_[p] < least ? least_a_[p] : least;
        return T(std::log2(double(least)));
    }

    // Puts the dimensions first that tell columns apart, by var(mu) / sigma^2 in a sample; to be called before pack.
    void order_dimensions(const T *mu, const T *logvar) {
        const int64_t n = N < 256 ? N : 256;
        for (int64_t d = 0; d < D; ++d) {
            double sum = 0, squares = 0, sum_logvar = 0;
            for (int64_t k = 0; k < n; ++k) {
                const int64_t at = k * N / n * D + d;
                const double x = double(mu[at]) - double(mu[d]);
                sum += x, squares += x * x, sum_logvar += double(logvar[at]);
            }
            const double variance = squares - sum * sum / double(n);
            spread_[d] = variance > 0 ? std::log(variance) - sum_logvar / double(n) : -kInf<double>;
            int64_t at = d;
            for (; at > 0 && spread_[order_[at - 1]] < spread_[d]; --at) order_[at] = order_[at - 1];
            order_[at] = d;
        }
    }

    // log2_w(j) as a double. Padding columns have a = kappa, b = 0 and weight 0. Gives a status.
    template <class F>
    [[nodiscard]] int pack(const T *mu, const T *logvar, int threads, const F &log2_w, bool force_direct = false) {
        // Without FMA the direct form takes no more operations, and rounds less.
        direct = !find_centre(mu, force_direct || !kFused);
        extreme = force_direct;
        for (;;) {
            int offsets_small = 1;
            const int status = for_each(threads, [&](int64_t p) {
                if (!pack_panel(p, mu, logvar, log2_w)) __atomic_store_n(&offsets_small, 0, __ATOMIC_RELAXED);
            });
            extreme |= !offsets_small;
            if (status != FASTVAE_OK || direct || offsets_small) return status;
            direct = true;
            for (int64_t d = 0; d < D; ++d) centre_[d] = T(0);
        }
    }
    [[nodiscard]] int pack(const T *mu, const T *logvar, int threads, bool force_direct = false) {
        return pack(mu, logvar, threads, [](int64_t) { return 0.0; }, force_direct);
    }

    // f(p) for every panel, many small ones at a time. Gives a status.
    template <class F> [[nodiscard]] int for_each(int threads, const F &f) const {
        const int64_t unit = 8 + 256 / (D + 1);
        return parallel_for((count + unit - 1) / unit, threads, [&](int64_t k, const Worker &) {
            for (int64_t p = k * unit; p < count && p < (k + 1) * unit; ++p) f(p);
        });
    }

private:
    // The mean of up to 256 columns spread evenly: any centre will do that makes most offsets small.
    bool find_centre(const T *mu, bool force_direct) {
        const int64_t n = force_direct ? 0 : N < 256 ? N : 256;
        bool moderate = !force_direct;
        for (int64_t d = 0; d < D; ++d) centre_[d] = T(0);
        for (int64_t k = 0; k < n; ++k) {
            const T *row = mu + (k * N / n) * D;
            for (int64_t d = 0; d < D; ++d) centre_[d] += row[order_[d]];
        }
        for (int64_t d = 0; d < D; ++d) {
            centre_[d] /= T(n);
            moderate &= __builtin_fabs(double(centre_[d])) < kModerate / 2;
        }
        for (int64_t d = 0; d < D && !moderate; ++d) centre_[d] = T(0);
        return moderate;
    }

    // Whether every offset is small and every a moderate.
    template <class F> bool pack_panel(int64_t p, const T *mu, const T *logvar, const F &log2_w) {
        T *planes = planes_ + p * D * 2 * W;
        const int64_t first = p * W, columns = this->columns(p);
        for (int64_t l = 0; l < W; ++l)  // transpose: logvar into a's plane, mu into b's
            for (int64_t d = 0; d < D; ++d) {
                planes[d * 2 * W + l] = l < columns ? logvar[(first + l) * D + order_[d]] : T(0);
                planes[d * 2 * W + W + l] = l < columns ? mu[(first + l) * D + order_[d]] : centre_[d];
            }

        double sum_logvar[W] = {}, part[W] = {};
        IVec<T> large = {}, odd = {};
        Vec<T> most[kPanelVectors], least = splat(kLargest<T>);  // of a
        for (Vec<T> &x : most) x = splat(Elementary<T>::kMinNormal);
        for (int64_t d = 0; d < D; ++d) {
            T *a = planes + d * 2 * W, *b = a + W;
            const bool fold = d % 16 == 15 || d == D - 1;  // in two levels, for doubles' sake
            for (int l = 0; l < W; ++l) part[l] += double(a[l]);
            for (int l = 0; l < W && fold; ++l) sum_logvar[l] += part[l], part[l] = 0;
            inverse_sigmas(a);
            for (int l = 0; l < W; l += kLanes<T>) {
                const Vec<T> va = load(a + l), vmu = load(b + l), vb = (vmu - centre_[d]) * va;
                odd |= ~(vmu - vmu == T(0));
                most[l / kLanes<T>] = max_<T>(va, most[l / kLanes<T>]);
                least = min_<T>(va, least);
                large |= ~((vb <= T(kMaxOffset)) & (vb >= T(-kMaxOffset)) & (va <= T(kModerate)));
                store(b + l, direct ? vmu : vb);
            }
        }
        bool finite = true;
        for (int64_t l = 0; l < W; ++l) {
            const double c = -0.5 * kLog2e * (sum_logvar[l] + kLog2Pi * double(D));
            c_[first + l] = to_finite<T>(c);
            cw_[first + l] = l < columns ? to_finite<T>(c + log2_w(first + l)) : -kInf<T>;
            finite &= __builtin_isfinite(sum_logvar[l]) && cw_[first + l] < kInf<T>;
        }
        T reach = -kInf<T>, steep = -kInf<T>;
        for (int v = 0; v < kPanelVectors; ++v) {
            const Vec<T> cw = load(cw_ + first + v * kLanes<T>);
            reach = max_lanes<T>(max_<T>(cw, splat(reach)));
            steep = max_lanes<T>(max_<T>(cw + log_<T>(most[v]) * T(kLog2e), splat(steep)));
        }
        const bool bound = finite && !any_lane<T>(odd) && reach > -kInf<T>;
        reach_[p] = bound ? reach : kInf<T>;
        steep_[p] = bound ? steep : kInf<T>;
        least_a_[p] = -max_lanes<T>(-least);
        return !any_lane<T>(large);
    }

    // logvar [W] -> a [W], more exact than T because its error counts twice in every t^2 of the column. Finite for
    // finite inputs, so that 0 a is 0 and infinity a is infinity.
    static FASTVAE_INLINE void inverse_sigmas(T *x) {
        typedef T Some __attribute__((vector_size(kLanes<double> * sizeof(T))));
        for (int l = 0; l < W; l += kLanes<double>) {
            Some some;
            __builtin_memcpy(&some, x + l, sizeof some);
            const Exponential<double> e(__builtin_convertvector(some, Vec<double>) * -0.5);
            const Vec<double> a = sizeof(T) == 4 ? e.value() * kKappa : e.times(kKappaHigh, kKappaLow);
            some = __builtin_convertvector(min_<double>(splat(double(kLargest<T>)),
                                                        max_<double>(splat(double(Elementary<T>::kMinNormal)), a)),
                                           Some);
            __builtin_memcpy(x + l, &some, sizeof some);
        }
    }

    Buffer<T> planes_, c_, cw_, centre_;
    Buffer<int64_t> order_;
    Buffer<double> spread_;  // [D] log of var(mu) / sigma^2, up to a constant
    Buffer<T> reach_, steep_, least_a_;  // [count]
};

}  // namespace fastvae::FASTVAE_ISA
