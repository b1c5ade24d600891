// The rounds of Philox4x32-10 (Salmon et al. 2011), on one block of four 32-bit words or on vectors of blocks.
#pragma once

#include "portable.h"

namespace fastvae::FASTVAE_ISA {

// W is uint64_t or a vector of them: each word in a low half; what is in the high half does not matter.
template <class W> struct PhiloxBlock {
    W w0, w1, w2, w3;
};

// `n` blocks side by side: one alone is a chain of ten multiplications that each wait for the one before.
// multiply(w, m): the 64-bit product of the low half of w and m.
template <int n, class W, class Multiply>
FASTVAE_SHARED void philox(PhiloxBlock<W> (&c)[n], uint64_t key, const Multiply &multiply) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    FASTVAE_UNROLL
    for (int round = 0; round < 10; ++round) {
        FASTVAE_UNROLL
        for (int i = 0; i < n; ++i) {
            const W p0 = multiply(c[i].w0, 0xD2511F53), p1 = multiply(c[i].w2, 0xCD9E8D57);
            c[i] = {(p1 >> 32) ^ c[i].w1 ^ k0, p1, (p0 >> 32) ^ c[i].w3 ^ k1, p0};
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

}  // namespace fastvae::FASTVAE_ISA
