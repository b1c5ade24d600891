// All that is written in PTX, and what stands for it on the host. Everything else in this directory is plain CUDA C++.
#pragma once

#ifdef FASTVAE_HOST_SIMT
#include "host_copies.h"
#else
#include <cuda_runtime.h>
#endif

#include "portable.h"

// Whether copies are in bulk where the GPU can (sm_90 and later)
#ifndef FASTVAE_CUDA_BULK
#define FASTVAE_CUDA_BULK 1
#endif

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

// Hides the value of x from the compiler, so that what it has computed from x, addresses above all, is computed again
// where it is needed next: kept in between, it would take registers that tiles need.
FASTVAE_DEVICE void forget([[maybe_unused]] int &x) {
#ifndef FASTVAE_HOST_SIMT
    asm volatile("" : "+r"(x));
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

// Stores 16 bytes in one access, which the compiler might make several.
template <class Vector> FASTVAE_DEVICE void store_16_bytes(void *to, const Vector &vector) {
    static_assert(sizeof vector == 16);
#ifdef FASTVAE_HOST_SIMT
    *static_cast<Vector *>(to) = vector;
#else
    uint32_t words[4];
    memcpy(words, &vector, sizeof words);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
#endif
}

// Copies from global to shared memory that go on while the block computes. All threads of the block make the same
// calls: fetch(), any number of times; commit(), which closes a group; wait<n>(), until the last group but n is there;
// then a barrier, as each thread may know only of its own part. A group has one of kGroups places, by turns: that which
// is being filled, and what wait() returns. Addresses and sizes are multiples of 16 bytes.
template <int kGroups> struct Turns {
    int next = 0;  // and twice as many: whether this turn is an odd one
    FASTVAE_DEVICE void advance() { next = next + 1 == 2 * kGroups ? 0 : next + 1; }
    FASTVAE_DEVICE int place() const { return next < kGroups ? next : next - kGroups; }
    FASTVAE_DEVICE int parity() const { return next >= kGroups; }
    FASTVAE_DEVICE Turns before(int n) const { return {next < n ? next - n + 2 * kGroups : next - n}; }
};

#if FASTVAE_CUDA_BULK && (defined(FASTVAE_HOST_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900))

// Copies in bulk, by one thread. Each place has an mbarrier, whose phase ends with the one arrival that commit() makes
// and the bytes that fetch() announced. A thread may run ahead of the one that commits, but not by a barrier of the
// block, and between two of these are at most kGroups commits: so that none asks for a phase before the last one has
// ended in its place, where its parity would say that it is over.
template <int kGroups> class AsyncCopies {
public:
    struct Shared {
#ifdef FASTVAE_HOST_SIMT
        simt::Mbarrier barriers[kGroups];
#else
        uint64_t barriers[kGroups];
#endif
    };
    FASTVAE_DEVICE explicit AsyncCopies(Shared &shared) : shared_(shared) {
        for (int k = 0; k < kGroups && threadIdx.x == 0; ++k) {
#ifdef FASTVAE_HOST_SIMT
            shared.barriers[k].init();
#else
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at(k)) : "memory");
#endif
        }
#ifndef FASTVAE_HOST_SIMT  // so that the copies' own path to memory sees the barriers too
        if (threadIdx.x == 0)
            asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
        __syncthreads();
    }
    FASTVAE_DEVICE void fetch(void *to, const void *from, int bytes) {
        if (threadIdx.x || !bytes) return;
#ifdef FASTVAE_HOST_SIMT
        shared_.barriers[filling()].expect(bytes);
        shared_.barriers[filling()].copy(to, from, size_t(bytes));
#else
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(at(filling())), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         unsigned(__cvta_generic_to_shared(to))),
                     "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(at(filling()))
                     : "memory");
#endif
    }
    FASTVAE_DEVICE void commit() {
        if (threadIdx.x == 0) {
#ifdef FASTVAE_HOST_SIMT
            shared_.barriers[filling()].arrive();
#else
            asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(at(filling())) : "memory");
#endif
        }
        turns_.advance();
    }
    template <int n> FASTVAE_DEVICE int wait() {
        static_assert(n < kGroups);
        const Turns<kGroups> turn = turns_.before(n + 1);
#ifdef FASTVAE_HOST_SIMT
        shared_.barriers[turn.place()].wait(turn.parity(), __LINE__);
#else
        int done;
        do {
            asm volatile(
                "{\n\t.reg .pred done;\n\tmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n\t"
                "selp.b32 %0, 1, 0, done;\n\t}"
                : "=r"(done)
                : "r"(at(turn.place())), "r"(turn.parity())
                : "memory");
        } while (!done);
#endif
        return turn.place();
    }
    FASTVAE_DEVICE int filling() const { return turns_.place(); }

private:
#ifndef FASTVAE_HOST_SIMT
    FASTVAE_DEVICE unsigned at(int place) const { return unsigned(__cvta_generic_to_shared(shared_.barriers + place)); }
#endif
    Shared &shared_;
    Turns<kGroups> turns_;
};

#else

// Copies by each thread, 16 bytes at a time
template <int kGroups> class AsyncCopies {
public:
    struct Shared {};
    FASTVAE_DEVICE explicit AsyncCopies(Shared &) {}
    FASTVAE_DEVICE void fetch(void *shared, const void *global, int bytes) {
        for (int at = 16 * int(threadIdx.x); at < bytes; at += 16 * int(blockDim.x)) {
            char *const to = static_cast<char *>(shared) + at;
            const char *const from = static_cast<const char *>(global) + at;
#ifdef FASTVAE_HOST_SIMT
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
        turns_.advance();
    }
    template <int n> FASTVAE_DEVICE int wait() {
#ifdef FASTVAE_HOST_SIMT
        for (; int(groups_.size()) > n; groups_.erase(groups_.begin()))
            for (const simt::Copy &copy : groups_.front()) copy.arrive();
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
        return turns_.before(n + 1).place();
    }
    FASTVAE_DEVICE int filling() const { return turns_.place(); }

private:
    Turns<kGroups> turns_;
#ifdef FASTVAE_HOST_SIMT
    std::vector<simt::Copy> group_;
    std::vector<std::vector<simt::Copy>> groups_;
#endif
};

#endif

}  // namespace fastvae::FASTVAE_ISA
