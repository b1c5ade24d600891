// Launching kernels, and dividing up what the caller gives as workspace.
#pragma once

#include <set>
#include <utility>

#include "numbers.h"

#define FASTVAE_TRY(call)                              \
    do {                                               \
        if (const int status_ = (call)) return status_; \
    } while (0)

namespace fastvae::FASTVAE_ISA {

#ifdef FASTVAE_HOST_SIMT
using Stream = void *;
#else
using Stream = cudaStream_t;

// CUDA loads a kernel at its first launch, which may be refused while a stream is being captured. So a thread's first
// launch of a kernel on a device asks for it, and is made, in the mode in which this is allowed.
class Loading {
public:
    explicit Loading(const void *kernel) {
        thread_local std::set<std::pair<int, const void *>> loaded;
        int device = 0;
        ok_ = cudaGetDevice(&device) == cudaSuccess;
        if (!ok_ || loaded.count({device, kernel})) return;
        first_ = ok_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess;
        cudaFuncAttributes attributes;
        ok_ = ok_ && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
        if (ok_) loaded.insert({device, kernel});
    }
    ~Loading() {
        if (first_) cudaThreadExchangeStreamCaptureMode(&mode_);
    }
    Loading(const Loading &) = delete;
    bool ok() const { return ok_; }  // or cudaGetLastError() says why not

private:
    bool ok_, first_ = false;
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // and then the thread's own
};
#endif

// The largest grid of a GPU, in x and in y
constexpr int64_t kMostBlocks = 0x7fffffff, kMostLayers = 0xffff;
constexpr int kGridTooLarge = FASTVAE_CUDA_ERROR + 9;  // cudaErrorInvalidConfiguration, as a GPU says too

// kernel<<<grid, threads, 0, stream>>>(arguments...), or nothing where the grid is empty; a status
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t layers, int threads, [[maybe_unused]] Stream stream,
           const Arguments &...arguments) {
    if (blocks <= 0 || layers <= 0) return FASTVAE_CUDA_OK;
    if (blocks > kMostBlocks || layers > kMostLayers) return kGridTooLarge;
#ifdef FASTVAE_HOST_SIMT
    simt::launch(kernel, dim3(unsigned(blocks), unsigned(layers)), threads, Parameters(arguments)...);
    return FASTVAE_CUDA_OK;
#else
    const Loading loading(reinterpret_cast<const void *>(kernel));
    if (loading.ok())
        kernel<<<dim3(unsigned(blocks), unsigned(layers)), threads, 0, stream>>>(Parameters(arguments)...);
    const cudaError_t error = cudaGetLastError();  // which forgets it
    return error == cudaSuccess ? FASTVAE_CUDA_OK : FASTVAE_CUDA_ERROR + int(error);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of the workspace; of none at all, it only counts.
class Arena {
public:
    explicit Arena(void *base) : base_(static_cast<char *>(base)) {}
    template <class T> T *take(int64_t n) {
        T *const piece = base_ ? reinterpret_cast<T *>(base_ + used_) : nullptr;
        used_ = ceil_div(used_ + n * int64_t(sizeof(T)), 256) * 256;
        return piece;
    }
    int64_t used() const { return used_; }

private:
    char *base_;
    int64_t used_ = 0;
};

// The bytes of workspace that take(arena, one) takes, where `one` is of the type that the dtype stands for.
template <class Take> int64_t bytes_taken(int dtype, const Take &take) {
    Arena counting(nullptr);
    with_dtype(dtype, [&](auto one) {
        take(counting, one);
        return 0;
    });
    return counting.used();
}

// Enough blocks to fill an H200 twice. The same on every GPU, and so are the bits of a sum over blocks.
constexpr int64_t kFull = 264;

// `items` divided into parts of equal size but for the last, about `wanted` of them.
struct Parts {
    int64_t size, count;
    Parts(int64_t items, int64_t wanted) {
        wanted = wanted < 1 ? 1 : wanted > items ? (items < 1 ? 1 : items) : wanted;
        size = ceil_div(items, wanted);
        size = size < 1 ? 1 : size;
        count = ceil_div(items, size);
        count = count < 1 ? 1 : count;
    }
};

}  // namespace fastvae::FASTVAE_ISA
