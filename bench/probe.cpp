// The machine's ceilings, measured in registers: float32 FMAs and exponentials per second.

#include <chrono>
#include <thread>
#include <vector>

#define FASTVAE_ISA probe
#include "elementary.h"

using namespace fastvae::probe;

// Runs body(iterations) on every thread at once; `work` is what one iteration does.
template <class F> static double rate(int threads, double work, F body) {
    constexpr long kIterations = 4'000'000;
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) pool.emplace_back([&] { body(kIterations); });
    for (auto &thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    return threads * double(kIterations) * work / seconds.count();
}

static void keep(Vec<float> v) { asm volatile("" : : "x"(v)); }

extern "C" double fma_rate(int threads) {
    constexpr int kChains = 12;  // enough to hide the latency
    return rate(threads, kChains * kLanes<float>, [](long n) {
        Vec<float> sum[kChains] = {}, a = splat(0.999f), b = splat(1e-3f);
        asm volatile("" : "+x"(a), "+x"(b));
        for (auto &s : sum) asm volatile("" : "+x"(s));  // the compiler must not see that they are equal
        for (long i = 0; i < n; ++i)
#pragma GCC unroll 12
            for (int k = 0; k < kChains; ++k) sum[k] = sum[k] * a + b;
        for (auto &s : sum) keep(s);
    });
}

extern "C" double exp_rate(int threads) {
    constexpr int kChains = 4;
    return rate(threads, kChains * kLanes<float>, [](long n) {
        Vec<float> sum[kChains] = {}, x = splat(-0.1f);
        for (long i = 0; i < n; ++i) {
            asm volatile("" : "+x"(x));
#pragma GCC unroll 4
            for (int k = 0; k < kChains; ++k) sum[k] += exp2_<float>(x + float(k));
        }
        for (auto &s : sum) keep(s);
    });
}
