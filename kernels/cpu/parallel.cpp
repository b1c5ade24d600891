// The thread pool: OpenMP's, from whichever runtime is already in the process (torch's), so that torch and
// fastvae share one set of threads. No OpenMP runtime is linked; the symbols resolve when the library loads.

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace fastvae {

// libgomp's threads do not survive fork, and a child that waits for them hangs.
static bool forked = false;
__attribute__((constructor)) static void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// Of several threads calling at once one gets the pool; the others do not oversubscribe the machine.
static std::atomic_flag pool_taken = ATOMIC_FLAG_INIT;

void run_units(int64_t units, int threads, void (*body)(void *, int64_t, int), void *context) {
    if (threads > units) threads = int(units);
    if (threads <= 1 || forked || pool_taken.test_and_set(std::memory_order_acquire)) {
        for (int64_t unit = 0; unit < units; ++unit) body(context, unit, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
#pragma omp parallel num_threads(threads)
    {
        const int worker = workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
            body(context, unit, worker);
    }
    pool_taken.clear(std::memory_order_release);
}

}  // namespace fastvae
