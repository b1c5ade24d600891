// e^x, what is left of it without its first terms, accurate near 0, and 2^x without the special-function unit.
#pragma once

#include "exp_tail.h"
#include "numbers.h"

namespace fastvae::FASTVAE_ISA {

FASTVAE_DEVICE float exp_(float x) { return expf(x); }
FASTVAE_DEVICE double exp_(double x) { return exp(x); }
FASTVAE_DEVICE float expm1_(float x) { return expm1f(x); }
FASTVAE_DEVICE double expm1_(double x) { return expm1(x); }

template <class T, int k = 0> FASTVAE_DEVICE T tail_polynomial(T x) {
    constexpr T c = ExpTail<T>::kTerms[k];
    if constexpr (k + 1 < int(sizeof(ExpTail<T>::kTerms) / sizeof(T)))
        return fma_(tail_polynomial<T, k + 1>(x), x, c);
    else
        return c;
}

// e^x - 1 - x, never negative
template <class T> FASTVAE_DEVICE T exp_tail(T x) {
    const T half = T(0.5) * x;  // finite where x, a difference of finite numbers, need not be
    return abs_(x) <= ExpTail<T>::kReach ? tail_polynomial(x) * (x * x) : (expm1_(x) - half) - half;
}

// 2^x for x up to 127, within 2 ulp from -126 up, and 0 from -127 down: by additions and multiplications, where the
// special-function unit has enough to do. NaN gives NaN, or on a GPU what is too large to be missed in a sum, 2^126.
FASTVAE_DEVICE float exp2_by_polynomial(float x) {
    constexpr float kTerms[] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
    constexpr float kRound = 0x1.8p23f;
    x = max_or_nan(x, -127.0f);
    const float rounded = x + kRound, f = x - (rounded - kRound);
    float y = kTerms[4];
    FASTVAE_UNROLL
    for (int k = 3; k >= 0; --k) y = fma_(y, f, kTerms[k]);
    return bit_cast<float>(bit_cast<uint32_t>(fma_(y, f, 1.0f)) + (bit_cast<uint32_t>(rounded) << 23));
}
FASTVAE_DEVICE double exp2_by_polynomial(double x) { return exp2_(x); }

}  // namespace fastvae::FASTVAE_ISA
