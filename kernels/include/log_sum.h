// Part of a log2 sum_j 2^s_j, and how parts are put together.
#pragma once

#include <cmath>

#include "weights.h"

namespace fastvae::FASTVAE_ISA {

struct LogSum {  // 2^shift sum; nothing is (any, 0)
    double shift, sum;

    FASTVAE_SHARED double log() const { return shift * kLn2 + std::log(sum); }  // in nats
    FASTVAE_SHARED void add(const LogSum &other) {
        if (other.sum == 0) return;
        const double top = sum == 0 || other.shift > shift ? other.shift : shift;
        sum = (sum == 0 ? 0 : sum * std::exp2(shift - top)) + other.sum * std::exp2(other.shift - top);
        shift = top;
    }
};

}  // namespace fastvae::FASTVAE_ISA
