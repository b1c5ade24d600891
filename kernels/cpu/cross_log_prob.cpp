// The matrix log q(z_i | x_j) [S, N], and its gradients.

#include "fastvae.h"
#include "gradients.h"

namespace fastvae::FASTVAE_ISA {

template <class T>
int cross_log_prob(const void *z, const void *mu, const void *logvar, int64_t S, int64_t N, int64_t D,
                   void *out, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
    constexpr int64_t W = kPanelWidth<T>, L = kLanes<T>, kRows = 8 * kTileRows;
    const int64_t chunk = chunk_panels<T>(D), blocks = (S + kRows - 1) / kRows;
    const int64_t scratch_size = kTileRows * (round_up(D, L) + W);
    Panels<T> panels(N, D);
    Buffer<T> scratch(scratch_size * threads);
    if (!panels.allocated() || !scratch) return FASTVAE_OUT_OF_MEMORY;
    const int status = panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads);
    if (status != FASTVAE_OK) return status;

    // Units go down the rows of one chunk of columns, then of the next.
    const int64_t units = blocks * ((panels.count + chunk - 1) / chunk);
    return parallel_for(units, threads, [&](int64_t unit, const Worker &worker) {
        const int64_t first = unit % blocks * kRows, begin = unit / blocks * chunk;
        T *const rows = scratch + worker.number * scratch_size, *const squares = rows + kTileRows * round_up(D, L);
        for (int64_t i = first; i < S && i < first + kRows; i += kTileRows) {
            pack_rows(panels, static_cast<const T *>(z), i, S, rows);
            for (int64_t p = begin; p < panels.count && p < begin + chunk; ++p) {
                square_sums(panels, rows, p, 1, squares);
                const T *const c = panels.c() + p * W;
                for (int64_t r = 0; r < kTileRows && i + r < S; ++r)
                    for_each_vector<T>(N - p * W < W ? N - p * W : W, [&](int64_t k, int64_t n) {
                        store_some<T>(static_cast<T *>(out) + (i + r) * N + p * W + k,
                                      (load(c + k) - load(squares + r * W + k)) * T(kLn2), n);
                    });
            }
        }
    });
}

template <class T>
int cross_log_prob_backward(const void *grad, const void *z, const void *mu, const void *logvar, int64_t S,
                            int64_t N, int64_t D, void *d_z, void *d_mu, void *d_logvar, int threads) {
    threads = threads_for_pairs(S, N, D, threads);
    constexpr int64_t W = kPanelWidth<T>;
    const T *const samples = static_cast<const T *>(z);
    Panels<T> panels(N, D);
    Gradients<T> gradients(panels, samples, S, d_z, d_mu || d_logvar, threads);
    if (!panels.allocated() || !gradients.allocated()) return FASTVAE_OUT_OF_MEMORY;
    int status =
        panels.pack(static_cast<const T *>(mu), static_cast<const T *>(logvar), threads, !all_moderate(samples, S * D));
    if (status != FASTVAE_OK) return status;

    const auto weigh = [&](const Block &tile, const T *, T *r, T *shares) {
        const int64_t columns = tile.count * W, first = tile.panel * W;
        const int64_t inside = N - first < columns ? N - first : columns;
        clear(r, kTileRows * columns);
        for (int64_t i = 0; i < tile.rows; ++i)
            for_each_vector<T>(inside, [&](int64_t k, int64_t n) {
                const Vec<T> g = load_some(static_cast<const T *>(grad) + (tile.first + i) * N + first + k, n);
                T *const share = shares + k / W * 2 * W + k % W;
                store(r + i * columns + k, g);
                store(share, load(share) + g);
            });
        return int64_t(0);
    };
    status = gradients.run(weigh);
    if (status != FASTVAE_OK) return status;
    return gradients.write(static_cast<T *>(d_z), static_cast<T *>(d_mu), static_cast<T *>(d_logvar), nullptr);
}

void add_cross_log_prob(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.cross_log_prob = cross_log_prob<float>, f64.cross_log_prob = cross_log_prob<double>;
    f32.cross_log_prob_backward = cross_log_prob_backward<float>, f64.cross_log_prob_backward = cross_log_prob_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
