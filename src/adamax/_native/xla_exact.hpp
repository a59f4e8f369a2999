// Exact updates of the tables of JAX, whose state has the history of the steps that stale
// rows have not taken.
#pragma once

#include <atomic>

#include "xla_rows.hpp"

namespace adamax::xla {

// Six arguments, in the dtype of the state but for the last: see jax/history.py.
template <class T>
struct StateHistory {
    const T* recent;  // (2, window, terms): the sums of rows that are 1, 2, ... steps
                      // behind, and what rounding has left out of them
    const T* finals;  // (entries, terms): those of older ones, by the step
    const T* decay;  // (entries or 0, 3): of the product of all decay factors up to a step,
                     // the logarithm in two parts, and whether it is negative
    const T* powers;  // (2, 4, 256): of beta_1 and beta_2, by the digits of the exponent
    double epsilon;   // (1,)
    int32_t steps;    // (1,), int32, may have overflowed
    int64_t window, terms, entries;

    StateHistory(const Call& call, size_t first) {
        require(call[first].ndim == 3 && call[first + 1].ndim == 2);
        window = call[first].shape[1];
        terms = call[first].shape[2];
        entries = call[first + 1].shape[0];
        require(window >= 1 && entries >= 2 * window && (entries & (entries - 1)) == 0 &&
                terms <= kMostTerms && terms % 4 == 1);
        const bool decays = call[first + 2].length() > 0;
        const Dtype dtype = dtype_of<T>();
        recent = call.numbers<T>(first, dtype, {2, window, terms});
        finals = call.numbers<T>(first + 1, dtype, {entries, terms});
        decay = call.numbers<T>(first + 2, dtype, {decays ? entries : 0, 3});
        if (!decays) decay = nullptr;
        powers = call.numbers<T>(first + 3, dtype, {2, 4, 256});
        epsilon = *call.numbers<T>(first + 4, dtype, {1});
        steps = *call.numbers<int32_t>(first + 5, Dtype::kInt32, {1});
    }

    int64_t now() const { return steps; }

    template <class>
    Gap<T> gap(int64_t behind, double, T* sums) const {
        const bool is_final = behind > window;
        const T* entry = is_final
                             ? finals + (int64_t(steps - behind) & (entries - 1)) * terms
                             : recent + (behind - 1) * terms;
        const double later = is_final ? decayed(behind - window) : 1;
        for (int64_t n = 0; n < terms; ++n) sums[n] = T(entry[n] * later);
        double of_m = 1, of_u = 1;
        for (int64_t digit = 0, rest = behind; rest > 0; ++digit, rest /= 256) {
            of_m *= powers[digit * 256 + rest % 256];
            of_u *= powers[(4 + digit) * 256 + rest % 256];
        }
        return {T(decayed(behind)), T(of_m), T(of_u), T(epsilon), sums, terms};
    }

  private:
    // The product of the last decay factors.
    double decayed(int64_t count) const {
        if (!decay) return 1;
        const T* before = decay + 3 * (int64_t(steps - count) & (entries - 1));
        const T* after = decay + 3 * (int64_t(steps) & (entries - 1));
        const double size = std::exp((double(after[0]) - double(before[0])) +
                                     (double(after[1]) - double(before[1])));
        return after[2] == before[2] ? size : -size;
    }
};

// A table, its history, and its stamps, which are the argument 3.
template <class T>
class ExactTable {
  public:
    const Rows& rows;
    const StateHistory<T> history;
    const Stamps stamps;

    ExactTable(const Call& call, const Rows& of_table, size_t of_history)
        : rows(of_table),
          history(call, of_history),
          stamps{call.numbers<uint32_t>(3, Dtype::kInt32, {rows.count})} {}

    ADAMAX_INLINE void prefetch_stamp(const Keys& keys, int64_t i) const {
        if (i + kPrefetchStamps < keys.count()) {
            stamps.prefetch_row(keys.row(i + kPrefetchStamps));
        }
    }

    void catch_up_row(int64_t row) {
        if (is_known(row)) catch_up<T>(rows, row, stamps, history, 0);
    }

    // Copies a row to a place and brings the copy up to date.
    void look_up(int64_t row, char* to) {
        const int64_t* const step = rows.walk.step;
        const char* of_row[3];
        rows.place(row, of_row);
        std::memcpy(to, of_row[0], size_t(rows.row_step[0]));
        const int64_t behind = stamps.gap(row, history.now());
        if (behind == 0 || !is_known(row)) return;
        T sums[kMostTerms], m[kBlock], u[kBlock];
        const Gap<T> gap = history.template gap<T>(behind, 0, sums);
        const Rounding rounding = rows.rounding_of_gap(row, gap.of_u);
        for (int64_t first = 0; first < rows.length(); first += kBlock) {
            const int64_t count = std::min(kBlock, rows.length() - first);
            std::memcpy(m, of_row[1] + first * step[1], size_t(count * step[1]));
            std::memcpy(u, of_row[2] + first * step[2], size_t(count * step[2]));
            const Places places = {to + first * step[0], reinterpret_cast<char*>(m),
                reinterpret_cast<char*>(u), nullptr};
            catch_up_elements(rows.operands, places, step, row * rows.length() + first,
                count, gap, rounding);
        }
    }

    // To be called in the end. What was written is lost then, as results of a failed
    // program.
    void require_known() const {
        if (known_) return;
        throw std::invalid_argument(
            "adamax: the stamps of a table do not belong to its history: its state was "
            "changed while rows were stale");
    }

  private:
    // Whether the history goes back to a row's stamp.
    bool is_known(int64_t row) {
        const bool known = stamps.gap(row, history.now()) < history.entries;
        if (!known) known_ = false;
        return known;
    }

    std::atomic<bool> known_{true};
};

inline void run_exact_step(const Call& call, const Rows& rows, const Keys& keys,
    const Scalars<double>& of_step, size_t of_history) {
    dispatch(call[0].dtype, [&](auto kind) {
        using T = decltype(kind);
        ExactTable<T> table(call, rows, of_history);
        const RowScalars<T> scalars(rows, of_step);
        const int64_t now = table.history.now(), cycle = table.history.entries / 2;
        each_row_in_parallel(call, rows, keys, 3, [&](int64_t i, int64_t end) {
            table.prefetch_stamp(keys, i);
            table.catch_up_row(keys.row(i));
            update_row(rows, keys, i, end, scalars);
            table.stamps.set(keys.row(i), now + 1);
        });
        const int64_t turn = (rows.count + cycle - 1) / cycle;
        const int64_t first = (now & (cycle - 1)) * turn;
        for (int64_t row = first; row < std::min(first + turn, rows.count); ++row) {
            if (table.stamps.gap(row, now + 1) != 0) table.catch_up_row(row);
        }
        table.require_known();
    });
}

inline void exact_step(const Call& call) {
    const Rows rows = table_of(call, 5);
    const Keys keys = keys_of(call, 4, rows.count, call[5].shape[0]);
    run_exact_step(call, rows, keys, scalars_of(call, 6), 7);
}

inline void run_exact_flush(const Call& call, const Rows& rows, size_t of_history) {
    dispatch(call[0].dtype, [&](auto kind) {
        ExactTable<decltype(kind)> table(call, rows, of_history);
        in_pieces(call, rows, rows.count, 1, [&](int64_t start, int64_t stop) {
            for (int64_t row = start; row < stop; ++row) table.catch_up_row(row);
        });
        table.require_known();
    });
}

inline void exact_flush(const Call& call) { run_exact_flush(call, table_of(call, 0), 4); }

// A table, whose state is to be checked, and the rows that are to be copied.
inline Rows looked_up_table(const Call& call) {
    const View& result = call.result(0);
    const Rows rows = rows_of({&call[0], &call[1], &call[2], &result});
    require(result.dtype == call[0].dtype);
    return rows;
}

inline void run_exact_lookup(
    const Call& call, const Rows& rows, size_t indices, size_t of_history) {
    const View& result = call.result(0);
    const int64_t count = result.shape[0];
    const auto size = size_t(rows.row_step[0]);
    // In the order of rows, which are read once each.
    const Keys keys = keys_of(call, indices, rows.count, count);
    if (keys.count() < count) std::memset(result.data, 0, size_t(count) * size);
    dispatch(call[0].dtype, [&](auto kind) {
        ExactTable<decltype(kind)> table(call, rows, of_history);
        each_row_in_parallel(call, rows, keys, 3, [&](int64_t i, int64_t end) {
            table.prefetch_stamp(keys, i);
            auto place = [&](int64_t j) {
                return result.data + keys.position(j) * rows.row_step[0];
            };
            table.look_up(keys.row(i), place(i));
            for (int64_t j = i + 1; j < end; ++j) std::memcpy(place(j), place(i), size);
        });
        table.require_known();
    });
}

inline void exact_lookup(const Call& call) {
    check_state(call, 0);
    run_exact_lookup(call, looked_up_table(call), 4, 5);
}

}  // namespace adamax::xla
