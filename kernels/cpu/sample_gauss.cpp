// Reparameterized samples and their densities in one pass, and the gradients at the same eps.
//
// Both walk over contiguous chunks of a sample that fit in L1 with their eps: some whole rows, or a piece of one.

#include "buffer.h"
#include "fastvae.h"
#include "parallel.h"
#include "philox.h"

namespace fastvae::FASTVAE_ISA {

namespace {

constexpr int64_t kChunk = 1024;  // elements of eps at a time
constexpr int64_t kUnit = 8192;   // elements of a unit of work, about
constexpr double kLog2Pi = 1.83787706640934548356;

// Rows of D elements in a block of about `size` elements.
int64_t rows_in(int64_t size, int64_t D) { return D < size ? size / (D < 1 ? 1 : D) : 1; }

// Calls f(b, d, rows, n) for the chunks of rows [begin, end): rows x n elements from (b, d). Where
// rows > 1, n == D, so that a chunk is contiguous in a dense tensor.
template <class F> FASTVAE_INLINE void for_each_chunk(int64_t begin, int64_t end, int64_t D, const F &f) {
    const int64_t step = rows_in(kChunk, D);
    for (int64_t b = begin; b < end; b += step)
        for (int64_t d = 0; d < D || d == 0; d += kChunk)
            f(b, d, b + step < end ? step : end - b, d + kChunk < D ? kChunk : D - d);
}

}  // namespace

template <class T>
int sample_gauss(const void *mu_, int64_t mu_stride, const void *logvar_, int64_t logvar_stride,
                 const uint64_t *seed_, int64_t L, int64_t B, int64_t D, int reduction, double kl_scale, void *z_,
                 void *log_q_, void *log_p_, void *kl_, void *noise_, int threads) {
    const T *mu = static_cast<const T *>(mu_), *logvar = static_cast<const T *>(logvar_);    // [B, D]
    T *z = static_cast<T *>(z_), *noise = static_cast<T *>(noise_);                          // [L, B, D]
    T *log_q = static_cast<T *>(log_q_), *log_p = static_cast<T *>(log_p_), *kl = static_cast<T *>(kl_);
    const uint64_t seed = *seed_;
    if (L == 0) L = 1, z = log_q = log_p = noise = nullptr;  // the KL is still asked for
    const bool sums = log_q || log_p || kl, total = kl && reduction == FASTVAE_SUM;
    const bool flat = !log_q && !log_p && (!kl || total) && mu_stride == D && logvar_stride == D;
    const int64_t unit_rows = rows_in(kUnit, D), blocks = (B + unit_rows - 1) / unit_rows;
    Buffer<double> totals(total ? blocks : 0);  // of the KL, by block
    if (!totals) return FASTVAE_OUT_OF_MEMORY;

    const int status = parallel_for(L * blocks, threads, [=, &totals](int64_t unit, const Worker &) {
        const int64_t l = unit / blocks, begin = unit % blocks * unit_rows;
        const int64_t end = begin + unit_rows < B ? begin + unit_rows : B;
        double q = 0, p = 0, k = 0, k_block = 0;  // sums over the row so far, and of the KL over the block
        for_each_chunk(begin, end, D, [&](int64_t b, int64_t d, int64_t rows, int64_t n) {
            alignas(64) T buffer[kChunk + kNormalsSlack];
            int64_t e = (l * B + b) * D + d;
            const T *eps = fill_normals(uint64_t(e), rows * n, seed, buffer);
            if (flat) n *= rows, rows = 1;
            for (int64_t r = 0; r < rows; ++r, e += n, eps += n) {
                const T *mu_row = mu + (b + r) * mu_stride + d, *logvar_row = logvar + (b + r) * logvar_stride + d;
                Vec<T> vq{}, vp{}, vk{};
                for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                    const Vec<T> vmu = load_some(mu_row + i, m), vlogvar = load_some(logvar_row + i, m);
                    const Vec<T> veps = load_some(eps + i, m);
                    const Vec<T> vz = vmu + times<T>(veps, exp_<T>(T(0.5) * vlogvar));
                    if (z) store_some(z + e + i, vz, m);
                    if (noise) store_some(noise + e + i, veps, m);
                    if (!sums) return;
                    vq += vlogvar + veps * veps;
                    vp += vz * vz;
                    if (kl && l == 0) vk += vmu * vmu + Exponential<T>(vlogvar).minus_1_minus_x(T(0.5) * vlogvar);
                });
                if (!sums) continue;
                if (total) k_block += 0.5 * sum_lanes<T>(vk);
                if (flat) continue;
                if (d == 0) q = p = k = 0;
                q += sum_lanes<T>(vq), p += sum_lanes<T>(vp), k += sum_lanes<T>(vk);
                if (d + n < D) continue;
                const int64_t row = l * B + b + r;
                if (log_q) log_q[row] = T(-0.5 * (double(D) * kLog2Pi + q));
                if (log_p) log_p[row] = T(-0.5 * (double(D) * kLog2Pi + p));
                if (kl && !total && l == 0) kl[row] = T(kl_scale * (0.5 * k));
            }
        });
        if (total && l == 0) totals[unit] = k_block;
    });
    if (status == FASTVAE_OK && total) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += totals[block];
        *kl = T(kl_scale * sum);
    }
    return status;
}

template <class T>
int sample_gauss_backward(const void *d_z_, const void *d_log_q_, const void *d_log_p_, const void *d_kl_,
                          int64_t kl_row, double kl_scale, const void *mu_, int64_t mu_stride, const void *logvar_,
                          int64_t logvar_stride, const uint64_t *seed_, const void *noise_, int64_t L, int64_t B,
                          int64_t D, void *d_mu_, void *d_logvar_, int threads) {
    const T *mu = static_cast<const T *>(mu_), *logvar = static_cast<const T *>(logvar_);  // [B, D]
    const T *d_z = static_cast<const T *>(d_z_), *noise = static_cast<const T *>(noise_);  // [L, B, D]
    const T *d_log_q = static_cast<const T *>(d_log_q_), *d_log_p = static_cast<const T *>(d_log_p_);  // [L, B]
    const T *d_kl = static_cast<const T *>(d_kl_);                                         // [B] or [1]
    T *d_mu = static_cast<T *>(d_mu_), *d_logvar = static_cast<T *>(d_logvar_);            // [B, D]
    const uint64_t seed = seed_ ? *seed_ : 0;
    const bool flat = !d_log_q && !d_log_p && (!d_kl || !kl_row) && mu_stride == D && logvar_stride == D;
    const bool from_eps = L > 0 && (d_z || d_log_p), from_rest = d_log_q || d_kl || !from_eps;
    const int64_t unit_rows = rows_in(kUnit, D), blocks = (B + unit_rows - 1) / unit_rows;

    return parallel_for(blocks, threads, [=](int64_t unit, const Worker &worker) {
        const int64_t begin = unit * unit_rows, end = begin + unit_rows < B ? begin + unit_rows : B;
        for_each_chunk(begin, end, D, [&](int64_t b, int64_t d, int64_t rows, int64_t n) {
            const int64_t size = rows * n, e = b * D + d;
            if (flat) n *= rows, rows = 1;

            // Samples first, summed before sigma multiplies: it may overflow, and their signs differ.
            for (int64_t l = 0; l < L && from_eps; ++l) {
                if (l % 64 == 63 && worker.stopped()) return;
                const bool add = l > 0, last = l == L - 1;
                alignas(64) T buffer[kChunk + kNormalsSlack];
                const int64_t first = l * B * D + e;
                const T *eps = noise ? noise + first : fill_normals(uint64_t(first), size, seed, buffer);
                for (int64_t r = 0; r < rows; ++r, eps += n) {
                    const T *mu_row = mu + (b + r) * mu_stride + d;
                    const T *logvar_row = logvar + (b + r) * logvar_stride + d;
                    const T g_p = d_log_p ? d_log_p[l * B + b + r] : T(0);
                    const int64_t out = e + r * n;
                    for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                        const Vec<T> veps = load_some(eps + i, m);
                        Vec<T> sigma{}, dz = d_z ? load_some(d_z + l * B * D + out + i, m) : Vec<T>{};
                        if (d_log_p || last) sigma = exp_<T>(T(0.5) * load_some(logvar_row + i, m));
                        if (d_log_p) dz -= times<T>(splat(g_p), load_some(mu_row + i, m) + times<T>(veps, sigma));
                        Vec<T> vd_logvar = dz * veps;
                        if (add && d_logvar) vd_logvar += load_some(d_logvar + out + i, m);
                        if (add && d_mu) dz += load_some(d_mu + out + i, m);
                        if (last) vd_logvar = times<T>(T(0.5) * vd_logvar, sigma);
                        if (d_mu) store_some(d_mu + out + i, dz, m);
                        if (d_logvar) store_some(d_logvar + out + i, vd_logvar, m);
                    });
                }
            }
            for (int64_t r = 0; r < rows && from_rest; ++r) {
                const T *mu_row = mu + (b + r) * mu_stride + d, *logvar_row = logvar + (b + r) * logvar_stride + d;
                const T g_kl = d_kl ? T(kl_scale) * d_kl[(b + r) * kl_row] : T(0);
                const int64_t out = e + r * n;
                double g_q = 0;
                if (d_log_q)
                    for (int64_t l = 0; l < L; ++l) g_q += d_log_q[l * B + b + r];
                for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                    Vec<T> vd_mu{}, vd_logvar = splat(T(-0.5 * g_q));
                    if (d_kl) {
                        vd_mu = times<T>(splat(g_kl), load_some(mu_row + i, m));
                        const Exponential<T> exponential(load_some(logvar_row + i, m));
                        vd_logvar += times<T>(splat(T(0.5) * g_kl), exponential.minus_1());
                    }
                    if (from_eps && d_mu) vd_mu += load_some(d_mu + out + i, m);
                    if (from_eps && d_logvar) vd_logvar += load_some(d_logvar + out + i, m);
                    if (d_mu) store_some(d_mu + out + i, vd_mu, m);
                    if (d_logvar) store_some(d_logvar + out + i, vd_logvar, m);
                });
            }
        });
    });
}

void add_sample_gauss(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.sample_gauss = sample_gauss<float>, f64.sample_gauss = sample_gauss<double>;
    f32.sample_gauss_backward = sample_gauss_backward<float>, f64.sample_gauss_backward = sample_gauss_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
