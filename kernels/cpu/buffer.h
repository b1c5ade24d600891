// Memory that a kernel needs while it runs: aligned to cache lines, freed with its owner, null when there is none.
#pragma once

#include <new>

#include "simd.h"

namespace fastvae::FASTVAE_ISA {

template <class T> class Buffer {
public:
    explicit Buffer(int64_t size) : data_(nullptr) {
        const uint64_t items = size > 0 ? uint64_t(size) : 1;
        if (items < SIZE_MAX / 2 / sizeof(T))
            data_ = static_cast<T *>(::operator new(size_t(items) * sizeof(T), kLine, std::nothrow));
    }
    ~Buffer() { ::operator delete(data_, kLine); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    operator T *() const { return data_; }

private:
    static constexpr std::align_val_t kLine{64};

    T *data_;
};

}  // namespace fastvae::FASTVAE_ISA
