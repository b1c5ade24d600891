// Threads at work, the same code for all instruction sets (parallel.cpp).
#pragma once

#include <atomic>
#include <cstdint>

#include "fastvae.h"

namespace fastvae {

// One of the threads that work on the units of a call.
struct Worker {
    const int number;  // from 0 on
    const bool asks;   // whether it is the thread that fastvae_poll is about
    std::atomic<bool> &given_up;

    // Whether the call is given up, which is found out here. That is asked between units; a unit that may take longer
    // than a tenth of a second asks now and then, and may then leave its work as it is.
    bool stopped() const;
};

// Calls body(context, unit, worker) for every unit in [0, units) on at most `threads` threads. Units begin in order;
// where the call is given up no more begin. Gives FASTVAE_OK or FASTVAE_INTERRUPTED. Runs on one thread while another
// one is here (parallel.cpp).
[[nodiscard]] int run_units(int64_t units, int threads,
                            void (*body)(void *context, int64_t unit, const Worker &worker), void *context);

// fastvae_poll
void set_poll(int (*interrupted)(), uint64_t thread);

}  // namespace fastvae
