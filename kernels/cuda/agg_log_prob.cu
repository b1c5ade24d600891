// joint_i = log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

#include "pull.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// Whether to look for tiles that can stop early: in fewer columns, or a single chunk of dimensions, there is nothing to
// be saved.
bool looks_early(bool exact_skip, int64_t N, int64_t D) { return exact_skip && N >= 1024 && D > kChunk; }

template <class In> struct JointForward {
    using T = Accumulator<In>;
    Packed<T> packed;
    Joint<T> joint;
    JointForward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights, bool exact_skip = true)
        : packed(arena, S, N, D, false, weights, looks_early(exact_skip, N, D), false), joint(arena, packed, false) {}
};

template <class In> struct JointBackward {
    using T = Accumulator<In>;
    Packed<T> packed;
    Joint<T> joint;
    Pull<In> pull;
    JointBackward(Arena &arena, int64_t S, int64_t N, int64_t D, const Weights<T> &weights, bool exact_skip = true)
        : packed(arena, S, N, D, false, weights, looks_early(exact_skip, N, D), true), joint(arena, packed, true), pull(arena, packed, true) {}
};

}  // namespace

}  // namespace fastvae::FASTVAE_ISA

using namespace fastvae::FASTVAE_ISA;

int64_t fastvae_cuda_agg_log_prob_workspace(int dtype, int64_t S, int64_t N, int64_t D, int backward) {
    return backward ? workspace_of<JointBackward>(dtype, S, N, D) : workspace_of<JointForward>(dtype, S, N, D);
}

int fastvae_cuda_agg_log_prob(int dtype, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D,
                              void *joint, int exact_skip, void *workspace, int64_t workspace_size,
                              void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const JointForward<In> forward(arena, S, N, D, {log_w, log_w_all, own, log_w_own, log_w_next, N},
            exact_skip);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const Inputs<In> inputs(z, z_stride, mu, mu_stride, logvar, logvar_stride);
        FASTVAE_TRY(pack(inputs, forward.packed, stream));
        return forward.joint.run(forward.packed, static_cast<T *>(joint), static_cast<const T *>(nullptr), stream);
    });
}

int fastvae_cuda_agg_log_prob_backward(int dtype, const void *d_joint, FASTVAE_CUDA_PAIRS, FASTVAE_WEIGHTS, int64_t S,
                                       int64_t N, int64_t D, void *joint, void *d_z, void *d_mu, void *d_logvar,
                                       void *d_log_w, int exact_skip, void *workspace, int64_t workspace_size,
                                       void *stream_) {
    return with_dtype(dtype, [&](auto in) -> int {
        using In = decltype(in);
        using T = Accumulator<In>;
        const Stream stream = static_cast<Stream>(stream_);
        Arena arena(workspace);
        const JointBackward<In> backward(arena, S, N, D, {log_w, log_w_all, own, log_w_own, log_w_next, N},
            exact_skip);
        if (arena.used() > workspace_size) return FASTVAE_CUDA_WORKSPACE_TOO_SMALL;
        const Inputs<In> inputs(z, z_stride, mu, mu_stride, logvar, logvar_stride);
        const Gradients<In> out{static_cast<In *>(d_z), static_cast<In *>(d_mu), static_cast<In *>(d_logvar),
                                static_cast<T *>(d_log_w)};
        const auto &[packed, sums, pull] = backward;
        FASTVAE_TRY(pack(inputs, packed, stream));
        FASTVAE_TRY(sums.run(packed, static_cast<T *>(joint), static_cast<const T *>(d_joint), stream));
        // A column's pull on its own log_w leaves out the pairs that have another, so that the others have to be seen.
        const bool all_columns = d_log_w && packed.weights.any_overrides();
        FASTVAE_TRY(packed.early ? pull.run(packed, OfShares<T, true>{sums.shares, all_columns}, out, stream)
                                 : pull.run(packed, OfShares<T, false>{sums.shares}, out, stream));
        return pull.finish(packed, out, stream);
    });
}
