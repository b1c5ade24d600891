// The threads that work is done on: torch's where they can be had, else a pool of our own.
//
// Torch's Linux and macOS builds bring an OpenMP runtime, whose threads go on spinning for milliseconds after each of
// torch's operations; threads of our own would have to share the cores with them (README.md). So they are asked to do
// our work too, through GOMP_parallel, which GNU's runtime, LLVM's and Intel's all have. It is looked up in the process
// when the library loads: nothing here is compiled for OpenMP or linked to a runtime, which makes it the same for every
// compiler. The pool serves where there is none (Windows, a program without torch), and in forked children, which
// OpenMP's threads do not survive.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#define FASTVAE_FORKS 0
#else
#define FASTVAE_FORKS 1
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastvae {
namespace {

// Units of work, of which each thread takes the next until there are no more.
class Job {
public:
    Job(int64_t units, void (*body)(void *, int64_t, int), void *context)
        : units_(units), body_(body), context_(context) {}

    void work() {
        const int worker = workers_.fetch_add(1, std::memory_order_relaxed);
        for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_;)
            body_(context_, unit, worker);
    }

private:
    const int64_t units_;
    void (*const body_)(void *, int64_t, int);
    void *const context_;
    std::atomic<int64_t> next_{0};
    std::atomic<int> workers_{0};
};

// Threads that sleep until there is a job. They are never joined: a process may end while they sleep, and a forked
// child, which has none of them, leaves its copy of this be and makes another.
class Pool {
public:
    // The caller works, and up to `helpers` threads with it.
    void run(Job &job, int helpers) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (threads_ < helpers && start_one()) ++threads_;
        job_ = &job;
        places_ = helpers;
        lock.unlock();
        wanted_.notify_all();
        job.work();
        lock.lock();
        places_ = 0;  // a thread that has not come by now finds nothing left to do
        finished_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    bool start_one() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error &) {  // the system has no more; fewer do the same work
            return false;
        }
    }

    void serve() {
        for (std::unique_lock<std::mutex> lock(mutex_);;) {
            wanted_.wait(lock, [this] { return places_ > 0; });
            --places_, ++busy_;
            Job &job = *job_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--busy_ == 0) finished_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wanted_, finished_;
    Job *job_ = nullptr;
    int threads_ = 0, places_ = 0, busy_ = 0;
};

using Parallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

// Who else would work, in this process.
struct Helpers {
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    Parallel openmp = nullptr;
    Pool *pool = nullptr;  // once it is needed; only who holds `taken` looks at it

    Helpers();
} helpers;

Helpers::Helpers() {
#if FASTVAE_FORKS
    openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    pthread_atfork(nullptr, nullptr, [] {
        helpers.openmp = nullptr;
        helpers.pool = nullptr;
        helpers.taken.clear();  // a thread that held it is not in the child
    });
#endif
}

}  // namespace

void run_units(int64_t units, int threads, void (*body)(void *, int64_t, int), void *context) {
    Job job(units, body, context);
    if (threads > units) threads = int(units);
    // Of several threads calling at once one gets the helpers; the others do not oversubscribe the machine.
    if (threads <= 1 || helpers.taken.test_and_set(std::memory_order_acquire)) {
        job.work();
        return;
    }
    if (helpers.openmp) {
        helpers.openmp([](void *job) { static_cast<Job *>(job)->work(); }, &job, unsigned(threads), 0);
    } else {
        if (!helpers.pool) helpers.pool = new Pool;
        helpers.pool->run(job, threads - 1);
    }
    helpers.taken.clear(std::memory_order_release);
}

}  // namespace fastvae
