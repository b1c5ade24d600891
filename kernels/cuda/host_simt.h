// Runs CUDA kernels on the host, for tests: the same source, compiled as C++, one block after another.
//
// The threads of a block are fibers, so that a barrier or a shuffle costs one switch and not a wake-up of the operating
// system's; the address sanitizer is told of each. They run one at a time, in an order that turns round at every
// barrier, so that a barrier that is missing changes results. Shared memory is poisoned (NaN) before each block, and of
// the size that the kernel declares, so that the sanitizer sees what lies beyond. Threads that wait at different
// barriers, or shuffle where others of their warp do not, end the process with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

[[noreturn]] inline void fail(const char *what, int here, int there) {
    std::fprintf(stderr, "host_simt: %s (lines %d and %d), block %u\n", what, here, there, blockIdx.x);
    std::abort();
}

// The saved state of a fiber while another runs. On x86-64 this does what swapcontext() does without its system calls,
// which would be most of the time that a shuffle takes.
#ifdef __x86_64__
struct Context {
    void *top = nullptr;  // of its stack, where its registers and its return address are
    void start(char *stack, void (*function)()) {
        void **sp = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15)) - 8;
        for (int k = 0; k < 6; ++k) sp[k] = nullptr;
        sp[6] = reinterpret_cast<void *>(function);
        sp[7] = nullptr;
        top = sp;
    }
};
__attribute__((naked, noinline)) inline void swap(Context *, Context *) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#else
struct Context {
    ucontext_t context;
    void start(char *stack, void (*function)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, function, 0);
    }
};
inline void swap(Context *from, Context *to) { swapcontext(&from->context, &to->context); }
#endif

struct Fiber {
    enum State { kReady, kAtBarrier, kInWarp, kPolls, kDone } state;
    Context context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    int line;                   // of the barrier or shuffle that it waits at
    unsigned char value[2][8];  // what it gives to the warp, by turns, so that none is overwritten before it is read
    int turn;
    std::function<bool()> until;  // what it polls for
    void *fake_stack;
};

struct Block {
    std::vector<Fiber> fibers;
    Context scheduler;
    void *scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    int current = 0, votes = 0, vote = 0;
    std::function<void()> body;
    std::function<void()> at_end;  // checks that are another's
    std::vector<char> *shared = nullptr;
};
inline Block block;
inline std::mutex launching;  // one kernel at a time

// Sanitizers keep a shadow of the stack in use.
inline void leaving([[maybe_unused]] void **fake, [[maybe_unused]] const void *to, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, to, size);
#endif
}
inline void arrived([[maybe_unused]] void *fake, [[maybe_unused]] bool from_scheduler) {
#ifdef __SANITIZE_ADDRESS__
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (from_scheduler) block.scheduler_stack = const_cast<void *>(bottom), block.scheduler_size = size;
#endif
}

inline void wait(Fiber::State state, int line) {
    Fiber &self = block.fibers[block.current];
    self.state = state;
    self.line = line;
    leaving(state == Fiber::kDone ? nullptr : &self.fake_stack, block.scheduler_stack, block.scheduler_size);
    swap(&self.context, &block.scheduler);
    arrived(self.fake_stack, true);
}

inline void run_fiber() {
    arrived(nullptr, true);
    block.body();
    wait(Fiber::kDone, 0);
}

inline void switch_to(int t) {
    block.current = t;
    threadIdx = dim3(unsigned(t), 0, 0);
    void *fake = nullptr;
    leaving(&fake, block.fibers[t].stack.get(), kStack);
    swap(&block.scheduler, &block.fibers[t].context);
    arrived(fake, false);
}

// Lets those threads go on for which what they wait for has come; returns whether there were any.
inline bool release() {
    bool any = false;
    auto &fibers = block.fibers;
    const int n = int(fibers.size());
    for (int first = 0; first < n; first += kWarp) {
        const Fiber &one = fibers[first];
        bool all = true;
        for (int t = first; t < first + kWarp; ++t) all &= fibers[t].state == Fiber::kInWarp;
        for (int t = first; all && t < first + kWarp; ++t) {
            if (fibers[t].line != one.line) fail("a warp's threads shuffle in different places", one.line, fibers[t].line);
            fibers[t].state = Fiber::kReady;
            any = true;
        }
    }
    for (Fiber &f : fibers)
        if (f.state == Fiber::kPolls && f.until()) f.state = Fiber::kReady, any = true;
    bool all = true;
    for (const Fiber &f : fibers) all &= f.state == Fiber::kAtBarrier;
    if (!all) return any;
    for (Fiber &f : fibers) {
        if (f.line != fibers[0].line) fail("threads wait at different barriers", fibers[0].line, f.line);
        f.state = Fiber::kReady;
    }
    block.vote = block.votes;
    block.votes = 0;
    return true;
}

inline void run_block(int threads) {
    if (int(block.fibers.size()) != threads) block.fibers = std::vector<Fiber>(threads);
    block.shared = nullptr;
    for (Fiber &f : block.fibers) {
        f.state = Fiber::kReady;
        f.turn = 0;
        f.context.start(f.stack.get(), run_fiber);
    }
    for (bool backwards = false;; backwards = !backwards) {
        for (int k = 0; k < threads; ++k) {
            const int t = backwards ? threads - 1 - k : k;
            if (block.fibers[t].state == Fiber::kReady) switch_to(t);
        }
        if (release()) continue;
        const Fiber &first = block.fibers[0];
        for (const Fiber &f : block.fibers)
            if (f.state != Fiber::kDone) fail("threads wait for others that never come", first.line, f.line);
        break;
    }
    if (block.at_end) block.at_end();
    delete block.shared;
}

inline void barrier(int line) { wait(Fiber::kAtBarrier, line); }

inline int barrier_or(int predicate, int line) {
    block.votes |= predicate != 0;
    wait(Fiber::kAtBarrier, line);
    return block.vote;
}
inline int barrier_and(int predicate, int line) { return !barrier_or(!predicate, line); }

inline void poll(std::function<bool()> until, int line) {
    if (until()) return;
    block.fibers[block.current].until = std::move(until);
    wait(Fiber::kPolls, line);
}

template <class T> T shuffle_xor(T x, int offset, int line) {
    Fiber &self = block.fibers[block.current];
    const int turn = self.turn;
    self.turn ^= 1;
    std::memcpy(self.value[turn], &x, sizeof x);
    wait(Fiber::kInWarp, line);
    std::memcpy(&x, block.fibers[block.current ^ offset].value[turn], sizeof x);
    return x;
}

// The block's shared memory, one object of type T.
template <class T> T &shared() {
    if (!block.shared) block.shared = new std::vector<char>(sizeof(T) + 64, char(0xff));
    return *reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(block.shared->data()) + 63) & ~uintptr_t(63));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, Arguments... arguments) {
    const std::lock_guard lock(launching);
    gridDim = grid;
    blockDim = dim3(unsigned(threads));
    block.body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            run_block(threads);
        }
}

}  // namespace simt

#define __syncthreads() simt::barrier(__LINE__)
#define __syncthreads_or(predicate) simt::barrier_or(predicate, __LINE__)
#define __syncthreads_and(predicate) simt::barrier_and(predicate, __LINE__)
#define __syncwarp() simt::wait(simt::Fiber::kInWarp, __LINE__)
#define __shfl_xor_sync(mask, x, offset) simt::shuffle_xor(x, offset, __LINE__)

// The functions of CUDA that the host's <cmath> does not have
inline void sincospif(float x, float *sine, float *cosine) {
    *sine = float(std::sin(M_PI * double(x)));
    *cosine = float(std::cos(M_PI * double(x)));
}
inline void sincospi(double x, double *sine, double *cosine) {
    *sine = double(std::sin(M_PIl * (long double)(x)));
    *cosine = double(std::cos(M_PIl * (long double)(x)));
}
