// Blocks of rows against blocks of columns, each pair once, where a pair adds to the sums of its row block and to
// those of its column block: no two that share a block run at once, and every sum has one order, whatever the
// number of threads.
//
// The shorter side's blocks (minor) stay while the longer side's (major) go round: in round w, minor block k
// meets major block (w + k) mod rounds. Before that it waits until itself and its neighbour k + 1, which had that
// major block just before, are through round w - 1; a wait is short, and ends because units begin in order
// (worker.h). Where the shorter side has too few blocks to go round, the longer side is cut into groups that
// go round independently, each with its own copy of the shorter side's sums.
#pragma once

#include <sched.h>

#include "buffer.h"
#include "parallel.h"

namespace fastvae::FASTVAE_ISA {

class Rounds {
public:
    static constexpr int64_t kBlocks = 32;  // aimed at, on each side

    const int64_t row_blocks, column_blocks;
    const bool by_rows;  // rows are the longer side
    int64_t major, minor, groups, rounds;

    Rounds(int64_t row_blocks, int64_t column_blocks)
        : row_blocks(row_blocks), column_blocks(column_blocks), by_rows(row_blocks >= column_blocks),
          major(by_rows ? row_blocks : column_blocks), minor(by_rows ? column_blocks : row_blocks) {
        groups = minor > 0 && minor < kBlocks ? kBlocks / minor : 1;
        if (minor > 0 && groups > major / minor) groups = major / minor;
        rounds = (major + groups - 1) / groups;
    }

    int64_t row_copies() const { return by_rows ? 1 : groups; }
    int64_t column_copies() const { return by_rows ? groups : 1; }

    // f(row block, column block, copy of the shorter side's sums, worker); gives a status.
    template <class F> [[nodiscard]] int run(int threads, const F &f) const {
        const int64_t lanes = groups * minor;
        Buffer<int64_t> done(lanes);  // rounds that each minor block of each group is through
        if (!done) return FASTVAE_OUT_OF_MEMORY;
        for (int64_t lane = 0; lane < lanes; ++lane) done[lane] = 0;
        return parallel_for(rounds * lanes, threads, [&](int64_t unit, const Worker &worker) {
            const int64_t round = unit / lanes, lane = unit % lanes, group = lane / minor, k = lane % minor;
            const int64_t block = group * rounds + (round + k) % rounds;
            wait_for(done + lane, round);
            wait_for(done + group * minor + (k + 1) % minor, round);
            if (block < major) f(by_rows ? block : k, by_rows ? k : block, group, worker);
            __atomic_store_n(done + lane, round + 1, __ATOMIC_RELEASE);
        });
    }

private:
    // The other thread may wait for this one's core: after some looks it is given away (README.md).
    static void wait_for(const int64_t *done, int64_t round) {
        constexpr int kLooks = 200;
        for (int64_t looks = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < round; ++looks) {
            if (looks >= kLooks) sched_yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

}  // namespace fastvae::FASTVAE_ISA
