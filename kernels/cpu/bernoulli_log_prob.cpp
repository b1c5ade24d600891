// The log-probability of binary data under logits, summed over each example, and its gradient, each in one pass.
//
// x l - log(1 + e^l) = p l - log(1 + y) with p = x - [l > 0] and y = e^(-|l|), in which nothing cancels; its derivative,
// x - sigmoid(l), is p + y / (1 + y) where l > 0, and p - y / (1 + y) elsewhere. Many log(1 + y) are one logarithm, of
// the product of 1 + y, which is kept without its 1, so that small y lose no digits. Sums run in T over a span, then in
// double.

#include "elementary.h"
#include "fastvae.h"
#include "parallel.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// Elements of a row that are summed in T: the product of a lane's 1 + y, each at most 2, is at most 2^32.
template <class T> constexpr int64_t kSpan = 32 * kLanes<T>;
constexpr int64_t kUnit = 8192;  // elements of a unit of work, about
constexpr int64_t kFewest = 1 << 17;  // elements, 50 us of one thread, for which others are woken

template <class T> struct Terms {
    Vec<T> logits, pull, y;
    IVec<T> positive;

    FASTVAE_INLINE Terms(Vec<T> x, Vec<T> l) : logits(l), positive(l > T(0)) {
        constexpr T kLeast = Elementary<T>::kMinExponent * T(0.69314718055994530942);
        pull = x - select<T>(positive, splat(T(1)), Vec<T>{});
        const Vec<T> down = select<T>(positive, -l, l);
        y = select<T>(down < kLeast, Vec<T>{}, exp_<T>(down));  // never subnormal, which takes a hundred times as long
    }
    FASTVAE_INLINE Vec<T> d_logits() const {
        const Vec<T> share = y / (T(1) + y);
        return pull + select<T>(positive, share, -share);
    }
};

// f(r, x's row, the logits' row) for every row of the logits [R, M], in units of about kUnit elements.
template <class T, class F>
int for_each_row(const void *x, int64_t x_stride, const void *logits, int64_t logits_stride, int64_t B, int64_t R,
                 int64_t M, int threads, const F &f) {
    const int64_t unit_rows = M < kUnit ? kUnit / (M < 1 ? 1 : M) : 1;
    if (R < kFewest / (M < 1 ? 1 : M)) threads = 1;
    return parallel_for((R + unit_rows - 1) / unit_rows, threads, [=](int64_t unit, const Worker &) {
        const int64_t begin = unit * unit_rows, end = begin + unit_rows < R ? begin + unit_rows : R;
        for (int64_t r = begin; r < end; ++r)
            f(r, static_cast<const T *>(x) + r % B * x_stride, static_cast<const T *>(logits) + r * logits_stride);
    });
}

}  // namespace

template <class T>
int bernoulli_log_prob(const void *x, int64_t x_stride, const void *logits, int64_t logits_stride, int64_t B, int64_t R,
                       int64_t M, void *log_p_, int threads) {
    T *log_p = static_cast<T *>(log_p_);  // [R]
    return for_each_row<T>(x, x_stride, logits, logits_stride, B, R, M, threads, [=](int64_t r, const T *xs, const T *ls) {
        double sum = 0;
        for (int64_t d = 0; d < M; d += kSpan<T>) {
            Vec<T> pulled{}, product{};  // the sum of p l; the product of 1 + y, less 1
            for_each_vector<T>(d + kSpan<T> < M ? kSpan<T> : M - d,
                               [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                // What is not there counts for 0: x = 1 and a logit of infinity.
                const Terms<T> terms(load_some(xs + d + i, n, T(1)), load_some(ls + d + i, n, kInf<T>));
                pulled += times<T>(terms.pull, terms.logits);
                product += terms.y * (T(1) + product);
            });
            sum += sum_lanes<T>(pulled - log1p_<T>(product));
        }
        log_p[r] = T(sum);
    });
}

template <class T>
int bernoulli_log_prob_backward(const void *grad_, int64_t grad_row, const void *x, int64_t x_stride,
                                const void *logits, int64_t logits_stride, int64_t B, int64_t R, int64_t M,
                                void *d_logits_, int threads) {
    const T *grad = static_cast<const T *>(grad_);  // [R]
    T *d_logits = static_cast<T *>(d_logits_);      // [R, M]
    return for_each_row<T>(x, x_stride, logits, logits_stride, B, R, M, threads, [=](int64_t r, const T *xs, const T *ls) {
        const Vec<T> g = splat(grad[r * grad_row]);
        T *out = d_logits + r * M;
        for_each_vector<T>(M, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            store_some(out + i, g * Terms<T>(load_some(xs + i, n), load_some(ls + i, n)).d_logits(), n);
        });
    });
}

void add_bernoulli_log_prob(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.bernoulli_log_prob = bernoulli_log_prob<float>, f64.bernoulli_log_prob = bernoulli_log_prob<double>;
    f32.bernoulli_log_prob_backward = bernoulli_log_prob_backward<float>;
    f64.bernoulli_log_prob_backward = bernoulli_log_prob_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
