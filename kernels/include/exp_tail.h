// (e^x - 1 - x) / x^2 on [-ln2/2, ln2/2] as a polynomial: near-minimax (Chebyshev) fits, off by 8e-9 of e^x in float, and
// by 1e-18 in double.
#pragma once

#include "portable.h"

namespace fastvae::FASTVAE_ISA {

template <class T> struct ExpTail;
template <> struct ExpTail<float> {
    static constexpr float kReach = 0.34657359f;
    static constexpr float kTerms[] = {5.000000000e-01f, 1.666657667e-01f, 4.166655421e-02f, 8.363232884e-03f,
                                       1.392625083e-03f};
};
template <> struct ExpTail<double> {
    static constexpr double kReach = 0.34657359027997264;
    static constexpr double kTerms[] = {5.00000000000000000e-01, 1.66666666666666713e-01,
                                        4.16666666666666713e-02, 8.33333333332608381e-03,
                                        1.38888888888837113e-03, 1.98412698750022792e-04,
                                        2.48015873256774607e-05, 2.75572551700008879e-06,
                                        2.75572734787185824e-07, 2.51053127296221029e-08,
                                        2.09147553258932021e-09};
};

}  // namespace fastvae::FASTVAE_ISA
