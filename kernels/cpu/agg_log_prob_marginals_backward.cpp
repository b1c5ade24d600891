// The gradients of the joint and the marginals in one pass over all pairs, deterministic and without atomics.
//
// With r_ijd = d_joint_i p_ij + d_marginal_id p_ijd, the shares of column j in the sums times what comes from above,
// and t in units of kappa (panels.h):
//     d_z_id      = -sum_j r t a / kappa^2
//     d_mu_jd     = a sum_i r t / kappa^2
//     d_logvar_jd = sum_i r (t^2 / kappa^2 - 1) / 2
// A unit of work owns a range of columns and takes all rows of a wave through it: its sums over rows are its own, its
// sums over columns [rows of the wave, D] are added up over units afterwards. Waves bound that memory, and keep sums
// over many rows accurate.

#include "gradients.h"
#include "kernels.h"
#include "marginals.h"

namespace fastvae::FASTVAE_ISA {

namespace {

// The shares of the sums that one panel adds for a tile of rows, all [D][6]: z centred, gradients, and the exponent's
// part that belongs to the row.
template <class T> struct TileRows {
    const T *z, *grad, *offset;
};

// Row r's at pointer + r * stride, [W] each
template <class T> struct TileWeights {
    const T *log_w, *keep;  // keep: 1 where the column's own log_w applies, 0 for an override
    int64_t stride;
};

// joint [6][W], one panel's planes and c -> added to d_z [D][6][lanes], columns [D][2][W], d_log_w [W]
template <bool kDirect, bool kWeighted, class T>
__attribute__((noinline)) void add_gradients(const TileRows<T> &rows, const T *joint, const TileWeights<T> &weights,
                                             const T *planes, const T *c, int64_t D, T *d_z, T *columns, T *d_log_w) {
    constexpr int V = kPanelVectors, R = kTileRows, L = kLanes<T>, W = kPanelWidth<T>;
    Vec<T> share[V] = {}, span[V] = {};  // over all dimensions, and over the last few
    const T *z = rows.z, *grad = rows.grad, *offset = rows.offset;
    for (int64_t d = 0; d < D; ++d, z += R, grad += R, offset += R, d_z += R * L) {
        Vec<T> sum_t[V] = {}, sum_t2[V] = {}, sum[V] = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec<T> to_z = load(d_z + r * L);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const Vec<T> a = load(planes + v * L);
                const Vec<T> t = finite_standardized<kDirect>(z[r], a, load(planes + W + v * L));
                Vec<T> log_p = load(c + v * L);
                if (kWeighted) log_p += load(weights.log_w + r * weights.stride + v * L);
                const Vec<T> marginal = exp2_share<T>(minus_product<T>(log_p, t, t) + offset[r]) * grad[r];
                if (kWeighted) span[v] += marginal * load(weights.keep + r * weights.stride + v * L);
                const Vec<T> both = marginal + load(joint + r * W + v * L), both_t = both * t;
                to_z += both_t * a;
                sum_t[v] += both_t;
                sum_t2[v] += both_t * t;
                sum[v] += both;
            }
            store(d_z + r * L, to_z);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            store(columns + v * L, load(columns + v * L) + sum_t[v]);
            store(columns + W + v * L, load(columns + W + v * L) + (sum_t2[v] - sum[v] * T(kKappa * kKappa)));
            if (kWeighted && (d % 16 == 15 || d + 1 == D)) share[v] += span[v], span[v] = Vec<T>{};
        }
        planes += 2 * W, c += W, columns += 2 * W;
    }
    if (kWeighted)
        for (int v = 0; v < V; ++v) store(d_log_w + v * L, load(d_log_w + v * L) + share[v]);
}

// Ranges of columns and waves of rows, by the sizes alone.
template <class T> struct Grid {
    static constexpr int64_t kUnits = 32, kMaxWave = 768, kBudget = 16 << 20;
    int64_t panels, units, wave;  // panels in a unit; rows in a wave

    Grid(int64_t S, int64_t count, int64_t D) {
        panels = count > 0 ? (count + kUnits - 1) / kUnits : 1;
        units = count > 0 ? (count + panels - 1) / panels : 1;
        const int64_t affordable = kBudget / (units * (D + 1) * int64_t(sizeof(T))) / kTileRows * kTileRows;
        wave = clamp(round_up(S, kTileRows), kTileRows, clamp(affordable, 4 * kTileRows, kMaxWave));
    }
};

template <class T> class Backward {
public:
    static constexpr int W = kPanelWidth<T>, L = kLanes<T>, R = kTileRows;
    static constexpr double kScale = kInvKappa2;
    static constexpr T kExact = T(1) / Elementary<T>::kEpsilon;  // a marginal below it is within a nat of what it was

    Backward(const MarginalColumns<T> &columns, const T *z, int64_t S, bool has_joint, bool wants_log_w, int threads)
        : columns(columns), panels(columns.panels), z(z), S(S), D(panels.D), has_joint(has_joint),
          wants_log_w(wants_log_w), threads(threads), grid(S, panels.count, D), tiles((S + R - 1) / R),
          z_rows(tiles * R * D), grads(tiles * R * D), offsets(tiles * R * D), joint_grads(tiles * R),
          joint_offsets(tiles * R), column_sums(panels.count * column_size()), parts(grid.units * grid.wave * D),
          totals(R * D * threads), wanted(D * threads), scratch(scratch_size() * threads) {}

    bool allocated() const {
        return z_rows && grads && offsets && joint_grads && joint_offsets && column_sums && parts && totals && wanted &&
               scratch;
    }

    // Gives a status, as the next two do.
    [[nodiscard]] int pack(const T *d_joint, const T *d_marginals, const T *marginals) {
        return parallel_for(tiles, threads, [&](int64_t tile, const Worker &worker) {
            bool *const any = wanted + worker.number * D;
            const TileSums<T> sums(columns, worker, scratch_of(worker), totals + worker.number * R * D);
            panels.direct ? pack_tile<true>(tile, sums, any, d_joint, d_marginals, marginals)
                          : pack_tile<false>(tile, sums, any, d_joint, d_marginals, marginals);
        });
    }

    [[nodiscard]] int run(T *d_z) {
        int status = FASTVAE_OK;
        const auto unit = panels.direct ? &Backward::template unit<true> : &Backward::template unit<false>;
        for (int64_t k = 0; k < panels.count * column_size(); ++k) column_sums[k] = T(0);
        for (int64_t first = 0; first < tiles && status == FASTVAE_OK; first += grid.wave / R) {
            const int64_t n = first + grid.wave / R < tiles ? grid.wave / R : tiles - first;
            status = parallel_for(grid.units, threads, [&](int64_t k, const Worker &worker) {
                (this->*unit)(first, n, k, worker);
            });
            if (status == FASTVAE_OK && d_z)
                status = parallel_for(n, threads, [&](int64_t k, const Worker &) { add_parts(first, k, d_z); });
        }
        return status;
    }

    [[nodiscard]] int write_columns(T *d_mu, T *d_logvar, T *d_log_w) const {
        return parallel_for(panels.count, threads, [&](int64_t p, const Worker &) {
            const T *sums = column_sums + p * column_size(), *planes = panels.planes(p);
            for (int64_t l = 0; l < W && p * W + l < panels.N; ++l) {
                const int64_t j = p * W + l;
                for (int64_t d = 0; d < D; ++d) {
                    const int64_t at = d * 2 * W + l;
                    if (d_mu) d_mu[j * D + d] = T(kScale * double(sums[at]) * double(planes[at]));
                    if (d_logvar) d_logvar[j * D + d] = T(0.5 * kScale * double(sums[at + W]));
                }
                if (d_log_w) d_log_w[j] = sums[D * 2 * W + l];
            }
        });
    }

private:
    int64_t column_size() const { return (D * 2 + 1) * W; }  // of a panel's sums: [D][2][W] and [W]
    int64_t scratch_size() const {
        const int64_t unit = grid.panels * column_size() + (D * R + L) * L + 3 * R * W + W;
        const int64_t packing = TileSums<T>::size(D);
        return round_up(unit > packing ? unit : packing, L);
    }
    T *scratch_of(const Worker &worker) { return scratch + worker.number * scratch_size(); }

    // Everything of a tile that does not depend on the column: the shares are grad 2^(log_p + offset).
    template <bool kDirect>
    void pack_tile(int64_t tile, TileSums<T> sums, bool *wanted, const T *d_joint, const T *d_marginals,
                   const T *marginals) {
        const int64_t first = tile * R, at = first * D;
        T *grad = grads + at, *offset = offsets + at;
        bool any_wanted = false;
        for (int64_t d = 0; d < D; ++d) wanted[d] = false;
        pack_rows(panels, z, first, S, z_rows + at);
        for (int r = 0; r < R; ++r)
            for (int64_t d = 0; d < D; ++d) {
                const int64_t k = d * R + r, i = (first + r) * D + d;
                const bool any = d_marginals && first + r < S && marginals[i] != -kInf<T>;
                offset[k] = any ? T(columns.normal[d] + columns.reference - double(marginals[i]) * kLog2e) : -kInf<T>;
                grad[k] = T(0);  // as is 2^offset, where 0 * 2^(log_p) may be 0 * infinity
                wanted[d] |= any;
                any_wanted |= any;
            }
        if (!any_wanted && !has_joint) return;

        const Overrides<T> overrides(columns, first, S);
        sums.template add_up<kDirect>(first, S, z_rows + at, overrides, offset, wanted);
        for (int r = 0; r < R && first + r < S; ++r) {
            const T sum = sum_lanes<T>(sums.joint[r].sum);
            joint_offsets[first + r] = -sums.joint[r].shift();
            joint_grads[first + r] = has_joint && sum != T(0) ? d_joint[first + r] / sum : T(0);
            for (int64_t d = 0; d < D; ++d) {
                if (!wanted[d]) continue;
                const int64_t k = d * R + r;
                double sum = sums.marginals[k];
                if (!(sum > 0.5 && sum < 2) || !(std::fabs(marginals[(first + r) * D + d]) < kExact)) {
                    if (sums.stopped()) return;
                    const LogSumExp<T> exact = exact_marginal<kDirect>(columns, overrides, r, d, z_rows[at + k]);
                    offset[k] = -exact.shift();
                    sum = double(sum_lanes<T>(exact.sum));
                }
                grad[k] = sum != 0 ? T(double(d_marginals[(first + r) * D + d]) / sum) : T(0);
            }
        }
        for (int r = 0; r < R; ++r)  // rows that are not there: 0 * 2^-inf, as 0 * 2^(log q) may be 0 * infinity
            if (first + r >= S) joint_grads[first + r] = T(0), joint_offsets[first + r] = -kInf<T>;
    }

    // Tiles [first, first + n) through the panels of unit k.
    template <bool kDirect> void unit(int64_t first, int64_t n, int64_t k, const Worker &worker) {
        const int64_t begin = k * grid.panels, last = begin + grid.panels;
        const int64_t end = last < panels.count ? last : panels.count;
        T *sums = scratch_of(worker), *to_z = sums + grid.panels * column_size(), *joint = to_z + (D * R + L) * L;
        T *log_w = joint + R * W, *keep = log_w + R * W, *ones = keep + R * W;
        for (int64_t i = 0; i < (end - begin) * column_size(); ++i) sums[i] = T(0);
        for (int64_t i = 0; i < R * W; ++i) joint[i] = T(0);
        for (int64_t i = 0; i < W; ++i) ones[i] = T(1);

        for (int64_t tile = first; tile < first + n && !worker.stopped(); ++tile) {
            const Overrides<T> overrides(columns, tile * R, S);
            const int64_t at = tile * R * D;
            for (int64_t i = 0; i < (D * R + L) * L; ++i) to_z[i] = T(0);
            for (int64_t p = begin; p < end; ++p) {
                T *sum = sums + (p - begin) * column_size(), *d_log_w = sum + D * 2 * W;
                if (has_joint) joint_shares<kDirect>(tile, p, joint, d_log_w);
                TileWeights<T> weights{nullptr, ones, 0};
                weights.log_w = overrides.weights_of(columns, p, log_w, weights.stride);
                if (weights.stride) {
                    for (int64_t i = 0; i < R * W; ++i) keep[i] = T(1);
                    overrides.in_panel(p, [&](int r, int lane, T) { keep[r * W + lane] = T(0); });
                    weights.keep = keep;
                } else if (wants_log_w) {
                    weights.log_w = columns.log_w + p * W;
                }
                const auto add = weights.log_w ? add_gradients<kDirect, true, T> : add_gradients<kDirect, false, T>;
                add({z_rows + at, grads + at, offsets + at}, joint, weights, panels.planes(p), columns.c + p * D * W, D,
                    to_z, sum, d_log_w);
            }
            sum_lanes_to(to_z, parts + (k * grid.wave + (tile - first) * R) * D);
        }
        for (int64_t i = 0; i < (end - begin) * column_size(); ++i) column_sums[begin * column_size() + i] += sums[i];
    }

    // d_joint_i p_ij for one panel -> joint [6][W], added to d_log_w
    template <bool kDirect>
    void joint_shares(int64_t tile, int64_t p, T *joint, T *d_log_w) const {
        alignas(64) T squares[R * W];
        square_sums<kDirect>(z_rows + tile * R * D, panels.planes(p), D, squares, W);
        const auto share = [&](int r, Vec<T> log_p) {
            return exp2_share<T>(log_p + joint_offsets[tile * R + r]) * joint_grads[tile * R + r];
        };
        T extra[2 * R];
        int at[2 * R], extras = 0;
        for (int r = 0; r < R && tile * R + r < S; ++r)
            columns.weights.take_overrides(tile * R + r, p * W, W, panels.c(), squares + r * W, [&](int64_t lane, T s) {
                at[extras] = r * W + int(lane);
                extra[extras++] = share(r, splat(s))[0];
            });
        for (int v = 0; v < W; v += L) {
            Vec<T> sum = load(d_log_w + v);
            for (int r = 0; r < R; ++r) {
                const Vec<T> s = share(r, load(panels.cw() + p * W + v) - load(squares + r * W + v));
                store(joint + r * W + v, s);
                sum += s;
            }
            store(d_log_w + v, sum);
        }
        for (int k = 0; k < extras; ++k) joint[at[k]] = extra[k];
    }

    // [D][6][lanes] -> [D][6]
    void sum_lanes_to(const T *to_z, T *part) const {
        for (int64_t k = 0; k < D * R; k += L) {
            Vec<T> v[L];
            for (int i = 0; i < L; ++i) v[i] = load(to_z + (k + i) * L);
            const Vec<T> sum = sum_lanes_of_each<T>(v);
            k + L <= D * R ? store(part + k, sum) : store_first(part + k, sum, D * R - k);
        }
    }

    void add_parts(int64_t first, int64_t k, T *d_z) const {
        for (int64_t d = 0; d < D; ++d)
            for (int r = 0; r < R && (first + k) * R + r < S; ++r) {
                double sum = 0;
                for (int64_t u = 0; u < grid.units; ++u) sum += double(parts[(u * grid.wave + k * R) * D + d * R + r]);
                d_z[((first + k) * R + r) * D + d] = T(-kScale * sum);
            }
    }

    const MarginalColumns<T> &columns;
    const Panels<T> &panels;
    const T *z;  // [S, D]
    const int64_t S, D;
    const bool has_joint, wants_log_w;
    const int threads;
    const Grid<T> grid;
    const int64_t tiles;
    Buffer<T> z_rows, grads, offsets;      // [tiles][D][6]
    Buffer<T> joint_grads, joint_offsets;  // [tiles * 6]
    Buffer<T> column_sums;                 // [panel]{[D][2][W] of r t and r (t^2 - kappa^2), [W] of d_log_w}
    Buffer<T> parts;                       // [units][wave / 6][D][6]
    Buffer<double> totals;                 // [threads][D][6]
    Buffer<bool> wanted;                   // [threads][D]
    Buffer<T> scratch;
};

}  // namespace

template <class T>
int agg_log_prob_marginals_backward(const void *d_joint, const void *d_marginals, const void *,
                                    const void *marginals, const void *z, const void *mu, const void *logvar,
                                    FASTVAE_WEIGHTS, int64_t S, int64_t N, int64_t D, void *d_z, void *d_mu,
                                    void *d_logvar, void *d_log_w, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
    if (d_joint && !d_marginals)
        return agg_log_prob_backward<T>(d_joint, z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next, S, N, D,
                                        nullptr, d_z, d_mu, d_logvar, d_log_w, 0, threads);
    const Weights<T> weights(log_w, log_w_all, own, log_w_own, log_w_next, N);
    MarginalColumns<T> columns(weights, N, D);
    Backward<T> backward(columns, static_cast<const T *>(z), S, d_joint, d_log_w, threads);
    if (!columns.allocated() || !backward.allocated()) return FASTVAE_OUT_OF_MEMORY;

    int status = columns.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), S, threads,
                              !all_moderate(static_cast<const T *>(z), S * D));
    if (status == FASTVAE_OK)
        status = backward.pack(static_cast<const T *>(d_joint), static_cast<const T *>(d_marginals),
                               static_cast<const T *>(marginals));
    if (status == FASTVAE_OK) status = backward.run(static_cast<T *>(d_z));
    if (status != FASTVAE_OK) return status;
    return backward.write_columns(static_cast<T *>(d_mu), static_cast<T *>(d_logvar), static_cast<T *>(d_log_w));
}

template decltype(agg_log_prob_marginals_backward<float>) agg_log_prob_marginals_backward<float>;
template decltype(agg_log_prob_marginals_backward<double>) agg_log_prob_marginals_backward<double>;

void add_agg_log_prob_marginals_backward(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.agg_log_prob_marginals_backward = agg_log_prob_marginals_backward<float>;
    f64.agg_log_prob_marginals_backward = agg_log_prob_marginals_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
