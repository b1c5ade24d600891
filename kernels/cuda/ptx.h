// What is PTX, and what stands for it on the host. Everything else in this directory is plain CUDA C++.
#pragma once

#ifdef FASTVAE_HOST_SIMT
#include "host_simt.h"
#else
#include <cuda_runtime.h>
#endif

#include "portable.h"

#define FASTVAE_DEVICE __device__ inline __attribute__((always_inline))

namespace fastvae::FASTVAE_ISA {

// One object in the block's shared memory; a kernel has one.
template <class T> FASTVAE_DEVICE T &shared_memory() {
#ifdef FASTVAE_HOST_SIMT
    return simt::shared<T>();
#else
    __shared__ alignas(128) unsigned char bytes[sizeof(T)];
    return reinterpret_cast<T &>(bytes);
#endif
}

// 2^x, within 2 ulp; 0 below 2^-126
FASTVAE_DEVICE float exp2_(float x) {
#ifdef FASTVAE_HOST_SIMT
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
FASTVAE_DEVICE double exp2_(double x) { return exp2(x); }

// The greater of the two, or NaN if one is
FASTVAE_DEVICE float max_or_nan(float a, float b) {
#ifdef FASTVAE_HOST_SIMT
    return a > b || a != a ? a : b;
#else
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#endif
}

// Copies from global to shared memory that go on while the block computes. All threads of the block make the same
// calls: fetch(), any number of times; commit(), which closes a group; wait<n>(), until all but the last n groups are
// there; then a barrier, as each thread knows only of its own part. Addresses and sizes are multiples of 16 bytes.
class AsyncCopies {
public:
    FASTVAE_DEVICE void fetch(void *shared, const void *global, int bytes) {
        for (int at = 16 * int(threadIdx.x); at < bytes; at += 16 * int(blockDim.x)) {
            char *const to = static_cast<char *>(shared) + at;
            const char *const from = static_cast<const char *>(global) + at;
#ifdef FASTVAE_HOST_SIMT
            std::memset(to, 0xff, 16);
            group_.push_back({to, from, 16});
#else
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                         "l"(__cvta_generic_to_global(from))
                         : "memory");
#endif
        }
    }
    FASTVAE_DEVICE void commit() {
#ifdef FASTVAE_HOST_SIMT
        groups_.push_back(std::move(group_));
        group_.clear();
#else
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    template <int n> FASTVAE_DEVICE void wait() {
#ifdef FASTVAE_HOST_SIMT
        for (; int(groups_.size()) > n; groups_.erase(groups_.begin()))
            for (const simt::Pending &copy : groups_.front()) std::memcpy(copy.to, copy.from, copy.size);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
    }

private:
#ifdef FASTVAE_HOST_SIMT
    std::vector<simt::Pending> group_;
    std::vector<std::vector<simt::Pending>> groups_;
#endif
};

}  // namespace fastvae::FASTVAE_ISA
