// Memory that a kernel needs while it runs: aligned to cache lines, freed with its owner, null when there is none.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace fastvae::FASTVAE_ISA {

template <class T> class Buffer {
public:
    explicit Buffer(int64_t size) : data_(nullptr) {
        constexpr uint64_t kLine = 64;
        const uint64_t items = size > 0 ? uint64_t(size) : 1;
        if (items < (uint64_t(1) << 48) / sizeof(T))
            data_ = static_cast<T *>(std::aligned_alloc(kLine, (items * sizeof(T) + kLine - 1) / kLine * kLine));
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    operator T *() const { return data_; }

private:
    T *data_;
};

}  // namespace fastvae::FASTVAE_ISA
