// The functions of the C interface that belong to no single op.

#include "launch.h"

using namespace fastvae::FASTVAE_ISA;

int fastvae_cuda_interface(void) { return FASTVAE_INTERFACE; }

const char *fastvae_cuda_status_string(int status) {
    if (status == FASTVAE_CUDA_BAD_DTYPE) return "no such dtype";
    if (status == FASTVAE_CUDA_WORKSPACE_TOO_SMALL) return "the workspace is too small";
    if (status == kGridTooLarge) return "so many numbers take more blocks than a GPU launches at once";
#ifndef FASTVAE_HOST_SIMT
    if (status >= FASTVAE_CUDA_ERROR) return cudaGetErrorString(cudaError_t(status - FASTVAE_CUDA_ERROR));
#endif
    return status == FASTVAE_CUDA_OK ? "no error" : "unknown error";
}

const char *fastvae_cuda_version(void) { return FASTVAE_VERSION; }

int fastvae_cuda_simulated(void) {
#ifdef FASTVAE_HOST_SIMT
    return 1;
#else
    return 0;
#endif
}
