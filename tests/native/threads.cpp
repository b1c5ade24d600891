// Every kernel on one thread and on four, in float and in double, alone, interrupted, from several threads at once and
// in forked children, without Python: for the thread sanitizer, and for machines that Python's tests do not reach (an
// emulated CPU, Windows). There is no OpenMP runtime in this process, so the library's own pool is at work.
// Prints what differs and returns 1; float and double must agree roughly, thread counts bit for bit.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "fastvae.h"

namespace {

template <class T> using Values = std::vector<T>;

// The same pseudo-random numbers in both dtypes, about uniform in [-1, 1].
template <class T> Values<T> noise(int64_t n, uint32_t seed, T scale = 1, T shift = 0) {
    Values<T> x(n);
    for (auto &v : x) {
        seed = seed * 1664525u + 1013904223u;
        v = shift + scale * T(float(seed >> 8) * 0x1p-23f - 1);
    }
    return x;
}

// All outputs of all kernels, one after another.
template <class T> struct Outputs {
    std::vector<std::string> names;
    std::vector<Values<T>> values;
    int status = FASTVAE_OK;  // of all calls, or-ed
    T *add(const char *name, int64_t n) {
        names.emplace_back(name);
        values.emplace_back(n, T(NAN));
        return values.back().data();
    }
};

template <class T> Outputs<T> run_all(const fastvae_kernels &k, int threads) {
    const int64_t S = 331, N = 517, D = 33, L = 3;
    const auto z = noise<T>(S * D, 1, 2), mu = noise<T>(N * D, 2), logvar = noise<T>(N * D, 3, 1, -1);
    const auto prior = noise<T>(D, 4), g = noise<T>(S * N, 5), log_w = noise<T>(N, 6, 1, -6);
    std::vector<int64_t> own(N);
    for (int64_t i = 0; i < N; ++i) own[i] = i % 7 ? i % N : -1;
    const uint64_t seed = 42;
    Outputs<T> out;
    out.names.reserve(64), out.values.reserve(64);
#define WEIGHTS log_w.data(), 0.0, own.data(), -7.0, -5.0
    for (int reduction = 0; reduction < 4; ++reduction) {
        const int64_t size[] = {N * D, N, D, 1};
        out.status |= k.kl_gauss(mu.data(), D, logvar.data(), D, prior.data(), 0, nullptr, 0, N, D, reduction, 0.5,
                                 out.add("kl_gauss", size[reduction]), threads);
    }
    out.status |= k.kl_gauss_backward(g.data(), D, 1, 0.5, mu.data(), D, logvar.data(), D, prior.data(), 0,
                                      prior.data(), 0, N, D, out.add("kl d_mu", N * D), out.add("kl d_logvar", N * D),
                                      out.add("kl d_prior_mu", D), out.add("kl d_prior_logvar", D), threads);
    for (const auto &[reduction, size] : {std::pair(FASTVAE_SAMPLE, N), std::pair(FASTVAE_SUM, int64_t(1))})
        out.status |= k.sample_gauss(mu.data(), D, logvar.data(), D, &seed, L, N, D, reduction, 0.5,
                                     out.add("z", L * N * D), out.add("log_q", L * N), out.add("log_p", L * N),
                                     out.add("kl", size), out.add("eps", L * N * D), threads);
    const T *const eps = out.values.back().data();
    const auto d_z = noise<T>(L * N * D, 7);
    for (const T *read : {static_cast<const T *>(nullptr), eps})
        out.status |= k.sample_gauss_backward(d_z.data(), d_z.data() + 1, d_z.data() + 2, d_z.data() + 3, 1, 0.5,
                                              mu.data(), D, logvar.data(), D, &seed, read, L, N, D,
                                              out.add("sample d_mu", N * D), out.add("sample d_logvar", N * D), threads);
    out.status |= k.bernoulli_log_prob(mu.data(), D, d_z.data(), D, N, L * N, D, out.add("bernoulli", L * N), threads);
    out.status |= k.bernoulli_log_prob_backward(g.data(), 1, mu.data(), D, d_z.data(), D, N, L * N, D,
                                                out.add("bernoulli d_logits", L * N * D), threads);
    out.status |= k.cross_log_prob(z.data(), mu.data(), logvar.data(), S, N, D, out.add("cross", S * N), threads);
    out.status |= k.cross_log_prob_backward(g.data(), z.data(), mu.data(), logvar.data(), S, N, D,
                                            out.add("cross d_z", S * D), out.add("cross d_mu", N * D),
                                            out.add("cross d_logvar", N * D), threads);
    T *joint = out.add("joint", S);
    out.status |= k.agg_log_prob(z.data(), mu.data(), logvar.data(), WEIGHTS, S, N, D, joint, 1, threads);
    out.status |= k.agg_log_prob_backward(g.data(), z.data(), mu.data(), logvar.data(), WEIGHTS, S, N, D, nullptr,
                                          out.add("agg d_z", S * D), out.add("agg d_mu", N * D),
                                          out.add("agg d_logvar", N * D), out.add("agg d_log_w", N), 1, threads);
    joint = out.add("joint again", S);
    T *marginals = out.add("marginals", S * D);
    out.status |= k.agg_log_prob_marginals(z.data(), mu.data(), logvar.data(), WEIGHTS, S, N, D, joint, marginals,
                                           threads);
    out.status |= k.agg_log_prob_marginals_backward(g.data(), g.data() + S, joint, marginals, z.data(), mu.data(),
                                                    logvar.data(), WEIGHTS, S, N, D, out.add("marg d_z", S * D),
                                                    out.add("marg d_mu", N * D), out.add("marg d_logvar", N * D),
                                                    out.add("marg d_log_w", N), threads);
    out.status |= k.agg_entropy(z.data(), mu.data(), logvar.data(), WEIGHTS, S, N, D, out.add("entropy", 1), 1, threads);
    out.status |= k.agg_entropy_backward(g.data(), z.data(), mu.data(), logvar.data(), WEIGHTS, S, N, D,
                                         out.add("entropy d_z", S * D), out.add("entropy d_mu", N * D),
                                         out.add("entropy d_logvar", N * D), out.add("entropy d_log_w", N), 1, threads);
    const auto of_each = noise<T>(N * D, 8, 2);
    joint = out.add("joint of each", N), marginals = out.add("marginals of each", N * D);
    out.status |= k.kl_decomposition(of_each.data(), mu.data(), logvar.data(), WEIGHTS, N, N, D, out.add("mi", 1),
                                     out.add("agg_kl", 1), out.add("tc", 1), out.add("dim_kl", D), out.add("kl term", 1),
                                     out.add("entropy term", 1), out.add("saturation", 1), joint, marginals, threads);
    out.status |= k.kl_decomposition_backward(g.data(), g.data(), g.data(), g.data(), g.data(), g.data(), joint, marginals,
                                              of_each.data(), mu.data(), logvar.data(), WEIGHTS, N, N, D,
                                              out.add("terms d_z", N * D), out.add("terms d_mu", N * D),
                                              out.add("terms d_logvar", N * D), out.add("terms d_log_w", N), threads);
    return out;
}

bool same(const Outputs<float> &a, const Outputs<float> &b) {
    if (a.status != FASTVAE_OK || b.status != FASTVAE_OK) return false;
    for (size_t i = 0; i < a.values.size(); ++i)
        if (std::memcmp(a.values[i].data(), b.values[i].data(), a.values[i].size() * sizeof(float))) return false;
    return true;
}

// Of several callers one gets the pool, and the others do without.
bool same_from_several_threads(const fastvae_kernels &k, const Outputs<float> &expected) {
    constexpr int kCallers = 8;
    std::atomic<int> right{0};
    std::vector<std::thread> callers;
    for (int n = 0; n < kCallers; ++n) callers.emplace_back([&] { right += same(run_all<float>(k, 4), expected); });
    for (auto &caller : callers) caller.join();
    return right == kCallers;
}

uint64_t this_thread() {
#if defined(_WIN32)
    return GetCurrentThreadId();
#else
    return uint64_t(pthread_self());
#endif
}

// Every second time that it is asked this thread says that it has enough, the first time after calls of its own. Other
// threads are not asked, and what comes afterwards is complete.
bool ends_when_interrupted(const fastvae_kernels &k, const Outputs<float> &expected, int threads) {
    static struct {
        const fastvae_kernels *k;
        const Outputs<float> *expected;
        uint64_t thread;
        int times;
        bool right;
    } asked;
    asked = {&k, &expected, this_thread(), 0, true};
    fastvae_poll(
        [] {
            asked.right &= this_thread() == asked.thread;
            if (++asked.times == 1) asked.right &= same(run_all<float>(*asked.k, 2), *asked.expected);
            return int(asked.times % 2 == 0);
        },
        asked.thread);
    std::atomic<bool> enough{false};
    bool right = true, right_elsewhere = true;
    std::thread other([&] {
        while (!enough) right_elsewhere &= same(run_all<float>(k, threads), expected);
    });
    for (int calls = 0, interrupted = 0; interrupted < 2 && right; ++calls) {
        const int before = asked.times / 2;
        const auto out = run_all<float>(k, threads);
        const bool now = asked.times / 2 > before;
        right = calls < 5000 && (now ? out.status == FASTVAE_INTERRUPTED : same(out, expected));
        interrupted += now;
    }
    fastvae_poll(nullptr, 0);
    enough = true;
    other.join();
    return right && right_elsewhere && asked.right && same(run_all<float>(k, threads), expected);
}

// A child, and a child of that; as if so where there are none.
bool same_in_forked_children(const fastvae_kernels &k, const Outputs<float> &expected, int generations = 2) {
#if defined(_WIN32)
    (void)k, (void)expected, (void)generations;
    return true;
#else
    if (generations == 0) return true;
    const pid_t child = fork();
    if (child == 0) {
        alarm(120);  // a child that hangs is ended
        const bool right = same(run_all<float>(k, 4), expected);
        _exit(right && same_in_forked_children(k, expected, generations - 1) ? 0 : 1);
    }
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
#endif
}

// Forked while another thread has the pool, which is not in the child.
bool same_in_children_of_a_busy_process(const fastvae_kernels &k, const Outputs<float> &expected) {
    std::atomic<bool> enough{false};
    std::thread other([&] {
        while (!enough) run_all<float>(k, 4);
    });
    bool right = true;
    for (int child = 0; child < 8; ++child) right &= same_in_forked_children(k, expected, 1);
    enough = true;
    other.join();
    return right;
}

}  // namespace

int main(int arguments, char **argument) {
    const bool forks = arguments < 2 || std::strcmp(argument[1], "--no-fork");
    int failures = 0;
    const auto check = [&](const char *name, bool right, const char *what) {
        if (!right) std::printf("%s: %s hang or get something else\n", name, what);
        failures += !right;
    };
    std::string sets = fastvae_instruction_sets();
    for (char *name = std::strtok(sets.data(), " "); name; name = std::strtok(nullptr, " ")) {
        const fastvae_kernels &f32 = *fastvae_kernels_for(name, FASTVAE_F32);
        const fastvae_kernels &f64 = *fastvae_kernels_for(name, FASTVAE_F64);
        const auto serial = run_all<float>(f32, 1);
        if (forks) check(name, same_in_forked_children(f32, serial), "children forked before there is a pool");
        const auto parallel = run_all<float>(f32, 4);
        const auto exact = run_all<double>(f64, 1), exact_parallel = run_all<double>(f64, 4);
        for (size_t i = 0; i < serial.values.size(); ++i) {
            const size_t n = serial.values[i].size();
            bool same = !std::memcmp(serial.values[i].data(), parallel.values[i].data(), n * sizeof(float));
            same &= !std::memcmp(exact.values[i].data(), exact_parallel.values[i].data(), n * sizeof(double));
            double error = 0, size = 1;
            for (size_t e = 0; e < n; ++e) {
                const double difference = std::fabs(serial.values[i][e] - exact.values[i][e]);
                if (!(difference <= error)) error = difference;  // takes NaN, and keeps it
                size = std::fmax(size, std::fabs(exact.values[i][e]));
            }
            if (!same || !(error <= 2e-5 * size)) {
                ++failures;
                std::printf("%s: %s: %s, error %g of %g\n", name, serial.names[i].c_str(),
                            same ? "deterministic" : "DEPENDS ON THE THREADS", error, size);
            }
        }
        check(name, same_from_several_threads(f32, serial), "several callers at once");
        for (const int threads : {1, 4})
            check(name, ends_when_interrupted(f32, serial, threads), "interrupted calls");
        if (forks) check(name, same_in_forked_children(f32, serial), "forked children");
        if (forks) check(name, same_in_children_of_a_busy_process(f32, serial), "children of a busy process");
        std::printf("%s: %zu outputs checked\n", name, serial.values.size());
        std::fflush(stdout);
    }
    return failures != 0;
}
