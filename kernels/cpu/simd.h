// Vectors as wide as the instruction set this file is compiled for, and their elementary functions.
//
// Everything lives in the namespace of the instruction set, so that no two of them share a symbol.
// Comparisons follow one rule, so that NaN survives: max(a, b) and min(a, b) give b where either is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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

// Vec<T> and its integer twin IVec<T>: GCC and Clang vector types, with the usual operators per lane.
template <class T> struct VecTypes;
template <> struct VecTypes<float> {
    typedef float Float __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
};
template <> struct VecTypes<double> {
    typedef double Float __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
};
template <class T> using Vec = typename VecTypes<T>::Float;
template <class T> using IVec = typename VecTypes<T>::Int;
template <class T> constexpr int kLanes = FASTVAE_VECTOR_BYTES / int(sizeof(T));

template <class T> constexpr T kInf = T(__builtin_inf());
template <class T> constexpr T kNaN = T(__builtin_nan(""));

template <class T> FASTVAE_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

template <class T> FASTVAE_INLINE Vec<T> load(const T *p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T> FASTVAE_INLINE void store(T *p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }

// The first n lanes (0 <= n <= lanes); the others are `rest`, or left alone in memory.
template <class T> FASTVAE_INLINE Vec<T> load_first(const T *p, int64_t n, T rest = T(0)) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat(rest), __mmask16((1u << n) - 1), p);
    else
        return (Vec<T>)_mm512_mask_loadu_pd((__m512d)splat(rest), __mmask8((1u << n) - 1), p);
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
#else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

template <class T> FASTVAE_INLINE Vec<T> select(IVec<T> mask, Vec<T> yes, Vec<T> no) { return mask ? yes : no; }

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

// Horizontal sum and maximum, lanes halved pairwise, so the order never depends on anything but the width.
template <class T> FASTVAE_INLINE T sum_lanes(Vec<T> v) {
    T x[kLanes<T>];
    store(x, v);
    for (int n = kLanes<T> / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
}
template <class T> FASTVAE_INLINE T max_lanes(Vec<T> v) {
    T x[kLanes<T>];
    store(x, v);
    for (int n = kLanes<T> / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) x[i] = x[i + n] > x[i] ? x[i + n] : x[i];
    return x[0];
}

// sum_k coefficient[k] x^k by Horner; the compiler fuses where the instruction set can.
template <class T, int K> FASTVAE_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficient)[K]) {
    Vec<T> p = splat(coefficient[K - 1]);
#pragma GCC unroll 16
    for (int k = K - 2; k >= 0; --k) p = p * x + coefficient[k];
    return p;
}

}  // namespace fastvae::FASTVAE_ISA
