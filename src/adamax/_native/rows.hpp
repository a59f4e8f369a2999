// Rows of tables: where they lie, and the rule on those that a sparse gradient touches.
#pragma once

#include "elements.hpp"
#include "keys.hpp"

namespace adamax {

constexpr int64_t kRowsPiece = 4 * 1024;  // elements
constexpr int64_t kPrefetchRows = 2;      // ahead
constexpr int64_t kPrefetchBytes = 512;   // of each row
constexpr int64_t kCacheLine = 64;

// GCC takes a function that only prefetches for one without effects, and drops calls of it
// unless they have been inlined by then.
#ifdef __GNUC__
#define ADAMAX_INLINE inline __attribute__((always_inline))
#else
#define ADAMAX_INLINE inline
#endif

ADAMAX_INLINE void prefetch(const char* place) {
#if defined(__GNUC__)
    __builtin_prefetch(place, 1);
#elif defined(_M_X64)
    _mm_prefetch(place, _MM_HINT_T0);
#endif
}

// Rows of w, m, u and of the values of a gradient, which has a row for each index.
struct Rows {
    Operand operands[kOperands];
    const char* base[kOperands];  // where the first row is
    int64_t row_step[kOperands];  // from row to row, in bytes
    Walk walk;                    // of the elements of a row
    int64_t count = 0;            // of rows in the table
    Rounding rounding{};          // but for its frame
    float* frames = nullptr;      // of 8-bit state, one for each row

    int64_t length() const { return walk.length(); }
    int64_t piece() const {
        return std::max<int64_t>(1, kRowsPiece / std::max<int64_t>(length(), 1));
    }
    bool is_double() const { return operands[0].dtype == Dtype::kFloat64; }

    void place(int64_t row, const char* places[3]) const {
        for (int k = 0; k < 3; ++k) places[k] = base[k] + row * row_step[k];
    }
    const char* value(int64_t position) const { return base[3] + position * row_step[3]; }

    ADAMAX_INLINE void prefetch_row(int64_t row) const {
        for (int k = 0; k < 3; ++k) prefetch_begin(base[k] + row * row_step[k], k);
        if (frames) prefetch(reinterpret_cast<const char*>(frames + row));
    }
    // How a row is rounded whose frame is shifted.
    Rounding rounding_of(int64_t row, double shift) const {
        Rounding of_row = rounding;
        if (frames) of_row.frame = Frame::shifted(frames[row], shift);
        return of_row;
    }
    // Where its norms are multiplied by `decay` as it catches up: not by the bits of the
    // step itself.
    Rounding rounding_of_gap(int64_t row, double decay) const {
        Rounding of_row = rounding_of(row, frames ? Frame::shift_of(decay) : 0);
        of_row.seed = ~of_row.seed;
        return of_row;
    }
    void advance(int64_t row, const Rounding& of_row) const {
        if (frames) frames[row] = of_row.frame.after;
    }
    ADAMAX_INLINE void prefetch_value(int64_t position) const {
        prefetch_begin(value(position), 3);
    }

  private:
    ADAMAX_INLINE void prefetch_begin(const char* place, int k) const {
        const int64_t bytes = std::min(length() * walk.step[k], kPrefetchBytes);
        for (int64_t line = 0; line < bytes; line += kCacheLine) prefetch(place + line);
    }
};

// Adds up, in float64 and in the order of their positions, what the values at keys [i, end)
// have from element `first` on. `offset` is where that element is in a row of values.
inline void sum_values(const Rows& rows, const Keys& keys, int64_t i, int64_t end,
    int64_t offset, int64_t count, double* sums) {
    const Operand& g = rows.operands[3];
    const int64_t step = rows.walk.step[3];
    std::fill(sums, sums + count, 0.0);
    for (; i < end; ++i) {
        const char* place = rows.value(keys.position(i)) + offset;
        if (is_direct<float>(g, place, step)) {
            loops().on_float.add(sums, reinterpret_cast<const float*>(place), count);
        } else {
            double numbers[kBlock];
            load(g, place, step, count, numbers);
            loops().on_double.add(sums, numbers, count);
        }
    }
}

// The scalars of the rule on the rows of a table.
template <class T>
struct RowScalars {
    Scalars<T> rounded;
    double scale;
    double shift;  // of frames
    bool wide;     // a gradient wider than the arithmetic is scaled before it is rounded

    RowScalars(const Rows& rows, const Scalars<double>& scalars)
        : rounded(adamax::rounded<T>(scalars)),
          scale(scalars.scale),
          shift(Frame::shift_of(scalars.beta_2)),
          wide(rows.operands[3].dtype == Dtype::kFloat64 && sizeof(T) == sizeof(float)) {
        if (wide) rounded.scale = 1;
    }
};

// The rule on a row whose values are at the keys [i, end).
template <class T>
void update_row(const Rows& rows, const Keys& keys, int64_t i, int64_t end,
    const RowScalars<T>& scalars) {
    const Operand& g = rows.operands[3];
    const int64_t step = rows.walk.step[3];
    const bool summed = end > i + 1;
    const char* of_row[kOperands];
    rows.place(keys.row(i), of_row);
    of_row[3] = rows.value(keys.position(i));
    const Rounding rounding = rows.rounding_of(keys.row(i), scalars.shift);
    const int64_t before = keys.row(i) * rows.length();  // elements
    rows.walk.each_run(
        of_row, 0, rows.length(), [&](const Places& places, int64_t number, int64_t n) {
            const bool direct = !summed && is_direct<T>(g, places[3], step);
            update_elements<T>(rows.operands, places, rows.walk.step, before + number, n,
                scalars.rounded, rounding,
                direct ? reinterpret_cast<const T*>(places[3]) : nullptr,
                [&](int64_t first, int64_t length, T* numbers) {
                    const char* place = places[3] + first * step;
                    if (!summed && !scalars.wide) {
                        load(g, place, step, length, numbers);
                        return;
                    }
                    double sums[kBlock];
                    sum_values(rows, keys, i, end, place - of_row[3], length, sums);
                    const double scale = scalars.wide ? scalars.scale : 1;
                    for (int64_t j = 0; j < length; ++j) numbers[j] = T(scale * sums[j]);
                });
        });
    rows.advance(keys.row(i), rounding);
}

// Calls `function(i, end)` for each row that begins at a key in [start, stop), where its
// keys are [i, end), with what comes next on its way into the caches.
template <class Function>
void each_row(const Rows& rows, const Keys& keys, int64_t start, int64_t stop,
    const Function& function) {
    stop = std::min(stop, keys.count());
    for (int64_t i = keys.next_row(start, stop); i < stop;) {
        if (i + kPrefetchRows < keys.count()) {
            rows.prefetch_row(keys.row(i + kPrefetchRows));
            rows.prefetch_value(keys.position(i + kPrefetchRows));
        }
        const int64_t end = keys.end_of_row(i);
        function(i, end);
        i = end;
    }
}

}  // namespace adamax
