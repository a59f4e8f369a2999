// One step of an optimizer: whole parameters, rows of tables, and what is counted of it.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "dense.hpp"
#include "exact.hpp"
#include "norm.hpp"
#include "threads.hpp"

namespace adamax {

// Waking a thread takes about as long as updating this many elements in a cache, or half as
// many in rows all over memory.
constexpr int64_t kWorthAThread = 96 * 1024;

// Of the array that says where a history is.
constexpr int kClock = 6;

inline int worth(int threads, int64_t elements) {
    return int(std::min<int64_t>(threads, 1 + elements / kWorthAThread));
}

// The norm of each gradient.
std::vector<Norm> norms_of(const std::vector<Gradient>& gradients, int threads);

// What a step adds to a history: entries that change, up to and including the new one.
struct Recorded {
    double* sums;  // the history's own arrays
    double* products;
    int64_t* clock;  // see History in _core/exact.py
    const double* new_sums;
    int64_t new_entries;
    const double* new_products;  // (6,)
    const int64_t* new_clock;    // (kClock,)

    void commit(const History& history) const {
        const int64_t first = history.steps + 2 - new_entries;
        for (int64_t i = 0; i < new_entries; ++i) {
            const int64_t entry = (first + i) & (history.entries - 1);
            std::memcpy(sums + entry * history.terms, new_sums + i * history.terms,
                size_t(history.terms) * sizeof(double));
        }
        const int64_t entry = (history.steps + 1) & (history.entries - 1);
        std::memcpy(products + entry * 6, new_products, 6 * sizeof(double));
        std::memcpy(clock, new_clock, kClock * sizeof(int64_t));
    }
};

struct Table {
    Rows rows;
    Keys keys;
    Scalars<double> scalars;
    bool exact = false;  // then also:
    Stamps stamps{};
    History history{};
    Recorded recorded{};

    int64_t pieces() const { return (keys.count() + rows.piece() - 1) / rows.piece(); }
    int64_t elements() const { return keys.count() * rows.length(); }
    void update(int64_t piece) const {
        rows.is_double() ? update_as<double>(piece) : update_as<float>(piece);
    }
    // Each row in its turn, so that none is ever more than the history goes back.
    void catch_up_in_turn() const {
        rows.is_double() ? catch_up_in_turn_as<double>() : catch_up_in_turn_as<float>();
    }

  private:
    template <class T>
    void update_as(int64_t piece) const {
        const int64_t start = piece * rows.piece();
        const RowScalars<T> of_rows(rows, scalars);
        each_row(rows, keys, start, start + rows.piece(), [&](int64_t i, int64_t end) {
            update_row<T>(rows, keys, i, end, of_rows);
            if (exact) stamps.set(keys.row(i), history.steps + 1);
        });
    }

    template <class T>
    void catch_up_in_turn_as() const {
        const int64_t cycle = history.entries / 2;
        const int64_t number = (rows.count + cycle - 1) / cycle;
        const int64_t turn = (history.steps - history.start) & (cycle - 1);
        const int64_t start = turn * number;
        const int64_t stop = std::min(start + number, rows.count);
        for (int64_t row = start; row < stop; ++row) {
            if (int32_t(stamps.gap(row, history.steps)) > 0) {  // else it has made the step
                catch_up<T>(rows, row, stamps, history, scalars.epsilon);
            }
        }
    }
};

struct Counter {
    char* place;
    Dtype dtype;

    double value() const {
        if (dtype == Dtype::kFloat32) return value_as<float>();
        if (dtype == Dtype::kFloat64) return value_as<double>();
        return double(value_as<int64_t>());
    }
    void advance() const {
        if (dtype == Dtype::kFloat32) advance_as<float>();
        else if (dtype == Dtype::kFloat64) advance_as<double>();
        else advance_as<int64_t>();
    }

  private:
    template <class T>
    T value_as() const {
        T value;
        std::memcpy(&value, place, sizeof value);
        return value;
    }
    template <class T>
    void advance_as() const {
        const T value = value_as<T>() + 1;
        std::memcpy(place, &value, sizeof value);
    }
};

struct Step {
    std::vector<Parameter> parameters;
    std::vector<Table> tables;
    std::vector<Counter> counters;
    std::vector<Gradient> gradients;  // of all, parameters first, if they are to be clipped
    double clipnorm = std::numeric_limits<double>::infinity();
    double global_clipnorm = std::numeric_limits<double>::infinity();
    int threads = 1;
    bool in_turn = false;  // some share memory, and are updated one after the other

    // Nothing can fail here. Throws std::bad_alloc before anything is written.
    void run();

    bool clips() const { return std::isfinite(clipnorm) || std::isfinite(global_clipnorm); }

  private:
    void clip();
    void update(size_t first, size_t last, size_t first_table, size_t last_table);
};

}  // namespace adamax
