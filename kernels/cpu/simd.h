// Vectors as wide as the instruction set this file is compiled for, and their elementary functions.
//
// Everything lives in the namespace of the instruction set, so that no two of them share a symbol.
// Comparisons follow one rule, so that NaN survives: max(a, b) and min(a, b) give b where either is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTVAE_ISA
#error "compile with -DFASTVAE_ISA=<name of the instruction set>"
#endif

#if defined(__AVX512F__)
#define FASTVAE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTVAE_VECTOR_BYTES 32
#else
#define FASTVAE_VECTOR_BYTES 16
#endif

#define FASTVAE_INLINE inline __attribute__((always_inline))

namespace fastvae::FASTVAE_ISA {

// Vec<T>, its integer twin IVec<T>, and Bits<T>, whose additions wrap around: GCC and Clang vector types, with the
// usual operators per lane.
template <class T> struct VecTypes;
template <> struct VecTypes<float> {
    typedef float Float __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef uint32_t Unsigned __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
};
template <> struct VecTypes<double> {
    typedef double Float __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef uint64_t Unsigned __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
};
template <class T> using Vec = typename VecTypes<T>::Float;
template <class T> using IVec = typename VecTypes<T>::Int;
template <class T> using Bits = typename VecTypes<T>::Unsigned;
template <class T> constexpr int kLanes = FASTVAE_VECTOR_BYTES / int(sizeof(T));

// Whether a * b + c is one operation, rounded once.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

template <class T> constexpr T kInf = T(__builtin_inf());
template <class T> constexpr T kNaN = T(__builtin_nan(""));

template <class T> FASTVAE_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

template <class T> FASTVAE_INLINE Vec<T> load(const T *p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T> FASTVAE_INLINE void store(T *p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }

template <class T> FASTVAE_INLINE Vec<T> select(IVec<T> mask, Vec<T> yes, Vec<T> no) { return mask ? yes : no; }

// 0, 1, 2, ...
template <class T> FASTVAE_INLINE IVec<T> lane_index() {
    IVec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
    return v;
}

// The first n lanes (0 <= n <= lanes); the others are `rest`, or left alone in memory.
template <class T> FASTVAE_INLINE Vec<T> load_first(const T *p, int64_t n, T rest = T(0)) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat(rest), __mmask16((1u << n) - 1), p);
    else
        return (Vec<T>)_mm512_mask_loadu_pd((__m512d)splat(rest), __mmask8((1u << n) - 1), p);
#elif FASTVAE_VECTOR_BYTES == 32
    const IVec<T> mask = lane_index<T>() < int(n);
    if constexpr (sizeof(T) == 4)
        return select<T>(mask, (Vec<T>)_mm256_maskload_ps(p, (__m256i)mask), splat(rest));
    else
        return select<T>(mask, (Vec<T>)_mm256_maskload_pd(p, (__m256i)mask), splat(rest));
#else
    Vec<T> v = splat(rest);
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}
template <class T> FASTVAE_INLINE void store_first(T *p, Vec<T> v, int64_t n) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
    else
        _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#elif FASTVAE_VECTOR_BYTES == 32
    const IVec<T> mask = lane_index<T>() < int(n);
    if constexpr (sizeof(T) == 4)
        _mm256_maskstore_ps(p, (__m256i)mask, (__m256)v);
    else
        _mm256_maskstore_pd(p, (__m256i)mask, (__m256d)v);
#else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// f(i, n) for the vectors of [0, size): lanes [i, i + n), where n is the constant kLanes in all but the last.
// There load_some and store_some are plain accesses.
template <class T, class F> FASTVAE_INLINE void for_each_vector(int64_t size, const F &f) {
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) f(i, int64_t(kLanes<T>));
    if (i < size) f(i, size - i);
}
template <class T> FASTVAE_INLINE Vec<T> load_some(const T *p, int64_t n, T rest = T(0)) {
    return __builtin_constant_p(n) && n == kLanes<T> ? load(p) : load_first(p, n, rest);
}
template <class T> FASTVAE_INLINE void store_some(T *p, Vec<T> v, int64_t n) {
    __builtin_constant_p(n) && n == kLanes<T> ? store(p, v) : store_first(p, v, n);
}

// g * x, but 0 where g is 0 even if x overflowed: no gradient in, none out.
template <class T> FASTVAE_INLINE Vec<T> times(Vec<T> g, Vec<T> x) {
    return select<T>(g == T(0), Vec<T>{}, g * x);
}

// x as it is rounded: a product that no sum takes into an FMA, so that what cancels is exactly 0.
template <class T> FASTVAE_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

template <class T> FASTVAE_INLINE Vec<T> max_(Vec<T> a, Vec<T> b) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
    else
        return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
    return a > b ? a : b;
#endif
}
template <class T> FASTVAE_INLINE Vec<T> min_(Vec<T> a, Vec<T> b) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_min_ps((__m512)a, (__m512)b);
    else
        return (Vec<T>)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
    return a < b ? a : b;
#endif
}
template <class T> FASTVAE_INLINE Vec<T> sqrt_(Vec<T> x) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_sqrt_ps((__m512)x);
    else
        return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#else
    for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// The lanes of a and then of b, chosen by constants. GCC 11 has no __builtin_shufflevector, Clang has nothing else.
#if defined(__clang__) || __GNUC__ >= 12
template <int... lane, class V> FASTVAE_INLINE V shuffle(V a, V b) { return __builtin_shufflevector(a, b, lane...); }
#else
template <int... lane, class V> FASTVAE_INLINE V shuffle(V a, V b) {
    typedef decltype(a < b) Lanes;  // integers as wide as V's elements
    return __builtin_shuffle(a, b, Lanes{lane...});
}
#endif

// Lanes moved down by n, around the end.
template <class T, int n, int... i> FASTVAE_INLINE Vec<T> rotate(Vec<T> v, std::integer_sequence<int, i...>) {
    return shuffle<(i + n) % kLanes<T>...>(v, v);
}

// Whether any bit is set.
template <class T> FASTVAE_INLINE bool any_lane(IVec<T> v) {
    typedef int64_t Words __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    const Words words = (Words)v;
    int64_t any = 0;
    for (int i = 0; i < FASTVAE_VECTOR_BYTES / 8; ++i) any |= words[i];
    return any;
}

// Whether every lane is above 0; NaN is not.
template <class T> FASTVAE_INLINE bool all_positive(Vec<T> v) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ) == 0xffff;
    else
        return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_GT_OQ) == 0xff;
#else
    return !any_lane<T>(~(v > T(0)));
#endif
}

// c - a b, in one rounding wherever the instruction set can: so that it is the same number in every kernel, which
// the compiler's own choice is not.
template <class T> FASTVAE_INLINE Vec<T> minus_product(Vec<T> c, Vec<T> a, Vec<T> b) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else
        return (Vec<T>)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTVAE_VECTOR_BYTES == 32 && defined(__FMA__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else
        return (Vec<T>)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
        return (Vec<T>)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return c - a * b;
#endif
}

// Horizontal sum and maximum, lanes halved pairwise, so the order never depends on anything but the width.
template <class T, int n = kLanes<T> / 2> FASTVAE_INLINE T sum_lanes(Vec<T> v) {
    if constexpr (n == 0)
        return v[0];
    else
        return sum_lanes<T, n / 2>(v + rotate<T, n>(v, std::make_integer_sequence<int, kLanes<T>>{}));
}
template <class T, int n = kLanes<T> / 2> FASTVAE_INLINE T max_lanes(Vec<T> v) {
    if constexpr (n == 0)
        return v[0];
    else
        return max_lanes<T, n / 2>(max_<T>(rotate<T, n>(v, std::make_integer_sequence<int, kLanes<T>>{}), v));
}

// a0 b0 a1 b1 ... in two vectors.
template <class V, int... i> FASTVAE_INLINE void interleave(V a, V b, V &low, V &high, std::integer_sequence<int, i...>) {
    constexpr int n = sizeof...(i);
    low = shuffle<i / 2 + i % 2 * n...>(a, b);
    high = shuffle<n / 2 + i / 2 + i % 2 * n...>(a, b);
}
template <class V> FASTVAE_INLINE void interleave(V a, V b, V &low, V &high) {
    interleave(a, b, low, high, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// The horizontal sums of a whole set of vectors: lane i of the result is that of v[i].
template <class T> FASTVAE_INLINE Vec<T> sum_lanes_of_each(Vec<T> (&v)[kLanes<T>]) {
    for (int n = kLanes<T> / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) {
            Vec<T> low, high;
            interleave(v[i], v[i + n], low, high);
            v[i] = low + high;
        }
    return v[0];
}

// sum_k coefficient[k] x^k by Horner; the compiler fuses where the instruction set can.
template <class T, int K> FASTVAE_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficient)[K]) {
    Vec<T> p = splat(coefficient[K - 1]);
#pragma GCC unroll 16
    for (int k = K - 2; k >= 0; --k) p = p * x + coefficient[k];
    return p;
}

}  // namespace fastvae::FASTVAE_ISA
