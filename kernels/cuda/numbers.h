// Numbers as the kernels have them: dtypes of tensors, the type that computes, and elementary functions.
#pragma once

#include <cstring>

#ifndef FASTVAE_HOST_SIMT
#include <cuda_fp16.h>
#endif

#include "fastvae_cuda.h"
#include "ptx.h"

namespace fastvae::FASTVAE_ISA {

struct bfloat16 {
    uint16_t bits;
};
#ifdef FASTVAE_HOST_SIMT
using float16 = _Float16;
#else
using float16 = __half;
#endif

template <class In> struct AccumulatorOf {
    using type = float;
};
template <> struct AccumulatorOf<double> {
    using type = double;
};
template <class In> using Accumulator = typename AccumulatorOf<In>::type;  // float64's is itself, others' float32

template <class To, class From> FASTVAE_DEVICE To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

FASTVAE_DEVICE double load(const double *p) { return *p; }
FASTVAE_DEVICE float load(const float *p) { return *p; }
FASTVAE_DEVICE float load(const float16 *p) { return float(*p); }
FASTVAE_DEVICE float load(const bfloat16 *p) { return bit_cast<float>(uint32_t(p->bits) << 16); }

FASTVAE_DEVICE void store(double *p, double x) { *p = x; }
FASTVAE_DEVICE void store(float *p, float x) { *p = x; }
FASTVAE_DEVICE void store(float16 *p, float x) { *p = float16(x); }
FASTVAE_DEVICE void store(bfloat16 *p, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = bit_cast<uint32_t>(x);
    p->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// Calls f with a value of the type that the dtype stands for.
template <class F> int with_dtype(int dtype, const F &f) {
    switch (dtype) {
        case FASTVAE_CUDA_F32: return f(float());
        case FASTVAE_CUDA_F64: return f(double());
        case FASTVAE_CUDA_BF16: return f(bfloat16());
        case FASTVAE_CUDA_F16: return f(float16());
    }
    return FASTVAE_CUDA_BAD_DTYPE;
}

template <class T> FASTVAE_DEVICE T infinity() { return T(__builtin_huge_val()); }
template <class T> FASTVAE_DEVICE T largest() { return sizeof(T) == 4 ? T(3.40282346638528859812e38) : T(1.7976931348623157e308); }

// The compiler is left no choice of what to fuse, so that a term has the same bits in every kernel.
FASTVAE_DEVICE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
FASTVAE_DEVICE double fma_(double a, double b, double c) { return fma(a, b, c); }

// a b as it is rounded: no sum takes it into an FMA, so that what cancels is exactly 0.
#ifdef FASTVAE_HOST_SIMT
template <class T> FASTVAE_DEVICE T mul_(T a, T b) {
    T product = a * b;
    asm("" : "+m"(product));
    return product;
}
#else
FASTVAE_DEVICE float mul_(float a, float b) { return __fmul_rn(a, b); }
FASTVAE_DEVICE double mul_(double a, double b) { return __dmul_rn(a, b); }
#endif

// The greater of the two; of NaN and a number, the number
FASTVAE_DEVICE float max_(float a, float b) { return fmaxf(a, b); }
FASTVAE_DEVICE double max_(double a, double b) { return fmax(a, b); }
FASTVAE_DEVICE float min_(float a, float b) { return fminf(a, b); }
FASTVAE_DEVICE double min_(double a, double b) { return fmin(a, b); }
FASTVAE_DEVICE float abs_(float a) { return fabsf(a); }
FASTVAE_DEVICE double abs_(double a) { return fabs(a); }

// NaN stays NaN
template <class T> FASTVAE_DEVICE T clip(T x, T low, T high) { return x > high ? high : x < low ? low : x; }

// g x, but 0 where g is 0 even if x overflowed: no gradient in, none out.
template <class T> FASTVAE_DEVICE T times(T g, T x) { return g == T(0) ? T(0) : g * x; }

}  // namespace fastvae::FASTVAE_ISA
