// The threads that work is done on: torch's where they can be had, else a pool of our own.
//
// Torch's Linux and macOS builds bring an OpenMP runtime, whose threads go on spinning for milliseconds after each of
// torch's operations; threads of our own would have to share the cores with them (README.md). So they are asked to do
// our work too, through GOMP_parallel, which GNU's runtime, LLVM's and Intel's all have. It is looked up in the process
// when the library loads: nothing here is compiled for OpenMP or linked to a runtime, which makes it the same for every
// compiler. The pool serves where there is none (Windows, a program without torch), and in forked children, which
// OpenMP's threads do not survive.
//
// The caller's thread works too, and between units asks whether to go on (fastvae_poll). It holds nothing then that
// another thread waits for, so that what it asks may take its time, and compute with this library in its turn.

#include <pthread.h>

#include <ctime>
#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "worker.h"

namespace fastvae {
namespace {

// Whom to ask whether to go on, and on which thread.
struct Poll {
    static constexpr int64_t kInterval = 100;  // milliseconds

    std::atomic<int (*)()> interrupted{nullptr};
    std::atomic<uint64_t> thread{0};
    std::atomic<int64_t> next{0};  // when to ask again
    std::atomic<bool> asking{false};

    void set(int (*function)(), uint64_t on) {
        interrupted = nullptr;
        thread = on;
        asking = false;  // a forked child may have been made by what was asked
        interrupted = function;
    }

    // Whether to ask on this thread; not while it is asked already, and computes with this library.
    bool here() const { return interrupted && thread == this_thread() && !asking; }

    bool ask() {
        const int64_t now = milliseconds();
        if (now < next) return false;
        next = now + kInterval;
        int (*const function)() = interrupted;
        asking = true;
        const bool stop = function && function();
        asking = false;
        return stop;
    }

private:
    static uint64_t this_thread() {
#if defined(_WIN32)
        return GetCurrentThreadId();
#else
        return uint64_t(pthread_self());
#endif
    }

    static int64_t milliseconds() {
#if defined(_WIN32)
        return int64_t(GetTickCount64());
#else
#if defined(CLOCK_MONOTONIC_COARSE)
        constexpr clockid_t clock = CLOCK_MONOTONIC_COARSE;  // never a system call
#else
        constexpr clockid_t clock = CLOCK_MONOTONIC;
#endif
        timespec now;
        clock_gettime(clock, &now);
        return int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
#endif
    }
} poll;

// Units of work, of which each thread takes the next until there are no more.
class Job {
public:
    Job(int64_t units, void (*body)(void *, int64_t, const Worker &), void *context)
        : units_(units), body_(body), context_(context) {}

    void work() {
        const Worker worker{workers_.fetch_add(1, std::memory_order_relaxed), poll.here(), given_up_};
        for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) {
            body_(context_, unit, worker);
            // After the last unit nobody is asked, and so never in a small call.
            if (next_.load(std::memory_order_relaxed) >= units_ || worker.stopped()) return;
        }
    }

    int status() const { return given_up_.load(std::memory_order_relaxed) ? FASTVAE_INTERRUPTED : FASTVAE_OK; }

private:
    const int64_t units_;
    void (*const body_)(void *, int64_t, const Worker &);
    void *const context_;
    std::atomic<int64_t> next_{0};
    std::atomic<int> workers_{0};
    std::atomic<bool> given_up_{false};
};

// Threads that sleep until there is a job. They are never joined: a process may end while they sleep, and a forked
// child, which has none of them, leaves its copy of this be and makes another. (pthreads and not std::thread, because
// the latter throws, and needs a C++ library as new as the compiler.)
class Pool {
public:
    // The caller works, and up to `helpers` threads with it.
    void run(Job &job, int helpers) {
        pthread_mutex_lock(&mutex_);
        while (threads_ < helpers && start_one()) ++threads_;  // fewer do the same work
        job_ = &job;
        places_ = helpers;
        pthread_cond_broadcast(&wanted_);
        pthread_mutex_unlock(&mutex_);
        job.work();
        pthread_mutex_lock(&mutex_);
        places_ = 0;  // a thread that has not come by now finds nothing left to do
        while (busy_ > 0) pthread_cond_wait(&finished_, &mutex_);
        pthread_mutex_unlock(&mutex_);
    }

private:
    bool start_one() {
        pthread_t thread;
        return !pthread_create(&thread, nullptr, serve, this) && !pthread_detach(thread);
    }

    static void *serve(void *self) {
        Pool &pool = *static_cast<Pool *>(self);
        for (pthread_mutex_lock(&pool.mutex_);;) {
            while (pool.places_ == 0) pthread_cond_wait(&pool.wanted_, &pool.mutex_);
            --pool.places_, ++pool.busy_;
            Job &job = *pool.job_;
            pthread_mutex_unlock(&pool.mutex_);
            job.work();
            pthread_mutex_lock(&pool.mutex_);
            if (--pool.busy_ == 0) pthread_cond_signal(&pool.finished_);
        }
        return nullptr;
    }

    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wanted_ = PTHREAD_COND_INITIALIZER, finished_ = PTHREAD_COND_INITIALIZER;
    Job *job_ = nullptr;
    int threads_ = 0, places_ = 0, busy_ = 0;
};

using Parallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

// The threads of this process that can help the caller.
struct Helpers {
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    Parallel openmp = nullptr;
    Pool *pool = nullptr;  // once it is needed; only who holds `taken` looks at it

    Helpers();
} helpers;

Helpers::Helpers() {
#if !defined(_WIN32)
    openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    pthread_atfork(nullptr, nullptr, [] {
        helpers.openmp = nullptr;
        helpers.pool = nullptr;
        helpers.taken.clear();  // a thread that held it is not in the child
    });
#endif
}

}  // namespace

int run_units(int64_t units, int threads, void (*body)(void *, int64_t, const Worker &), void *context) {
    Job job(units, body, context);
    if (threads > units) threads = int(units);
    // Where several threads call at once, one gets the helpers and the others compute alone, so that the machine is not
    // oversubscribed.
    if (threads <= 1 || helpers.taken.test_and_set(std::memory_order_acquire)) {
        job.work();
    } else {
        if (helpers.openmp)
            helpers.openmp([](void *job) { static_cast<Job *>(job)->work(); }, &job, unsigned(threads), 0);
        else if (helpers.pool || (helpers.pool = new (std::nothrow) Pool))
            helpers.pool->run(job, threads - 1);
        else
            job.work();
        helpers.taken.clear(std::memory_order_release);
    }
    return job.status();
}

bool Worker::stopped() const {
    bool stop = given_up.load(std::memory_order_relaxed);
    if (asks && !stop && (stop = poll.ask())) given_up.store(true, std::memory_order_relaxed);
    return stop;
}

void set_poll(int (*interrupted)(), uint64_t thread) { poll.set(interrupted, thread); }

}  // namespace fastvae
