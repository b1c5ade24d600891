// Elementary functions on vectors: exp2, exp, e^x - 1, e^x - 1 - x, and the natural logarithms of x and of 1 + x.
//
// Polynomials are near-minimax (Chebyshev) fits, their relative error noted beside them; float and double
// results are within 2 ulp. NaN gives NaN. Results below 2^kMinExponent may be flushed to zero.
#pragma once

#include "exp_tail.h"
#include "simd.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct Elementary;

template <> struct Elementary<float> {
    static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr int kMantissa = 23, kBias = 127;
    static constexpr float kMinExponent = -124.0f, kMaxExponent = 128.0f, kLeastShare = -80.0f;
    static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860682030941723e-6f;
    // (2^x - 1) / x on [-1/2, 1/2]: 8e-9
    static constexpr float kExp2[] = {6.931471880e-01f, 2.402265076e-01f, 5.550357114e-02f,
                                      9.618082557e-03f, 1.339086336e-03f, 1.545316295e-04f};
    // 2^x there: 7e-8
    static constexpr float kExp2Term[] = {1.000000072e+00f, 6.931469671e-01f, 2.402211972e-01f,
                                          5.550713272e-02f, 9.675541343e-03f, 1.327647263e-03f};
    static constexpr float kLog[] = {3.333333118e-01f,  -2.499999696e-01f, 2.000071575e-01f,
                                     -1.666780232e-01f, 1.424905765e-01f,  -1.242568733e-01f,
                                     1.168541992e-01f,  -1.147973385e-01f, 6.971611471e-02f};
    static constexpr uint32_t kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
    static constexpr float kMinNormal = 0x1p-126f, kEpsilon = 0x1p-23f;
};

template <> struct Elementary<double> {
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int kMantissa = 52, kBias = 1023;
    static constexpr double kMinExponent = -1020.0, kMaxExponent = 1024.0, kLeastShare = -900.0;
    static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
    // 1e-17
    static constexpr double kExp2[] = {6.93147180559945286e-01, 2.40226506959100972e-01,
                                       5.55041086648215970e-02, 9.61812910760688825e-03,
                                       1.33335581464169356e-03, 1.54035304417360499e-04,
                                       1.52527338298361192e-05, 1.32154425879216893e-06,
                                       1.01780624458457737e-07, 7.07258594926922339e-09,
                                       4.45496059818651856e-10};
    // (2^x - 1) / x on [-1/32, 1/32], 2e-17 of 2^x; and 2^(k / 16), k from 0 to 15
    static constexpr double kExp2Near[] = {6.93147180559945753e-01, 2.40226506959100751e-01,
                                           5.55041086566392989e-02, 9.61812910691953787e-03,
                                           1.33337815767842687e-03, 1.54037239807492564e-04};
    static constexpr double kSixteenths[] = {1.00000000000000000, 1.04427378242741384, 1.09050773266525766,
                                             1.13878863475669165, 1.18920711500272107, 1.24185781207348405,
                                             1.29683955465100967, 1.35425554693689273, 1.41421356237309505,
                                             1.47682614593949931, 1.54221082540794082, 1.61049033194925431,
                                             1.68179283050742909, 1.75625216037329948, 1.83400808640934246,
                                             1.91520656139714729};
    static constexpr double kLog[] = {6.666666666666735130e-01, 3.999999999940941908e-01,
                                      2.857142874366239149e-01, 2.222219843214978396e-01,
                                      1.818357216161805012e-01, 1.531383769920937332e-01,
                                      1.479819860511658591e-01};
    static constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
    static constexpr double kMinNormal = 0x1p-1022, kEpsilon = 0x1p-52;
};

// p * 2^n for p in [1/2, 2) and integral n (as T) up to kMaxExponent; overflows to infinity, underflows to zero.
template <class T> FASTVAE_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> n) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
    else
        return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
    using E = Elementary<T>;
    // One power of two is left to a multiplication, which overflows as it should.
    const Bits<T> bits = ((Bits<T>)(n + (E::kRound - 1))) << E::kMantissa;
    return select<T>(n < E::kMinExponent, Vec<T>{}, T(2) * (Vec<T>)((Bits<T>)p + bits));
#endif
}

// 2^x
template <class T> FASTVAE_INLINE Vec<T> exp2_(Vec<T> x) {
    using E = Elementary<T>;
    x = min_<T>(splat(E::kMaxExponent + T(0.25)), max_<T>(splat(E::kMinExponent - E::kMantissa - 8), x));
    const Vec<T> n = (x + E::kRound) - E::kRound;
    const Vec<T> f = x - n;
    return scale_by_power<T>(polynomial<T>(f, E::kExp2) * f + T(1), n);
}

// 2^x as a term of a sum: within 3 half-ulp, 0 below 2^least; for x < kMaxExponent - 1, infinite x included.
template <class T> FASTVAE_INLINE Vec<T> exp2_term(Vec<T> x, T least = Elementary<T>::kMinExponent) {
    using E = Elementary<T>;
#if FASTVAE_VECTOR_BYTES == 64
    constexpr int kNearest = 8;
    if constexpr (sizeof(T) == 4) {
        const __m512 f = _mm512_reduce_ps((__m512)x, kNearest);
        const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
        const Vec<T> p = polynomial<T>((Vec<T>)f, E::kExp2Term);
        return (Vec<T>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x - f);
    } else {
        // To sixteenths: 2^(k / 16) from two registers, and a polynomial of 6 terms instead of 11.
        const __m512d f = _mm512_reduce_pd((__m512d)x, 4 << 4 | kNearest), n = (__m512d)x - f;
        const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(least), _CMP_NLT_UQ);
        const __m512i k = (__m512i)(n + E::kRound / 16);  // in its lowest bits
        const Vec<T> p = (Vec<T>)_mm512_permutex2var_pd((__m512d)load(E::kSixteenths), k,
                                                        (__m512d)load(E::kSixteenths + 8));
        const Vec<T> r = polynomial<T>((Vec<T>)f, E::kExp2Near) * (p * (Vec<T>)f) + p;
        return (Vec<T>)_mm512_maskz_scalef_pd(normal, (__m512d)r, n);
    }
#else
    const Vec<T> rounded = x + E::kRound, f = x - (rounded - E::kRound);
    Vec<T> p;
    if constexpr (sizeof(T) == 4 && kFused)
        p = polynomial<T>(f, E::kExp2Term);
    else
        p = polynomial<T>(f, E::kExp2) * f + T(1);
    const Vec<T> r = (Vec<T>)((Bits<T>)p + ((Bits<T>)rounded << E::kMantissa));
    return select<T>(x < least, Vec<T>{}, r);
#endif
}

// 2^x as a share of a sum, relative to its largest term: 0 below 2^kLeastShare, where nothing can come of it. What it is
// multiplied by afterwards, an upstream gradient of 1/S among it, would make subnormal numbers of smaller ones, and an
// operation with these takes a hundred times as long.
template <class T> FASTVAE_INLINE Vec<T> exp2_share(Vec<T> x) { return exp2_term<T>(x, Elementary<T>::kLeastShare); }

// e^x, and what is left of it without its first terms. Where x is in [-ln2/2, ln2/2] no power of two is split off, and
// the polynomial is of e^x - 1 - x itself, accurate near 0 and never negative; elsewhere subtracting costs no more than
// rounding e^x did.
template <class T> class Exponential {
public:
    explicit FASTVAE_INLINE Exponential(Vec<T> x) {
        using E = Elementary<T>;
        constexpr T kLog2e = T(1.44269504088896340736);
        x = min_<T>(splat((E::kMaxExponent + T(0.25)) / kLog2e),
                    max_<T>(splat((E::kMinExponent - E::kMantissa - 8) / kLog2e), x));
        n_ = (x * kLog2e + E::kRound) - E::kRound;
        const Vec<T> reduced = x - n_ * E::kLn2Hi;  // exact
        f_ = reduced - n_ * E::kLn2Lo;
        f_low_ = (reduced - f_) - n_ * E::kLn2Lo;
        tail_ = polynomial<T>(f_, ExpTail<T>::kTerms) * (f_ * f_);
        value_ = scale_by_power<T>(tail_ + f_ + T(1), n_);
    }
    FASTVAE_INLINE Vec<T> value() const { return value_; }
    // e^x (high + low), within 0.7 ulp: doubles alone, 1/2 <= high <= 1 in half their digits.
    FASTVAE_INLINE Vec<T> times(T high, T low) const {
        constexpr uint64_t kHighDigits = ~uint64_t(0) << 27;
        const Vec<T> e = (Vec<T>)((Bits<T>)(f_ + T(1)) & kHighDigits);  // e high is exact
        const Vec<T> rest = (f_ - (e - T(1))) + (f_low_ + tail_);
        return scale_by_power<T>(e * high + (e * low + rest * (high + low)), n_);
    }
    FASTVAE_INLINE Vec<T> minus_1() const { return select<T>(n_ == T(0), tail_ + f_, value_ - T(1)); }
    // e^x - 1 - x; the half of x is finite where x itself, a difference of finite numbers, need not be.
    FASTVAE_INLINE Vec<T> minus_1_minus_x(Vec<T> half_x) const {
        return select<T>(n_ == T(0), tail_, ((value_ - T(1)) - half_x) - half_x);
    }

private:
    Vec<T> n_, f_, f_low_, tail_, value_;
};

template <class T> FASTVAE_INLINE Vec<T> exp_(Vec<T> x) { return Exponential<T>(x).value(); }

// ln x for positive, normal, finite x (some number for others). With x = m 2^e, m in [sqrt(1/2), sqrt(2)), f = m - 1:
// float: ln m = f - f^2/2 + f^3 P(f), P's error 3e-8; double: fdlibm's, with s = f / (2 + f).
template <class T> FASTVAE_INLINE Vec<T> log_normal(Vec<T> x) {
    using E = Elementary<T>;
    const Bits<T> shifted = (Bits<T>)x - E::kSqrtHalf;
    const Vec<T> e = (Vec<T>)(((IVec<T>)shifted >> E::kMantissa) + (IVec<T>)splat(E::kRound)) - E::kRound;
    const Vec<T> m = (Vec<T>)((shifted & ((decltype(E::kSqrtHalf)(1) << E::kMantissa) - 1)) + E::kSqrtHalf);
    const Vec<T> f = m - T(1);
    const Vec<T> f2 = f * f;
    Vec<T> tail;
    if constexpr (sizeof(T) == 4) {
        tail = polynomial<T>(f, E::kLog) * (f2 * f);
    } else {
        const Vec<T> s = f / (f + T(2));
        tail = s * (polynomial<T>(s * s, E::kLog) * (s * s) + T(0.5) * f2);
    }
    return e * E::kLn2Hi + ((tail + e * E::kLn2Lo - T(0.5) * f2) + f);
}

// ln x for x > 0 (0 gives -inf; below 0 gives NaN)
template <class T> FASTVAE_INLINE Vec<T> log_(Vec<T> x) {
    using E = Elementary<T>;
    const IVec<T> subnormal = x < E::kMinNormal;
    Vec<T> r = log_normal<T>(select<T>(subnormal, x / E::kEpsilon, x));
    r = r + select<T>(subnormal, splat(-E::kMantissa * T(0.69314718055994530942)), Vec<T>{});
    r = select<T>(x == T(0), splat(-kInf<T>), r);
    r = select<T>(x == kInf<T>, x, r);
    return select<T>(x >= T(0), r, splat(kNaN<T>));
}

// ln (1 + x) for finite x >= 0: that of 1 + x as it is rounded, and what the rounding took.
template <class T> FASTVAE_INLINE Vec<T> log1p_(Vec<T> x) {
    const Vec<T> sum = T(1) + x;
    return log_normal<T>(sum) + (x - (sum - T(1))) / sum;
}

}  // namespace fastvae::FASTVAE_ISA
