// e^x and what is left of it without its first terms, accurate near 0.
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

}  // namespace fastvae::FASTVAE_ISA
