// Sums over several blocks: partials in float64, which a second kernel adds up in order, unless there is only one block.
#pragma once

#include "panels.h"

namespace fastvae::FASTVAE_ISA {

// How many partials a sum of n numbers is made of, about.
inline int64_t partials_of(int64_t n) {
    constexpr int64_t kOfOneBlock = 16384, kMost = 1024;
    return n / kOfOneBlock < kMost ? n / kOfOneBlock + 1 : kMost;
}

// Adds up the first `count` of what the block's threads of the same columns have, or with a width of 1 all of them, in
// a fixed order; valid in the first `width` threads.
template <int n> FASTVAE_DEVICE void sum_of_block(double (&x)[n], int count, int64_t width) {
    double(&sums)[n][kThreads] = shared_memory<double[n][kThreads]>();
    __syncthreads();
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e)
        if (e < count) sums[e][threadIdx.x] = x[e];
    for (int64_t half = kThreads / 2; half >= width; half /= 2) {
        __syncthreads();
        for (int e = 0; e < count && threadIdx.x < half; ++e) sums[e][threadIdx.x] += sums[e][threadIdx.x + half];
    }
    __syncthreads();
    FASTVAE_UNROLL
    for (int e = 0; e < n; ++e)
        if (e < count) x[e] = sums[e][threadIdx.x];
}

// x added up over a warp, in all of its threads
template <class T> FASTVAE_DEVICE T sum_of_warp(T x) {
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// sum_p partials[p, k] of a warp's k < n, in all of its threads
FASTVAE_DEVICE double sum_of_partials(const double *partials, int64_t parts, int64_t n, int64_t k) {
    double sum = 0;
    for (int64_t p = threadIdx.x % 32; p < parts && k < n; p += 32) sum += partials[p * n + k];
    return sum_of_warp(sum);
}

// out[k] = scale * sum_p partials[p, k]: a warp adds one up
template <class Out> __global__ void add_partials(const double *partials, int64_t parts, int64_t n, double scale, Out *out) {
    const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    const double sum = sum_of_partials(partials, parts, n, k);
    if (threadIdx.x % 32 == 0 && k < n) store(out + k, Accumulator<Out>(scale * sum));
}

// Of x [n], each block of a part: the partials, or where there is one block out = scale * sum_i x[i]
template <class T>
__global__ void sum_numbers(const T *x, int64_t n, Parts parts, double scale, T *out, double *partials) {
    const int64_t first = blockIdx.x * parts.size, last = first + parts.size < n ? first + parts.size : n;
    double sum[1] = {};
    for (int64_t k = first + threadIdx.x; k < last; k += kThreads) sum[0] += double(x[k]);
    sum_of_block(sum, 1, 1);
    if (threadIdx.x) return;
    if (gridDim.x == 1)
        *out = T(scale * sum[0]);
    else
        partials[blockIdx.x] = sum[0];
}

// A sum of n numbers in all: its memory and its kernels
struct Sum {
    int64_t n;
    Parts parts;
    double *partials;
    Sum(Arena &arena, int64_t n)
        : n(n), parts(n, partials_of(n)), partials(arena.take<double>(parts.count > 1 ? parts.count : 0)) {}

    // out = scale * sum_i x[i]
    template <class T> int run(const T *x, double scale, T *out, Stream stream) const {
        FASTVAE_TRY(launch(sum_numbers<T>, parts.count, 1, kThreads, stream, x, n, parts, scale, out, partials));
        if (parts.count == 1) return FASTVAE_CUDA_OK;
        return launch(add_partials<T>, 1, 1, kThreads, stream, partials, parts.count, 1, scale, out);
    }
};

}  // namespace fastvae::FASTVAE_ISA
