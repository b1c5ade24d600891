// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) and its gradients, each in one pass.
//
// With x = logvar - prior_logvar and u = (mu - prior_mu) e^(-prior_logvar / 2): KL = ((e^x - 1 - x) + u^2) / 2.
// Sums run in T over at most kSpan terms, then in double in a fixed order.

#include <cstdlib>

#include "elementary.h"
#include "fastvae.h"
#include "parallel.h"

namespace fastvae::FASTVAE_ISA {

namespace {

constexpr int64_t kSpan = 512;       // elements of a row, and 64 rows of a column, are summed in T
constexpr int64_t kSpanRows = 64;
constexpr int64_t kUnit = 16384;     // elements of a unit of work, at least
constexpr int64_t kMaxBlocks = 256;  // blocks of rows, at most

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t blocks_of(int64_t size, int64_t n) { return (n + size - 1) / size; }

template <class T> struct Inputs {  // [B, D] each; a prior that is NULL is 0
    const T *mu, *logvar, *prior_mu, *prior_logvar;
    int64_t mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride;

    Inputs at(int64_t b, int64_t d) const {
        Inputs row = *this;
        row.mu += b * mu_stride + d;
        row.logvar += b * logvar_stride + d;
        if (prior_mu) row.prior_mu += b * prior_mu_stride + d;
        if (prior_logvar) row.prior_logvar += b * prior_logvar_stride + d;
        return row;
    }
    bool dense(int64_t B, int64_t D) const {
        return B == 1 || (mu_stride == D && logvar_stride == D && (!prior_mu || prior_mu_stride == D) &&
                          (!prior_logvar || prior_logvar_stride == D));
    }
};

// How [B, D] is walked. Where every tensor is dense and no axis is told apart, it is rows of kSpan elements
// whatever D, so that a small D wastes no lanes. A unit is a block of rows, and of columns in sums over rows.
struct Tiling {
    int64_t rows, columns, size, block_rows, block_columns, row_blocks, column_blocks;

    Tiling(int64_t B, int64_t D, bool flat, bool over_rows)
        : rows(flat ? blocks_of(kSpan, B * D) : B), columns(flat ? kSpan : D), size(B * D) {
        block_columns = over_rows ? least(kSpan, columns) : columns;
        block_rows = most(kUnit / most(1, block_columns), over_rows ? kSpanRows : 1);
        block_rows = most(block_rows, blocks_of(kMaxBlocks, rows));
        row_blocks = most(1, blocks_of(block_rows, rows));
        column_blocks = most(1, blocks_of(most(1, block_columns), columns));
    }
    // f(b, d, n) for the rows [b] of a unit: elements [d, d + n)
    template <class F> FASTVAE_INLINE void for_each_row(int64_t unit, const F &f) const {
        const int64_t begin = unit / column_blocks * block_rows, end = least(begin + block_rows, rows);
        const int64_t d = unit % column_blocks * block_columns;
        for (int64_t b = begin; b < end; ++b) f(b, d, least(least(block_columns, columns - d), size - b * columns));
    }
};

template <class T> FASTVAE_INLINE Vec<T> finite(Vec<T> x) {
    constexpr T kMax = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
    return min_<T>(splat(kMax), max_<T>(splat(-kMax), x));
}

// The halves keep differences of finite numbers finite, and a gradient that comes in meets what may be large factor by
// factor, so that what overflows is the product alone.
template <class T, bool kPrior> struct Terms {
    Vec<T> half_x, half_difference, half_u, inverse_sigma;

    FASTVAE_INLINE Terms(const Inputs<T> &row, int64_t i, int64_t n) {
        half_x = T(0.5) * load_some(row.logvar + i, n);
        half_u = T(0.5) * load_some(row.mu + i, n);
        inverse_sigma = splat(T(1));
        if (kPrior && row.prior_mu) half_u -= T(0.5) * load_some(row.prior_mu + i, n);
        half_difference = half_u;
        if (kPrior && row.prior_logvar) {
            const Vec<T> half_prior = T(0.5) * load_some(row.prior_logvar + i, n);
            half_x -= half_prior;
            inverse_sigma = finite<T>(exp_<T>(-half_prior));
            half_u *= inverse_sigma;
        }
    }
    FASTVAE_INLINE Vec<T> kl() const {
        return T(0.5) * e_x().minus_1_minus_x(half_x) + T(2) * half_u * half_u;
    }
    FASTVAE_INLINE Vec<T> d_mu(Vec<T> g) const {
        if (!kPrior) return times<T>(g, T(2) * half_difference);
        return times<T>(half_difference, T(2) * (g * inverse_sigma) * inverse_sigma);
    }
    FASTVAE_INLINE Vec<T> d_logvar(Vec<T> g) const { return times<T>(g, T(0.5) * e_x().minus_1()); }
    FASTVAE_INLINE Exponential<T> e_x() const { return Exponential<T>(half_x + half_x); }
    FASTVAE_INLINE Vec<T> d_prior_logvar(Vec<T> g) const {
        return -(d_logvar(g) + times<T>(g, T(2) * half_u) * half_u);
    }
};

// One row of sums over rows: in T over kSpanRows rows, then in double.
template <class T> struct ColumnSums {
    alignas(64) T span[kSpan];
    double *total;  // [n]
    int64_t n, rows = 0;

    ColumnSums(double *total, int64_t n) : total(total), n(total ? n : 0) {
        for (int64_t d = 0; d < this->n; ++d) span[d] = 0, total[d] = 0;
    }
    FASTVAE_INLINE void add(int64_t i, Vec<T> v, int64_t m) { store_some(span + i, load_some(span + i, m) + v, m); }
    void end_row() {
        if (++rows % kSpanRows == 0) flush();
    }
    void flush() {
        for (int64_t d = 0; d < n; ++d) total[d] += span[d], span[d] = 0;
    }
};

// out[d] = scale * the sum over blocks of partials [blocks, D]
template <class T> void add_blocks(const double *partials, int64_t blocks, int64_t D, double scale, T *out) {
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += partials[k * D + d];
        out[d] = T(scale * sum);
    }
}

template <class T, bool kPrior>
int forward(const Inputs<T> &in, int64_t B, int64_t D, int reduction, double scale, T *out, int threads) {
    const bool over_rows = reduction == FASTVAE_DIM;
    const bool flat = in.dense(B, D) && (reduction == FASTVAE_NONE || reduction == FASTVAE_SUM);
    const Tiling tiling(B, D, flat, over_rows);
    Inputs<T> rows = in;
    if (flat) rows.mu_stride = rows.logvar_stride = rows.prior_mu_stride = rows.prior_logvar_stride = kSpan;
    const int64_t units = tiling.row_blocks * tiling.column_blocks;
    double sums[kMaxBlocks];  // of units, for FASTVAE_SUM
    double *partials = nullptr;
    if (over_rows && !(partials = static_cast<double *>(std::malloc(tiling.row_blocks * D * sizeof(double) + 1))))
        return FASTVAE_OUT_OF_MEMORY;

    const int status = parallel_for(units, threads, [&](int64_t unit, const Worker &) {
        double sum = 0;
        switch (reduction) {
        case FASTVAE_NONE:
            tiling.for_each_row(unit, [&](int64_t b, int64_t d, int64_t n) {
                const Inputs<T> row = rows.at(b, d);
                T *out_row = out + b * tiling.columns + d;
                for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                    store_some(out_row + i, Terms<T, kPrior>(row, i, m).kl() * T(scale), m);
                });
            });
            break;
        case FASTVAE_DIM: {
            const int64_t d0 = unit % tiling.column_blocks * tiling.block_columns;
            ColumnSums<T> columns(partials + unit / tiling.column_blocks * D + d0, least(kSpan, D - d0));
            tiling.for_each_row(unit, [&](int64_t b, int64_t d, int64_t n) {
                const Inputs<T> row = rows.at(b, d);
                for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                    columns.add(i, Terms<T, kPrior>(row, i, m).kl(), m);
                });
                columns.end_row();
            });
            columns.flush();
            break;
        }
        default:
            tiling.for_each_row(unit, [&](int64_t b, int64_t, int64_t n) {
                if (reduction == FASTVAE_SAMPLE) sum = 0;
                for (int64_t d = 0; d < n; d += kSpan) {
                    const Inputs<T> row = rows.at(b, d);
                    Vec<T> v{};
                    for_each_vector<T>(least(kSpan, n - d), [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                        v += Terms<T, kPrior>(row, i, m).kl();
                    });
                    sum += sum_lanes<T>(v);
                }
                if (reduction == FASTVAE_SAMPLE) out[b] = T(scale * sum);
            });
            if (reduction == FASTVAE_SUM) sums[unit] = sum;
        }
    });
    if (status == FASTVAE_OK && reduction == FASTVAE_SUM) add_blocks(sums, units, 1, scale, out);
    if (status == FASTVAE_OK && over_rows) add_blocks(partials, tiling.row_blocks, D, scale, out);
    std::free(partials);
    return status;
}

template <class T> struct Gradients {  // [B, D] each, or [D] where a prior is one row; NULL where not wanted
    T *d_mu, *d_logvar, *d_prior_mu, *d_prior_logvar;
};

template <class T, bool kPrior>
int backward(const T *grad, int64_t grad_row, int64_t grad_col, double scale, const Inputs<T> &in, int64_t B,
             int64_t D, const Gradients<T> &out, int threads) {
    const bool sum_mu = kPrior && out.d_prior_mu && in.prior_mu_stride == 0;
    const bool sum_logvar = kPrior && out.d_prior_logvar && in.prior_logvar_stride == 0;
    const bool over_rows = sum_mu || sum_logvar;
    const bool flat = !over_rows && in.dense(B, D) && (B == 1 || grad_row == grad_col * D);
    const Tiling tiling(B, D, flat, over_rows);
    Inputs<T> rows = in;
    if (flat) {
        rows.mu_stride = rows.logvar_stride = rows.prior_mu_stride = rows.prior_logvar_stride = kSpan;
        grad_row = grad_col * kSpan;
    }
    double *partials = nullptr;  // [2, row_blocks, D]: of d_prior_mu and of d_prior_logvar
    const int64_t size = tiling.row_blocks * D;
    if (over_rows && !(partials = static_cast<double *>(std::malloc(2 * size * sizeof(double) + 1))))
        return FASTVAE_OUT_OF_MEMORY;

    const int64_t units = tiling.row_blocks * tiling.column_blocks;
    const int status = parallel_for(units, threads, [&](int64_t unit, const Worker &) {
        const int64_t d0 = unit % tiling.column_blocks * tiling.block_columns;
        double *partial = partials + unit / tiling.column_blocks * D + d0;
        ColumnSums<T> mu_sums(sum_mu ? partial : nullptr, least(kSpan, D - d0));
        ColumnSums<T> logvar_sums(sum_logvar ? partial + size : nullptr, least(kSpan, D - d0));
        tiling.for_each_row(unit, [&](int64_t b, int64_t d, int64_t n) {
            const Inputs<T> row = rows.at(b, d);
            const T *grad_at = grad + b * grad_row + d * grad_col;
            const int64_t at = b * tiling.columns + d;
            const Vec<T> row_g = splat(grad_col ? T(0) : T(scale) * *grad_at);
            for_each_vector<T>(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
                const Vec<T> g = grad_col ? T(scale) * load_some(grad_at + i, m) : row_g;
                const Terms<T, kPrior> terms(row, i, m);
                const Vec<T> d_mu = terms.d_mu(g);
                if (out.d_mu) store_some(out.d_mu + at + i, d_mu, m);
                if (out.d_logvar) store_some(out.d_logvar + at + i, terms.d_logvar(g), m);
                if (!kPrior) return;
                if (sum_mu)
                    mu_sums.add(i, -d_mu, m);
                else if (out.d_prior_mu)
                    store_some(out.d_prior_mu + at + i, -d_mu, m);
                const Vec<T> d_prior_logvar = terms.d_prior_logvar(g);
                if (sum_logvar)
                    logvar_sums.add(i, d_prior_logvar, m);
                else if (out.d_prior_logvar)
                    store_some(out.d_prior_logvar + at + i, d_prior_logvar, m);
            });
            mu_sums.end_row();
            logvar_sums.end_row();
        });
        mu_sums.flush();
        logvar_sums.flush();
    });
    if (status == FASTVAE_OK && sum_mu) add_blocks(partials, tiling.row_blocks, D, 1.0, out.d_prior_mu);
    if (status == FASTVAE_OK && sum_logvar) add_blocks(partials + size, tiling.row_blocks, D, 1.0, out.d_prior_logvar);
    std::free(partials);
    return status;
}

}  // namespace

template <class T>
int kl_gauss(const void *mu, int64_t mu_stride, const void *logvar, int64_t logvar_stride, const void *prior_mu,
             int64_t prior_mu_stride, const void *prior_logvar, int64_t prior_logvar_stride, int64_t B, int64_t D,
             int reduction, double scale, void *out, int threads) {
    const Inputs<T> in{static_cast<const T *>(mu), static_cast<const T *>(logvar), static_cast<const T *>(prior_mu),
                       static_cast<const T *>(prior_logvar), mu_stride, logvar_stride, prior_mu_stride,
                       prior_logvar_stride};
    const auto run = prior_mu || prior_logvar ? forward<T, true> : forward<T, false>;
    return run(in, B, D, reduction, scale, static_cast<T *>(out), threads);
}

template <class T>
int kl_gauss_backward(const void *grad, int64_t grad_row, int64_t grad_col, double scale, const void *mu,
                      int64_t mu_stride, const void *logvar, int64_t logvar_stride, const void *prior_mu,
                      int64_t prior_mu_stride, const void *prior_logvar, int64_t prior_logvar_stride, int64_t B,
                      int64_t D, void *d_mu, void *d_logvar, void *d_prior_mu, void *d_prior_logvar, int threads) {
    const Inputs<T> in{static_cast<const T *>(mu), static_cast<const T *>(logvar), static_cast<const T *>(prior_mu),
                       static_cast<const T *>(prior_logvar), mu_stride, logvar_stride, prior_mu_stride,
                       prior_logvar_stride};
    const Gradients<T> out{static_cast<T *>(d_mu), static_cast<T *>(d_logvar),
                           prior_mu ? static_cast<T *>(d_prior_mu) : nullptr,
                           prior_logvar ? static_cast<T *>(d_prior_logvar) : nullptr};
    const auto run = prior_mu || prior_logvar ? backward<T, true> : backward<T, false>;
    return run(static_cast<const T *>(grad), grad_row, grad_col, scale, in, B, D, out, threads);
}

void add_kl_gauss(fastvae_kernels &f32, fastvae_kernels &f64) {
    f32.kl_gauss = kl_gauss<float>, f64.kl_gauss = kl_gauss<double>;
    f32.kl_gauss_backward = kl_gauss_backward<float>, f64.kl_gauss_backward = kl_gauss_backward<double>;
}

}  // namespace fastvae::FASTVAE_ISA
