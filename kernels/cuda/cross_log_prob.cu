// The matrix log q(z_i | x_j) [S, N], and its gradients.

#include "pull.h"

namespace fastvae::FASTVAE_ISA {

namespace {

template <class In> struct CrossForward {
    using T = Accumulator<In>;
    Packed<T> packed;
    CrossForward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights)
        : packed(arena, S, N, D, false, weights) {}
};

template <class In> struct CrossBackward {
    using T = Accumulator<In>;
    Packed<T> packed;
    Pull<In> pull;
    CrossBackward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights)
        : packed(arena, S, N, D, false, weights), pull(arena, packed, true) {}
};

// A block for each tile
template <class T, bool kFold>
__global__ __launch_bounds__(kThreads, kBlocks<T, kFold>) void densities(Packed<T> p, T *out) {
    constexpr int R = kSide<T>, W = kPanel<T>;
    const int64_t row_panel = blockIdx.x % p.row_panels, column_panel = blockIdx.x / p.row_panels;
    const Lanes<true> lanes;
    Pairs<T> squares;
    Sweep<T, true> sweep(p);
    sweep.start(row_panel, column_panel, column_panel + 1);
    square_sums<kFold>(sweep, p.far_columns[column_panel], lanes, squares);
    T c[R];
    load_side(p.c + column_panel * W, lanes.column, c);
    FASTVAE_UNROLL
    for (int r = 0; r < R; ++r) {
        const int64_t i = row_panel * W + place<T>(lanes.row, r);
        FASTVAE_UNROLL
        for (int k = 0; k < R; ++k) {
            const int64_t j = column_panel * W + place<T>(lanes.column, k);
            if (i < p.S && j < p.N) out[i * p.N + j] = minus_squares(c[k], squares[r][k]) * T(kLn2);
        }
    }
}

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_cross_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward) {
    return backward ? workspace_of<CrossBackward>(dtype, S, N, D) : workspace_of<CrossForward>(dtype, S, N, D);
}

int fastvae_cuda_cross_log_prob(int dtype, FASTVAE_CUDA_PAIRS, int64_t S, int64_t N, int64_t D, void *out,
                                void *workspace, int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const Packed<T> packed = CrossForward<In>(arena, S, N, D, unweighted<T>(N)).packed;
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        FASTVAE_TRY(pack(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), packed, stream));
        return launch(folds(D) ? densities<T, true> : densities<T, false>, packed.row_panels * packed.column_panels, 1,
                      kThreads, stream, packed, static_cast<T *>(out));
    });
}

int fastvae_cuda_cross_log_prob_backward(int dtype, const void *grad, FASTVAE_CUDA_PAIRS, int64_t S, int64_t N,
                                         int64_t D, void *d_z, void *d_mu, void *d_logvar, void *workspace,
                                         int64_t workspace_size, void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const CrossBackward<In> backward(arena, S, N, D, unweighted<T>(N));
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const auto &[packed, pull] = backward;
        const Gradients<In> out{static_cast<In *>(d_z), static_cast<In *>(d_mu), static_cast<In *>(d_logvar), nullptr};
        FASTVAE_TRY(pack(Inputs<In>(z, z_stride, mu, mu_stride, logvar, logvar_stride), packed, stream));
        FASTVAE_TRY(pull.run(packed, OfMatrix<T>{static_cast<const T *>(grad)}, out, stream));
        return pull.finish(packed, out, stream);
    });
}
