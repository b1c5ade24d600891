// Tiles of pairs: a panel of samples against a panel of columns. A thread holds kSide x kSide pairs in registers, and a
// step in d costs it 2 multiply-adds a pair and three short rows from shared memory, where chunks of dimensions of both
// panels arrive by asynchronous copies, kStages deep.
#pragma once

#include "pack.h"

namespace fastvae::FASTVAE_ISA {

constexpr int kStages = 3, kAhead = kStages - 1;  // chunks in memory, chunks under way
constexpr int64_t kFoldChunks = 16;                           // squares are summed over so many chunks at a time
inline bool folds(int64_t D) { return D > kFoldChunks * kChunk; }

template <class T> struct Stage {
    T z[kChunk][kPanel<T>], ab[kChunk][2][kPanel<T>];
};
template <class T> struct Stages {
    Stage<T> stages[kStages];
    AsyncCopies<kStages>::Shared copies;
    Balance balance;
    alignas(16) T tops[kPanel<T>];  // of rows, what their sums are relative to
};

// The samples or columns of a panel that a thread has, by its lane: pieces of 16 bytes, so that 16 lanes read from
// different banks.
template <class T> constexpr int kPiece = 16 / int(sizeof(T));
template <class T> FASTVAE_DEVICE int place(int lane, int r) {
    return r / kPiece<T> * kLanes * kPiece<T> + lane * kPiece<T> + r % kPiece<T>;
}
template <class T> FASTVAE_DEVICE void load_side(const T *panel, int lane, T (&x)[kSide<T>]) {
    struct alignas(16) Piece {
        T x[kPiece<T>];
    };
    const Piece *const mine = reinterpret_cast<const Piece *>(panel) + lane;
    FASTVAE_UNROLL
    for (int v = 0; v < kSide<T> / kPiece<T>; ++v) {
        const Piece piece = mine[v * kLanes];
        FASTVAE_UNROLL
        for (int k = 0; k < kPiece<T>; ++k) x[v * kPiece<T> + k] = piece.x[k];
    }
}

template <class T> using Pairs = T[kSide<T>][kSide<T>];  // [samples][columns]

// The pairs that a thread has. Blocks that own samples sum over columns, which are then in neighbouring lanes; blocks
// that own columns the other way round.
template <bool kOwnsRows> struct Lanes {
    int row = int(threadIdx.x) / kLanes, column = int(threadIdx.x) % kLanes;
    FASTVAE_DEVICE Lanes() {
        if (!kOwnsRows) row = int(threadIdx.x) % kLanes, column = int(threadIdx.x) / kLanes;
    }
    FASTVAE_DEVICE int owner() const { return kOwnsRows ? row : column; }
};

// t of a sample and a column
template <bool kFar, class T> FASTVAE_DEVICE T standardized(T z, T a, T b) {
    return kFar ? (z + b) * a : fma_(z, a, b);
}
// c - log2(e) / (2 kappa^2) squares
template <class T> FASTVAE_DEVICE T minus_squares(T c, T squares) {
    return sizeof(T) == 4 ? c - squares : fma_(squares, T(-0.5 * kLog2e), c);
}

// The least number of blocks of a tile kernel that fit on a multiprocessor, for which the compiler limits registers.
template <class T, bool kFold = false> constexpr int kBlocks = kFold || sizeof(T) == 8 ? 1 : 2;

// Walks over the dimensions of tiles, chunk by chunk. All threads of the block take part.
template <class T, bool kOwnsRows> class Sweep {
public:
    FASTVAE_DEVICE Sweep(const Packed<T> &p)
        : p_(p), stages_(shared_memory<Stages<T>>().stages), copies_(shared_memory<Stages<T>>().copies),
          balance_(shared_memory<Stages<T>>().balance) {
        balance_.start();
    }

    // The next sweeps are over the tiles of this panel with passing ones [first, last): what they need first is sent
    // for.
    FASTVAE_DEVICE void start(int64_t owner, int64_t first, int64_t last) {
        __syncthreads();  // no thread still reads what came last
        owner_ = int(owner);
        next_ = int(first);
        last_ = int(last);
        next_chunk_ = 0;
        for (int k = 0; k < kAhead; ++k) request();
    }

    // One tile: f(stage, chunk, dimensions) for its chunks, in order.
    template <class F> FASTVAE_DEVICE void run(const F &f) {
        run<false>(false, [&](const Stage<T> &stage, int chunk, int n, bool) { return f(stage, chunk, n), false; });
    }
    // One tile that may stop early, with f(stage, chunk, dimensions, look): where `may_stop`, it ends before its last
    // chunk once f, called with `look`, gives true in all threads. Returns whether it did.
    template <bool kEarly, class F> FASTVAE_DEVICE bool run(bool may_stop, const F &f) {
        bool far = false;
        for (int chunk = 0; chunk < p_.chunks; ++chunk) {
            const Stage<T> &stage = stages_[copies_.template wait<kAhead - 1>()];
            // Every thread's part is there, and no thread still reads the stage that is filled next.
            if (!kEarly) {
                __syncthreads();
            } else if (__syncthreads_and(far)) {
                balance_.add(chunk, p_.chunks - chunk);
                leave(p_.chunks - chunk);
                return true;
            }
            request();
            const int first = chunk * p_.dims, left = int(p_.D) - first;
            far = f(stage, chunk, left < p_.dims ? left : p_.dims,
                    kEarly && may_stop && chunk + 1 < p_.chunks && balance_.look());
        }
        if (kEarly && may_stop) balance_.add(p_.chunks - 1, 0);
        return false;
    }
private:
    // The tile's last chunks, of which the first is there: what was asked for is waited for all the same, and what is
    // asked for next is the next tile's.
    FASTVAE_DEVICE void leave(int chunks) {
        if (chunks > kAhead) chunks = kAhead, next_chunk_ = 0, ++next_;
        request();
        while (--chunks) {
            copies_.template wait<kAhead - 1>();
            __syncthreads();
            request();
        }
    }
    FASTVAE_DEVICE void request() {
        if (next_ < last_) {
            const int64_t row = kOwnsRows ? owner_ : next_, column = kOwnsRows ? next_ : owner_;
            const int first = next_chunk_ * p_.dims, left = int(p_.D) - first, n = left < p_.dims ? left : p_.dims;
            constexpr int W = kPanel<T>, kBytes = W * int(sizeof(T));
            Stage<T> &stage = stages_[copies_.filling()];
            copies_.fetch(stage.z, p_.samples + (row * p_.D + first) * W, n * kBytes);
            copies_.fetch(stage.ab, p_.columns + (column * p_.D + first) * 2 * W, n * 2 * kBytes);
            if (++next_chunk_ == p_.chunks) next_chunk_ = 0, ++next_;
        }
        copies_.commit();  // also of nothing, so that wait() counts right
    }

    const Packed<T> &p_;
    Stage<T> (&stages_)[kStages];
    AsyncCopies<kStages> copies_;
    Balance &balance_;
    int owner_, next_, last_;  // panels
    int next_chunk_;
};

template <bool kFar, class T, bool kOwnsRows>
FASTVAE_DEVICE void add_squares(const Stage<T> &stage, int n, const Lanes<kOwnsRows> &lanes, Pairs<T> &sum) {
    constexpr int R = kSide<T>;
#ifdef __CUDACC__
#pragma unroll 2
#endif
    for (int d = 0; d < n; ++d) {
        T z[R], a[R], b[R];
        load_side(stage.z[d], lanes.row, z);
        load_side(stage.ab[d][0], lanes.column, a);
        load_side(stage.ab[d][1], lanes.column, b);
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            FASTVAE_UNROLL
            for (int c = 0; c < R; ++c) {
                const T t = standardized<kFar>(z[r], a[c], b[c]);
                sum[r][c] = fma_(t, t, sum[r][c]);
            }
        }
    }
}

template <class T> FASTVAE_DEVICE void clear(Pairs<T> &x) {
    FASTVAE_UNROLL
    for (int r = 0; r < kSide<T>; ++r) {
        FASTVAE_UNROLL
        for (int c = 0; c < kSide<T>; ++c) x[r][c] = T(0);
    }
}

// Whether each of a thread's sums of squares passes its row's limit, in bits
template <class T, class F> FASTVAE_DEVICE bool all_far(const Pairs<T> &squares, const F &limit) {
    constexpr T kSquares = T(sizeof(T) == 4 ? 1 : 2 * kLn2);  // of a bit
    bool far = true;
    FASTVAE_UNROLL
    for (int r = 0; r < kSide<T>; ++r) {
        const T least = limit(r) * kSquares;
        FASTVAE_UNROLL
        for (int c = 0; c < kSide<T>; ++c) far &= squares[r][c] > least;
    }
    return far;
}

// sum_d t^2 of the next tile; where there are many dimensions, in two levels (kFold). Whether it stopped early: where it
// may, once squares pass limit(row), in bits.
template <bool kFold, bool kEarly, class T, bool kOwnsRows, class F>
FASTVAE_DEVICE bool square_sums(Sweep<T, kOwnsRows> &sweep, bool far, const Lanes<kOwnsRows> &lanes, Pairs<T> &sum,
                                bool may_stop, const F &limit) {
    clear<T>(sum);
    if constexpr (kFold) {
        Pairs<T> part;
        clear<T>(part);
        const bool stopped = sweep.template run<kEarly>(may_stop, [&](const Stage<T> &stage, int chunk, int n, bool look) {
            if (far)
                add_squares<true>(stage, n, lanes, part);
            else
                add_squares<false>(stage, n, lanes, part);
            if (chunk % kFoldChunks != kFoldChunks - 1) return look && chunk < kFoldChunks && all_far<T>(part, limit);
            FASTVAE_UNROLL
            for (int r = 0; r < kSide<T>; ++r) {
                FASTVAE_UNROLL
                for (int c = 0; c < kSide<T>; ++c) sum[r][c] += part[r][c], part[r][c] = T(0);
            }
            return look && all_far<T>(sum, limit);
        });
        FASTVAE_UNROLL
        for (int r = 0; r < kSide<T>; ++r) {
            FASTVAE_UNROLL
            for (int c = 0; c < kSide<T>; ++c) sum[r][c] += part[r][c];
        }
        return stopped;
    } else {
        return sweep.template run<kEarly>(may_stop, [&](const Stage<T> &stage, int, int n, bool look) {
            if (far)
                add_squares<true>(stage, n, lanes, sum);
            else
                add_squares<false>(stage, n, lanes, sum);
            return look && all_far<T>(sum, limit);
        });
    }
}
template <bool kFold, class T, bool kOwnsRows>
FASTVAE_DEVICE void square_sums(Sweep<T, kOwnsRows> &sweep, bool far, const Lanes<kOwnsRows> &lanes, Pairs<T> &sum) {
    square_sums<kFold, false>(sweep, far, lanes, sum, false, [](int) { return T(0); });
}

// The panels of columns where an own column of a panel's samples, or the next one, may be.
template <class T> struct OwnPanels {
    int first = 0, last = -1;
    bool wraps = false;  // the next one of the last column is the first
    FASTVAE_DEVICE OwnPanels(const Packed<T> &p, int64_t row_panel) {
        if (!p.weights.own || p.own_high[row_panel] < 0) return;
        first = int(p.own_low[row_panel] / kPanel<T>);
        last = int((p.own_high[row_panel] + 1) / kPanel<T>);
        wraps = p.own_high[row_panel] == p.N - 1;
    }
    FASTVAE_DEVICE bool has(int column_panel) const {
        return (column_panel >= first && column_panel <= last) || (wraps && column_panel == 0);
    }
};
template <class T> FASTVAE_DEVICE bool meets_own(const Packed<T> &p, int64_t row_panel, int64_t column_panel) {
    return OwnPanels<T>(p, row_panel).has(int(column_panel));
}

// Whether the bounds hold for a tile: not where a pair's weight may be another than the column's.
template <class T> FASTVAE_DEVICE bool may_stop(const Packed<T> &p, int64_t row_panel, int64_t column_panel) {
    return p.early && !(p.weights.any_overrides() && meets_own(p, row_panel, column_panel));
}

// The columns of a panel, at most two, whose weight for one sample is not the common one.
template <class T> struct Special {
    int first = -1, second = -1;  // places in the panel, -1 for none
    T first_w = 0, second_w = 0;  // log2

    FASTVAE_DEVICE Special(const Packed<T> &p, int64_t i, int64_t column_panel) {
        if (i >= p.S) return;
        bool later = false;
        p.weights.overrides(i, [&](int64_t j, T log2_w) {
            const int64_t at = j - column_panel * kPanel<T>;
            const int here = at >= 0 && at < kPanel<T> ? int(at) : -1;
            if (later)
                second = here, second_w = log2_w;
            else
                first = here, first_w = log2_w;
            later = true;
        });
    }
    FASTVAE_DEVICE bool has(int place) const { return place == first || place == second; }
    FASTVAE_DEVICE T log2_w(int place) const { return place == first ? first_w : second_w; }
};

// From a tile's squares to its terms log2 w_ij q(z_i | x_j), in place. `meets`: meets_own
template <class T, bool kOwnsRows>
FASTVAE_DEVICE void to_terms(const Packed<T> &p, int64_t row_panel, int64_t column_panel, bool meets,
                             const Lanes<kOwnsRows> &lanes, Pairs<T> &x) {
    constexpr int R = kSide<T>, W = kPanel<T>;
    T cw[R];
    load_side(p.cw + column_panel * W, lanes.column, cw);
    if (!meets) {
        FASTVAE_UNROLL
        for (int r = 0; r < R; ++r) {
            FASTVAE_UNROLL
            for (int c = 0; c < R; ++c) x[r][c] = minus_squares(cw[c], x[r][c]);
        }
        return;
    }
    FASTVAE_UNROLL
    for (int r = 0; r < R; ++r) {
        const Special<T> special(p, row_panel * W + place<T>(lanes.row, r), column_panel);
        FASTVAE_UNROLL
        for (int c = 0; c < R; ++c) {
            const int at = place<T>(lanes.column, c);
            x[r][c] = special.has(at) ? minus_squares(p.c[column_panel * W + at], x[r][c]) + special.log2_w(at)
                                      : minus_squares(cw[c], x[r][c]);
        }
    }
}

// Reduces, by f and always in the same order, n numbers of each of 16 neighbouring lanes over these lanes: lane l gets
// the result of number l * n / 16. In each step a lane gives away half of the numbers that it still has.
template <class T, class F> FASTVAE_DEVICE T over_lanes(T (&v)[1], const F &f, int offset = kLanes / 2) {
    T all = v[0];
    for (; offset; offset /= 2) all = f(all, __shfl_xor_sync(~0u, all, offset));
    return all;
}
template <class T, int n, class F> FASTVAE_DEVICE T over_lanes(T (&v)[n], const F &f, int offset = kLanes / 2) {
    const bool upper = threadIdx.x & offset;
    T half[n / 2];
    FASTVAE_UNROLL
    for (int k = 0; k < n / 2; ++k) {
        const T mine = upper ? v[k + n / 2] : v[k], theirs = upper ? v[k] : v[k + n / 2];
        half[k] = f(mine, __shfl_xor_sync(~0u, theirs, offset));
    }
    return over_lanes(half, f, offset / 2);
}
template <class T, int n> FASTVAE_DEVICE T sum_over_lanes(T (&v)[n]) {
    return over_lanes(v, [](T a, T b) { return a + b; });
}
template <class T, int n> FASTVAE_DEVICE T max_over_lanes(T (&v)[n]) {
    return over_lanes(v, [](T a, T b) { return max_(a, b); });
}
// The number whose result this lane gets, and whether it is the lane that writes it
template <class T> FASTVAE_DEVICE int summed_number() { return int(threadIdx.x) % kLanes / (kLanes / kSide<T>); }
template <class T> FASTVAE_DEVICE bool writes_sum() { return threadIdx.x % (kLanes / kSide<T>) == 0; }

}  // namespace fastvae::FASTVAE_ISA
