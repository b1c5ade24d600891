// Standard normals that depend on a seed and an element's index alone: Philox4x32-10 (Salmon et al. 2011)
// and Box-Muller.
//
// The four words of the block with counter (g, 0), g of 64 bits, make elements 4g to 4g + 3. A pair of words
// (w0, w1) makes two: r cos(2 pi u2) and r sin(2 pi u2), where r = sqrt(-2 ln u1), u1 = ((w0 >> 8) + 1) 2^-24
// and u2 = (w1 >> 8) 2^-24.
#pragma once

#include "elementary.h"
#include "philox_rounds.h"

namespace fastvae::FASTVAE_ISA {

// One 32-bit word in the low half of each lane; what is in the high half does not matter.
typedef uint64_t Words __attribute__((vector_size(FASTVAE_VECTOR_BYTES)));
constexpr int kGroups = FASTVAE_VECTOR_BYTES / 8;  // Philox blocks computed side by side

// The 64-bit product of each word and m.
FASTVAE_INLINE Words multiply(Words w, uint32_t m) {
#if FASTVAE_VECTOR_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)w, _mm512_set1_epi64(m));
#elif FASTVAE_VECTOR_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)w, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (Words)_mm_mul_epu32((__m128i)w, _mm_set1_epi64x(m));
#elif defined(__aarch64__)
    return (Words)vmull_u32(vmovn_u64((uint64x2_t)w), vdup_n_u32(m));
#else
    return (w & 0xffffffff) * m;
#endif
}

// sin(pi t / 2) / t and (cos(pi t / 2) - 1) / t^2 in t^2, on [-1/2, 1/2]: 5e-9 and 8e-10, 3e-21 and 3e-22
template <class T> struct Quadrant;
template <> struct Quadrant<float> {
    static constexpr float kSin[] = {1.57079632f, -0.645963478f, 0.0796802176f, -0.00460214921f};
    static constexpr float kCos[] = {-1.23370055f, 0.253669410f, -0.0208615283f, 0.000906739898f};
};
template <> struct Quadrant<double> {
    static constexpr double kSin[] = {1.57079632679489662,     -0.645964097506246252,   0.0796926262461669245,
                                      -0.00468175413531482707, 0.0001604411847266723,   -3.5988427171448578e-6,
                                      5.69192785048963342e-8,  -6.62762493899247236e-10};
    static constexpr double kCos[] = {-1.23370055013616983,    0.253669507901048014,    -0.0208634807633529503,
                                      0.000919260274839089406, -0.00002520204236776104, 4.71087432643113147e-7,
                                      -6.38638909690451652e-9, 6.51322272759281111e-11};
};

// Integers in [0, 2^24], as T.
template <class T> FASTVAE_INLINE Vec<T> to_real(IVec<T> n) {
    constexpr T kTwo52 = T(0x1p52);
    if constexpr (sizeof(T) == 4)
        return __builtin_convertvector(n, Vec<T>);
    else
        return (Vec<T>)(n | (IVec<T>)splat(kTwo52)) - kTwo52;
}

// Even and odd normals from the upper 24 bits of the words: radius and angle are in [0, 2^24).
template <class T>
FASTVAE_INLINE void box_muller(IVec<T> radius, IVec<T> angle, Vec<T> &even, Vec<T> &odd) {
    const Vec<T> r = sqrt_<T>(log_normal<T>(to_real<T>(radius + 1) * T(0x1p-24)) * T(-2));
    const Vec<T> quarters = to_real<T>(angle) * T(0x1p-22);              // in [0, 4), exact
    const Vec<T> rounded = quarters + Elementary<T>::kRound;              // its low bits count the quadrant
    const Vec<T> t = quarters - (rounded - Elementary<T>::kRound);        // exact
    const Vec<T> t2 = t * t;
    const Vec<T> sine = polynomial<T>(t2, Quadrant<T>::kSin) * t;
    const Vec<T> cosine = polynomial<T>(t2, Quadrant<T>::kCos) * t2 + T(1);
    constexpr int kSign = 8 * int(sizeof(T)) - 2;  // shifts bit 1 to the sign
    const IVec<T> quadrant = (IVec<T>)rounded, swap = (quadrant & 1) == 1;
    const IVec<T> sine_sign = (quadrant & 2) << kSign, cosine_sign = ((quadrant + 1) & 2) << kSign;
    even = r * (Vec<T>)((IVec<T>)select<T>(swap, sine, cosine) ^ cosine_sign);
    odd = r * (Vec<T>)((IVec<T>)select<T>(swap, cosine, sine) ^ sine_sign);
}

// The normals of 4 kGroups elements from their words.
template <class T> FASTVAE_INLINE void to_normals(const PhiloxBlock<Words> &w, T *eps) {
    constexpr int n = kLanes<T>;
    Vec<T> even, odd, low, high;
    if constexpr (sizeof(T) == 4) {  // pairs (w0, w1) in the even lanes, (w2, w3) in the odd ones
        const Words mask = Words{} + 0xffffff, mask_high = mask << 32;
        box_muller<T>((IVec<T>)(((w.w0 >> 8) & mask) | ((w.w2 << 24) & mask_high)),
                      (IVec<T>)(((w.w1 >> 8) & mask) | ((w.w3 << 24) & mask_high)), even, odd);
        interleave(even, odd, low, high);
        store(eps, low);
        store(eps + n, high);
    } else {
        Words radius[2], angle[2];
        interleave(w.w0, w.w2, radius[0], radius[1]);
        interleave(w.w1, w.w3, angle[0], angle[1]);
        for (int i = 0; i < 2; ++i) {
            box_muller<T>((IVec<T>)((radius[i] >> 8) & 0xffffff), (IVec<T>)((angle[i] >> 8) & 0xffffff), even, odd);
            interleave(even, odd, low, high);
            store(eps + 2 * n * i, low);
            store(eps + 2 * n * i + n, high);
        }
    }
}

// The normals of elements [begin, begin + n), in `buffer`, which has room for n + kNormalsSlack.
constexpr int kNormalsSlack = 8 * kGroups + 4;
template <class T> FASTVAE_INLINE const T *fill_normals(uint64_t begin, int64_t n, uint64_t seed, T *buffer) {
    const int skip = int(begin % 4);
    for (int64_t i = 0; i < skip + n; i += 8 * kGroups) {
        const Words g = (Words)lane_index<double>() + (begin / 4 + uint64_t(i) / 4), h = g + kGroups;
        PhiloxBlock<Words> w[2] = {{g, g >> 32, Words{}, Words{}}, {h, h >> 32, Words{}, Words{}}};
        philox(w, seed, multiply);
        to_normals<T>(w[0], buffer + i);
        to_normals<T>(w[1], buffer + i + 4 * kGroups);
    }
    return buffer + skip;
}

}  // namespace fastvae::FASTVAE_ISA
