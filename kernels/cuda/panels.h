// The samples and the columns (posteriors) of the cross-evaluated kernels, packed once per call. kPanel samples or
// columns make a panel, [D][planes][kPanel], so that a chunk of dimensions is one piece of memory. A sample has one
// plane, z - centre. A column has two,
//     a = kappa exp(-logvar / 2),   b = -(mu - centre) a,
// so that t = (z - centre) a + b is one FMA, and the Gaussian's quadratic form in bits is a multiple of sum_d t^2:
//     log2 q(z_i | x_j) = c_j - log2(e) / (2 kappa^2) sum_d t_ijd^2.
// In float32, where a is rounded once from float64, kappa = sqrt(log2(e) / 2) and the multiple is 1. In float64, which
// nothing wider is at hand to round from, kappa is 1.
//
// b costs |b| eps / 2 of t, no more than a half-ulp change of the centred mu would. A panel of columns where some |b|
// passes kMaxOffset, or a number is extreme or not finite, is `far`: b is -(mu - centre), and t = (z - centre + b) a
// takes three operations and rounds as the broadcast formula does. A panel of samples is far where one is extreme or
// not finite; that matters to gradients, where 0 t must be 0.
#pragma once

#include "launch.h"
#include "weights.h"

namespace fastvae::FASTVAE_ISA {

constexpr int kThreads = 256, kLanes = 16;  // of a block; its threads are kLanes x kLanes
template <class T> constexpr int kSide = sizeof(T) == 4 ? 8 : 4;      // a thread has kSide x kSide pairs
template <class T> constexpr int kPanel = kLanes * kSide<T>;

constexpr int kChunk = 8;  // at most so many dimensions go through shared memory at a time

constexpr double kMaxOffset = 128, kModerate = 0x1p30;  // a, and z - centre within half of it: t^2 cannot overflow
template <class T> constexpr double kKappa = sizeof(T) == 4 ? 0.84932180028801904272 : 1;  // sqrt(log2(e) / 2)
template <class T> constexpr T kInvKappa2 = T(sizeof(T) == 4 ? 1.38629436111989061883 : 1);  // 2 ln 2

// The arrays that say which tiles can stop early (early_exit.h); all null where none may.
template <class T> struct Exit {
    T *spread;                       // [D] how much a dimension tells columns apart
    int *order;                      // [D] the dimensions as they are packed
    T *reach, *steep, *least_a;      // [column panels]: largest cw + margin, largest cw + log2 a, least a
    T *likely;                       // [S] terms that the rows' sums are known to have
    T *row_floor, *column_floor, *share;  // [S], of a backward
    T *row_reach, *column_reach;     // [column panels], of a backward

    Exit(Arena &arena, bool early, bool backward, int64_t S, int64_t D, int64_t panels) {
        const auto take = [&](bool wanted, int64_t n) { return wanted ? arena.take<T>(n) : nullptr; };
        spread = take(early, D);
        order = early ? arena.take<int>(D) : nullptr;
        reach = take(early, panels), steep = take(early, panels), least_a = take(early, panels);
        likely = take(early, S);
        row_floor = take(early && backward, S), column_floor = take(early && backward, S);
        share = take(early && backward, S);
        row_reach = take(early && backward, panels), column_reach = take(early && backward, panels);
    }
};

template <class T> struct Packed {
    int64_t S, N, D, row_panels, column_panels;
    int chunks, dims;          // chunks of dimensions, and how many the first ones have
    bool early;                // whether tiles may stop early
    T *centre;                 // [D], of the columns
    T *samples;                // [row panels][D][kPanel]
    T *columns;                // [column panels][D][2][kPanel]
    int *far_rows, *far_columns;  // [panels]
    int *any_far_row;          // [1], whether one of far_rows is
    T *c, *cw;                 // [N up to panels]: log2 normalizer, and with log2 w; cw is -inf where there is no column
    T *marginal_c, *marginal_cw;  // [column panels][D][kPanel], the same of each dimension alone; or null
    T *marginal_base;          // [D], what the marginals' terms are relative to; or null
    bool *marginal_known;      // [D], whether terms are moderate then; or null
    int64_t *own_low, *own_high;  // [row panels]: the range of the own columns of a panel's samples
    Weights<T> weights;
    Exit<T> exit;

    Packed(Arena &arena, int64_t S, int64_t N, int64_t D, bool marginals, const Weights<T> &weights, bool early = false,
           bool backward = false)
        : S(S), N(N), D(D), row_panels(ceil_div(S, kPanel<T>)), column_panels(ceil_div(N, kPanel<T>)),
          chunks(D > kChunk ? int(ceil_div(D, kChunk)) : 1), dims(int(ceil_div(D, chunks))), early(early),
          weights(weights), exit(arena, early, backward, S, D, column_panels) {
        constexpr int W = kPanel<T>;
        centre = arena.take<T>(D);
        samples = arena.take<T>(row_panels * D * W);
        columns = arena.take<T>(column_panels * D * 2 * W);
        far_rows = arena.take<int>(row_panels);
        far_columns = arena.take<int>(column_panels);
        any_far_row = arena.take<int>(1);
        c = arena.take<T>(column_panels * W);
        cw = arena.take<T>(column_panels * W);
        marginal_c = marginals ? arena.take<T>(column_panels * D * W) : nullptr;
        marginal_cw = marginals ? arena.take<T>(column_panels * D * W) : nullptr;
        marginal_base = marginals ? arena.take<T>(D) : nullptr;
        marginal_known = marginals ? arena.take<bool>(D) : nullptr;
        own_low = arena.take<int64_t>(row_panels);
        own_high = arena.take<int64_t>(row_panels);
    }
    // The caller's dimension that is packed as number d
    FASTVAE_DEVICE int64_t dimension(int64_t d) const { return early ? exit.order[d] : d; }
};

template <class In> struct Rows {  // [n][D], a stride apart
    const In *data;
    int64_t stride;
    FASTVAE_DEVICE const In *operator()(int64_t i) const { return data + i * stride; }
};
template <class In> struct Inputs {
    Rows<In> z, mu, logvar;
    explicit Inputs(FASTVAE_CUDA_PAIRS)
        : z{static_cast<const In *>(z), z_stride}, mu{static_cast<const In *>(mu), mu_stride},
          logvar{static_cast<const In *>(logvar), logvar_stride} {}
};

template <class T> Weights<T> unweighted(int64_t N) { return {nullptr, 0.0, nullptr, 0.0, 0.0, N}; }

// The bytes of workspace that an op's Buffers<In> take for a problem.
template <template <class> class Buffers> int64_t workspace_of(int dtype, int64_t S, int64_t N, int64_t D) {
    return bytes_taken(dtype, [&](Arena &arena, auto in) {
        using In = decltype(in);
        const Buffers<In> buffers(arena, S, N, D, unweighted<Accumulator<In>>(N));
    });
}

}  // namespace fastvae::FASTVAE_ISA
