// Vectors of 16 bytes of numbers that are next to each other in a row, which a thread reads and writes in one access.
// That needs rows that begin at multiples of 16 bytes in everything that a kernel touches (kWide, which the host finds
// out before the launch); elsewhere a thread takes the same numbers one by one, so that no bit of a result depends on
// it.
#pragma once

#include "numbers.h"
#include "panels.h"

namespace fastvae::FASTVAE_ISA {

template <class In> struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(In);
    In x[kSize];
};

// to[e] = from[e], or 0 from `there` on; with kWide all are there
template <bool kWide, class In, int n>
FASTVAE_DEVICE void load(const In *from, int there, Accumulator<In> (&to)[n]) {
    if constexpr (kWide) {
        constexpr int size = Vector<In>::kSize;
        static_assert(n % size == 0);
        Vector<In> vectors[n / size];
        FASTVAE_UNROLL
        for (int k = 0; k < n / size; ++k) vectors[k] = reinterpret_cast<const Vector<In> *>(from)[k];
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) to[e] = load(vectors[e / size].x + e % size);
    } else {
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e) to[e] = e < there ? load(from + e) : Accumulator<In>(0);
    }
}

template <bool kWide, class Out, int n>
FASTVAE_DEVICE void store(Out *to, int there, const Accumulator<Out> (&from)[n]) {
    if constexpr (kWide) {
        constexpr int size = Vector<Out>::kSize;
        static_assert(n % size == 0);
        FASTVAE_UNROLL
        for (int k = 0; k < n / size; ++k) {
            Vector<Out> vector;
            FASTVAE_UNROLL
            for (int e = 0; e < size; ++e) store(vector.x + e, from[k * size + e]);
            store_16_bytes(to + k * size, vector);
        }
    } else {
        FASTVAE_UNROLL
        for (int e = 0; e < n; ++e)
            if (e < there) store(to + e, from[e]);
    }
}

// How many of the n numbers from d on a row of D numbers has; with kWide all or none
template <bool kWide, int n> FASTVAE_DEVICE int there_are(int64_t d, int64_t D) {
    return d >= D ? 0 : kWide || D - d >= n ? n : int(D - d);
}

// Whether each row begins at a multiple of 16 bytes; no rows at all do.
template <class In> bool aligned(const In *data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(In)) % 16 == 0;
}
template <class In> bool aligned(const Rows<In> &rows) { return aligned(rows.data, rows.stride); }

}  // namespace fastvae::FASTVAE_ISA
