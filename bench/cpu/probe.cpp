// The machine's ceilings: float32 FMAs and exponentials per second, in registers, and bytes copied, in memory.

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#define FASTVAE_ISA probe
#include "elementary.h"

using namespace fastvae::probe;

// Runs body(thread) on every thread at once; `work` is what one of them does.
template <class F> static double rate(int threads, double work, F body) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) pool.emplace_back([&, i] { body(i); });
    for (auto &thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    return threads * work / seconds.count();
}

constexpr long kIterations = 4'000'000;

static void keep(Vec<float> v) { asm volatile("" : : "x"(v)); }

extern "C" double fma_rate(int threads) {
    constexpr int kChains = 12;  // enough to hide the latency
    return rate(threads, double(kIterations) * kChains * kLanes<float>, [](int) {
        Vec<float> sum[kChains] = {}, a = splat(0.999f), b = splat(1e-3f);
        asm volatile("" : "+x"(a), "+x"(b));
        for (auto &s : sum) asm volatile("" : "+x"(s));  // the compiler must not see that they are equal
        for (long i = 0; i < kIterations; ++i)
#pragma GCC unroll 12
            for (int k = 0; k < kChains; ++k) sum[k] = sum[k] * a + b;
        for (auto &s : sum) keep(s);
    });
}

extern "C" double exp_rate(int threads) {
    constexpr int kChains = 4;
    return rate(threads, double(kIterations) * kChains * kLanes<float>, [](int) {
        Vec<float> sum[kChains] = {}, x = splat(-0.1f);
        for (long i = 0; i < kIterations; ++i) {
            asm volatile("" : "+x"(x));
#pragma GCC unroll 4
            for (int k = 0; k < kChains; ++k) sum[k] += exp2_<float>(x + float(k));
        }
        for (auto &s : sum) keep(s);
    });
}

// Bytes read plus written by a copy between two arrays of 64 MiB for each thread.
extern "C" double copy_rate(int threads) {
    constexpr size_t kBytes = 64 << 20;
    constexpr int kTimes = 4;
    std::vector<std::vector<char>> from(threads, std::vector<char>(kBytes, 1)), to = from;  // touched
    return rate(threads, 2.0 * kBytes * kTimes, [&](int i) {
        for (int n = 0; n < kTimes; ++n) {
            std::memcpy(to[i].data(), from[i].data(), kBytes);
            asm volatile("" : : "r"(to[i].data()) : "memory");
        }
    });
}
