// Bringing stale rows up to date, and the history of the steps they have not taken.
#pragma once

#include "rows.hpp"

namespace adamax {

constexpr int kMostTerms = 65;
constexpr int64_t kPrefetchStamps = 8;  // ahead

// The arrays of _core/exact.py's History: rings with an entry for each of the last steps.
struct History {
    const double* sums;      // (entries, terms)
    const double* products;  // (entries, 6): three mantissas, then their exponents of 2
    int64_t entries;         // a power of two
    int64_t terms;
    int64_t steps;         // recorded so far
    int64_t window;        // after how many steps an entry of `sums` is final
    int64_t start;         // the step with which all rows were last up to date
    int64_t last_zero[3];  // the last step whose factor was 0, which products leave out

    int64_t now() const { return steps; }
    // How many steps a row can be behind.
    int64_t longest() const { return std::min(steps - start, entries - 1); }

    // What to tell a row that is up to date with step `steps - gap`. `sums` gets the terms.
    template <class T>
    Gap<T> gap(int64_t behind, double epsilon, T* terms_of_gap) const {
        const int64_t since = steps - behind, is_final = since + window;
        const double later = is_final < steps ? product(0, is_final) : 1.0;
        const double* entry = sums + (since & (entries - 1)) * terms;
        for (int64_t n = 0; n < terms; ++n) terms_of_gap[n] = T(entry[n] * later);
        return {T(product(0, since)), T(product(1, since)), T(product(2, since)),
            rounded<T>(epsilon), terms_of_gap, terms};
    }

  private:
    // Of the factors of w, m or u in all steps after one.
    double product(int column, int64_t since) const {
        if (since < last_zero[column]) return 0;
        const double* before = products + (since & (entries - 1)) * 6;
        const double* after = products + (steps & (entries - 1)) * 6;
        return std::ldexp(
            after[column] / before[column], int(after[column + 3] - before[column + 3]));
    }
};

// The step that each row is up to date with, modulo 2**32.
struct Stamps {
    uint32_t* of_row;

    int64_t gap(int64_t row, int64_t now) const { return uint32_t(now) - of_row[row]; }
    void set(int64_t row, int64_t step) const { of_row[row] = uint32_t(step); }
    ADAMAX_INLINE void prefetch_row(int64_t row) const {
        prefetch(reinterpret_cast<const char*>(of_row + row));
    }
};

// Brings the elements of a stale row at `places` in w, m and u up to date. `number` is that
// of the first one.
template <class T>
void catch_up_elements(const Operand* operands, const Places& places, const int64_t* steps,
    int64_t number, int64_t count, const Gap<T>& gap, const Rounding& rounding) {
    const auto& run = loops().of(T());
    bool in_place = true;
    for (int k = 0; k < 3; ++k) {
        in_place = in_place && is_direct<T>(operands[k], places[k], steps[k]);
    }
    if (in_place) {
        auto numbers = [&](int k) { return reinterpret_cast<T*>(places[k]); };
        run.catch_up(numbers(0), numbers(1), numbers(2), count, gap);
        return;
    }
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t length = std::min(kBlock, count - first);
        Places of_block;
        for (int k = 0; k < 3; ++k) of_block[k] = places[k] + first * steps[k];
        Numbers<T> numbers(operands, of_block, steps, length, rounding);
        run.catch_up(numbers.of[0], numbers.of[1], numbers.of[2], length, gap);
        numbers.store_back(number + first);
    }
}

// Brings a row of a table up to date and stamps it. Returns whether it was stale.
template <class T, class AnyHistory>
bool catch_up(const Rows& rows, int64_t row, const Stamps& stamps,
    const AnyHistory& history, double epsilon) {
    const int64_t gap = stamps.gap(row, history.now());
    if (gap == 0) return false;
    T terms[kMostTerms];
    const Gap<T> of_gap = history.template gap<T>(gap, epsilon, terms);
    const Rounding rounding = rows.rounding_of_gap(row, of_gap.of_u);
    const char* of_row[kOperands];
    rows.place(row, of_row);
    of_row[3] = of_row[0];
    const int64_t before = row * rows.length();  // elements
    rows.walk.each_run(
        of_row, 0, rows.length(), [&](const Places& places, int64_t number, int64_t count) {
            catch_up_elements(rows.operands, places, rows.walk.step, before + number, count,
                of_gap, rounding);
        });
    rows.advance(row, rounding);
    stamps.set(row, history.now());
    return true;
}

}  // namespace adamax
