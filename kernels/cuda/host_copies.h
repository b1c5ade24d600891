// Asynchronous copies on the host, for tests: what they are to fill is NaN until a wait says that it is there.
#pragma once

#include "host_simt.h"

namespace simt {

struct Copy {
    void *to;
    const void *from;
    size_t size;

    Copy(void *to, const void *from, size_t size) : to(to), from(from), size(size) {
        const bool aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | size) % 16 == 0;
        if (!aligned || !size) fail("a copy that is not of pieces of 16 bytes", int(size), 0);
        std::memset(to, 0xff, size);
    }
    void arrive() const { std::memcpy(to, from, size); }
};

// An mbarrier for one arrival and the bytes of bulk copies, in shared memory. Its phase ends where hardware's may: once
// the arrival and as many bytes as expected are there, which the host copies when somebody looks.
class Mbarrier {
public:
    void init() {
        *this = Mbarrier();
        block.at_end = [] {
            if (!under_way().empty()) fail("a block ends before its copies", 0, 0);
        };
    }
    void expect(int64_t bytes) { check(), expected_ += bytes; }
    void copy(void *to, const void *from, size_t size) {
        check();
        under_way().push_back({{to, from, size}, this});
    }
    void arrive() {
        check();
        if (arrived_) fail("a second arrival in a phase", completed_, 0);
        arrived_ = true;
    }
    // Waits for the end of the phase of that parity, as threads do: it is over if the one under way has the other.
    void wait(int parity, int line) {
        int &seen = seen_[block.current];
        check();
        if (completed_ % 2 != parity && seen == completed_) fail("a wait for a phase that this thread saw end", line, seen);
        poll([this, parity] { return check(), completed_ % 2 != parity; }, line);
        seen = completed_;
    }

private:
    static constexpr int kInitialized = 0x600d;
    int initialized_ = kInitialized, completed_ = 0, seen_[256] = {};
    bool arrived_ = false;
    int64_t expected_ = 0;

    struct Bulk {
        Copy copy;
        Mbarrier *barrier;
    };
    static std::vector<Bulk> &under_way() {
        static std::vector<Bulk> all;
        return all;
    }
    // Ends the phase if it can be.
    void check() {
        if (initialized_ != kInitialized) fail("an mbarrier that was not initialized", 0, 0);
        if (!arrived_) return;
        auto &all = under_way();
        for (size_t k = 0; k < all.size();) {
            if (all[k].barrier != this) {
                ++k;
                continue;
            }
            all[k].copy.arrive();
            expected_ -= int64_t(all[k].copy.size);
            all.erase(all.begin() + int64_t(k));
        }
        if (expected_) fail("an mbarrier expects other bytes than are copied", int(expected_), 0);
        arrived_ = false;
        ++completed_;
    }
};

}  // namespace simt
