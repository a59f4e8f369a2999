// The part of a plan that is about tables: rows, stamps and histories.

#include "plan_items.hpp"

namespace adamax {

void place(const Views& views, Rows* rows) {
    rows->count = views[0].shape[0];
    const View* each[kOperands];
    int64_t offset[kOperands] = {};
    for (int k = 0; k < kOperands; ++k) {
        each[k] = &views[k];
        rows->operands[k] = Operand::of(views[k]);
        rows->row_step[k] = views[k].strides[0] * views[k].unit;
    }
    rows->walk.build(each, 1, offset);
    for (int k = 0; k < kOperands; ++k) rows->base[k] = views[k].data + offset[k];
}

bool Plan::add_tables(PyObject* tables) {
    const Sequence items(tables);
    if (!items) return false;
    step.tables.reserve(size_t(items.size()));
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
        where_ = int64_t(of_parameters_.size()) + i;
        const Sequence table(items[i]);
        if (!table) return false;
        if (table.size() != 8) return error(PyExc_ValueError, "a table has 8 parts");
        if (!add_table(table.items())) return false;
    }
    return true;
}

// Items are w, m, u, indices, values, scalars, frames or None, and the parts of exact
// updates or None.
bool Plan::add_table(PyObject* const* items) {
    Views views;
    for (int k = 0; k < 3; ++k) {
        if (!read(items[k], k, &views[size_t(k)])) return false;
    }
    if (!read(items[4], 3, &views[3]) || !check_operands(views)) return false;
    const View &w = views[0], &values = views[3];
    if (w.ndim == 0) return unfit(0);
    bool fits = values.ndim == w.ndim && values.complex == w.complex;
    for (int i = 1; fits && i < w.ndim; ++i) fits = values.shape[i] == w.shape[i];
    if (!fits) return unfit(3);

    step.tables.emplace_back();
    Table& table = step.tables.back();
    if (!read_indices(items[3], w.shape[0], &table.keys)) return false;
    if (table.keys.count() != values.shape[0]) return unfit(3);
    View scalars;
    if (!read_numbers(items[5], Dtype::kFloat64, 1, &scalars)) return false;
    if (scalars.shape[0] != kScalars) return error(PyExc_ValueError, "scalars must be 10");
    const auto* numbers = reinterpret_cast<const double*>(scalars.data);
    table.scalars = scalars_at(numbers);
    table.rows.rounding = rounding_of(numbers[8], where_, numbers[9] != 0);
    if (!read_frames(items[6], views, w.shape[0], &table.rows.frames)) return false;
    of_tables_.push_back(views);
    if (items[7] == Py_None) return true;

    const Sequence exact(items[7]);
    if (!exact) return false;
    if (exact.size() != 7) return error(PyExc_ValueError, "exact updates have 7 parts");
    table.exact = true;
    return read_stamps(exact[0], w.shape[0], &table.stamps) &&
           read_history(items[7], 1, &table.history, &table.recorded) &&
           check_stamps(table.keys, table.stamps, table.history, true);
}

// Items are w, m, u, frames, stamps, history, epsilon, seed and stochastic.
bool Plan::read_table(PyObject* object, StaleTable* table) {
    const Sequence items(object);
    if (!items) return false;
    if (items.size() != 9) return error(PyExc_ValueError, "a stale table has 9 parts");
    table->epsilon = PyFloat_AsDouble(items[6]);
    const double seed = PyFloat_AsDouble(items[7]);
    const int stochastic = PyObject_IsTrue(items[8]);
    if (PyErr_Occurred()) return false;
    Views views;
    for (int k = 0; k < 3; ++k) {
        if (!read(items[k], k, &views[size_t(k)])) return false;
    }
    views[3] = views[0];
    if (!check_operands(views)) return false;
    if (views[0].ndim == 0) return unfit(0);
    Rows& rows = table->rows;
    place(views, &rows);
    rows.row_step[3] = 0;
    rows.rounding = rounding_of(seed, 0, stochastic);
    return read_frames(items[3], views, rows.count, &rows.frames) &&
           read_stamps(items[4], rows.count, &table->stamps) &&
           read_history(items[5], 0, &table->history, nullptr);
}

bool Plan::read_values(PyObject* object, View* view) {
    if (!read(object, 3, view)) return false;
    return (is_float(view->dtype) && view->ndim > 0) || unfit(3);
}

bool Plan::read_indices(PyObject* object, int64_t rows, Keys* keys) {
    constexpr int kIndices = 5;
    View view;
    if (!read(object, kIndices, &view)) return false;
    const bool integers = view.dtype == Dtype::kInt32 || view.dtype == Dtype::kInt64;
    if (!integers || view.ndim != 1) return unfit(kIndices);
    int64_t outside = 0;
    const int64_t position = keys->build(view, rows, &outside);
    if (position >= 0) problem = {"index", where_, position, outside};
    return position < 0;
}

bool Plan::read_stamps(PyObject* object, int64_t rows, Stamps* stamps) {
    View view;
    if (!read_numbers(object, Dtype::kUInt32, 1, &view)) return false;
    if (view.shape[0] != rows || !view.writeable) {
        problem = {"history", where_, -1, 0};
        return false;
    }
    stamps->of_row = reinterpret_cast<uint32_t*>(view.data);
    return true;
}

// `object` has sums, products and clock from `offset` on; where a step is recorded, their
// new values follow.
bool Plan::read_history(PyObject* object, int offset, History* to, Recorded* recorded) {
    const Sequence parts(object);
    if (!parts) return false;
    if (parts.size() != offset + (recorded ? 6 : 3)) {
        return error(PyExc_ValueError, "a history has other parts");
    }
    View sums, products, clock;
    if (!read_numbers(parts[offset], Dtype::kFloat64, 2, &sums) ||
        !read_numbers(parts[offset + 1], Dtype::kFloat64, 2, &products) ||
        !read_numbers(parts[offset + 2], Dtype::kInt64, 1, &clock)) {
        return false;
    }
    const int64_t entries = sums.shape[0], terms = sums.shape[1];
    const auto* numbers = reinterpret_cast<const int64_t*>(clock.data);
    if (entries < 2 || (entries & (entries - 1)) || terms < 1 || terms > kMostTerms ||
        terms % 4 != 1 || products.shape[0] != entries || products.shape[1] != 6 ||
        clock.shape[0] != kClock || numbers[1] < 1 || numbers[1] > entries / 2 ||
        numbers[2] < 0 || numbers[0] < numbers[2]) {
        return error(PyExc_ValueError, "a history has other shapes");
    }
    *to = {reinterpret_cast<const double*>(sums.data),
        reinterpret_cast<const double*>(products.data), entries, terms, numbers[0],
        numbers[1], numbers[2], {numbers[3], numbers[4], numbers[5]}};
    if (!recorded) return true;

    View new_sums, new_products, new_clock;
    if (!read_numbers(parts[offset + 3], Dtype::kFloat64, 2, &new_sums) ||
        !read_numbers(parts[offset + 4], Dtype::kFloat64, 1, &new_products) ||
        !read_numbers(parts[offset + 5], Dtype::kInt64, 1, &new_clock)) {
        return false;
    }
    const auto* after = reinterpret_cast<const int64_t*>(new_clock.data);
    if (new_sums.shape[1] != terms || new_sums.shape[0] < 1 ||
        new_sums.shape[0] > std::min(entries, to->steps + 2) ||
        new_products.shape[0] != 6 || new_clock.shape[0] != kClock ||
        after[0] != to->steps + 1 || after[1] > entries / 2 || !sums.writeable ||
        !products.writeable || !clock.writeable) {
        return error(PyExc_ValueError, "a recorded step has other shapes");
    }
    *recorded = {reinterpret_cast<double*>(sums.data),
        reinterpret_cast<double*>(products.data), reinterpret_cast<int64_t*>(clock.data),
        reinterpret_cast<const double*>(new_sums.data), new_sums.shape[0],
        reinterpret_cast<const double*>(new_products.data), after};
    return true;
}

bool Plan::check_stamps(
    const Keys& keys, const Stamps& stamps, const History& history, bool current) {
    const int64_t longest = history.longest();
    for (int64_t i = 0; i < keys.count(); ++i) {
        if (i + kPrefetchStamps < keys.count()) {
            stamps.prefetch_row(keys.row(i + kPrefetchStamps));
        }
        const int64_t gap = stamps.gap(keys.row(i), history.steps);
        if (gap == 0) continue;
        problem = {gap > longest ? "history" : "stale", where_, keys.row(i), 0};
        if (current || gap > longest) return false;
        problem = {};
    }
    return true;
}

}  // namespace adamax
