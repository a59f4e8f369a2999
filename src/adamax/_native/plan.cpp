#include "plan.hpp"

#include <algorithm>

namespace adamax {
namespace {

constexpr int kScalars = 10;

// A list or tuple, whose items may not change while this exists.
class Sequence {
  public:
    explicit Sequence(PyObject* object)
        : tuple_(object ? PySequence_Tuple(object) : nullptr) {}
    ~Sequence() { Py_XDECREF(tuple_); }
    Sequence(const Sequence&) = delete;
    Sequence& operator=(const Sequence&) = delete;

    explicit operator bool() const { return tuple_ != nullptr; }
    Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_); }
    PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }
    PyObject* const* items() const { return &PyTuple_GET_ITEM(tuple_, 0); }

  private:
    PyObject* tuple_;
};

bool error(PyObject* kind, const char* message) {
    PyErr_SetString(kind, message);
    return false;
}

Scalars<double> scalars_at(const double* s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
}

Rounding rounding_of(double step, int64_t where, bool stochastic) {
    const uint64_t seed = step >= 0 && step < 0x1p53 ? uint64_t(step) : 0;
    return {seed + uint64_t(where) * 0x9E3779B97F4A7C15u, stochastic, {}};
}

// Of m or u, of numbers that the arithmetic is done in.
bool is_state(Dtype dtype, int operand, Dtype arithmetic) {
    if (dtype == arithmetic) return true;
    return arithmetic == Dtype::kFloat32 &&
           (dtype == Dtype::kBFloat16 ||
               dtype == (operand == 1 ? Dtype::kInt8 : Dtype::kUInt8));
}

void place(const Views& views, Parameter* parameter) {
    const View* each[kOperands];
    bool flat = true;
    for (int k = 0; k < kOperands; ++k) {
        each[k] = &views[k];
        flat = flat && views[k].is_contiguous();
        parameter->operands[k] = Operand::of(views[k]);
    }
    int64_t offset[kOperands] = {};
    if (flat) {
        parameter->walk.build_flat(each, views[0].length());
    } else {
        parameter->walk.build(each, 0, offset);
    }
    for (int k = 0; k < kOperands; ++k) parameter->base[k] = views[k].data + offset[k];
}

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

struct Range {
    uintptr_t begin, end;

    static Range of(const View& view) {
        Range range;
        view.bounds(&range.begin, &range.end);
        return range;
    }
    bool operator<(const Range& other) const { return begin < other.begin; }
};

}  // namespace

bool Plan::unfit(int operand) {
    problem = {"unfit", where_, operand, 0};
    return false;
}

bool Plan::read(PyObject* object, int operand, View* view) {
    // A negated counter is seen by its value, since no count is negative.
    switch (reader_.read(object, view, operand != kOperands)) {
        case Reader::Result::kRead: return true;
        case Reader::Result::kUnfit: return unfit(operand);
        default: return false;
    }
}

bool Plan::read_numbers(PyObject* object, Dtype dtype, int ndim, View* view) {
    if (reader_.read(object, view) == Reader::Result::kError) return false;
    if (view->dtype == dtype && view->ndim == ndim && view->is_contiguous() &&
        view->is_aligned() && !view->swapped && !view->complex) {
        return true;
    }
    return error(PyExc_TypeError, "expected a contiguous array of another dtype or rank");
}

bool Plan::check_operands(const Views& views) {
    const View& w = views[0];
    for (int k = 0; k < kOperands; ++k) {
        const View& view = views[k];
        const bool of_state = k == 1 || k == 2;
        if (of_state ? !is_state(view.dtype, k, arithmetic_of(w.dtype))
                     : !is_float(view.dtype)) {
            return unfit(k);
        }
        if (k == 2 && itemsize(view.dtype) != itemsize(views[1].dtype)) return unfit(k);
        if (k == 3) break;  // whose shape is compared by the caller
        if (!view.writeable || !same_shape(view, w)) return unfit(k);
        if (!view.is_contiguous() && view.may_overlap_itself()) return unfit(k);
        if (k > 0 && view.data == w.data && w.length() > 0) return unfit(k);
    }
    return views[1].data != views[2].data || w.length() == 0 || unfit(2);
}

bool Plan::read_frames(
    PyObject* object, const Views& views, int64_t count, float** frames) {
    constexpr int kFrame = 6;
    const bool needed = views[1].dtype == Dtype::kInt8;
    *frames = nullptr;
    if (object == Py_None) return !needed || unfit(kFrame);
    View view;
    if (!read(object, kFrame, &view)) return false;
    if (!needed || view.dtype != Dtype::kFloat32 || view.ndim != 1 || view.complex ||
        view.swapped || !view.writeable || view.shape[0] != count ||
        !view.is_contiguous() || !view.is_aligned()) {
        return unfit(kFrame);
    }
    *frames = reinterpret_cast<float*>(view.data);
    return true;
}

bool Plan::read_column(PyObject* column, int operand, std::vector<Views>* views) {
    const Sequence items(column);
    if (!items) return false;
    if (operand == 0) views->resize(size_t(items.size()));
    if (size_t(items.size()) != views->size()) {
        return error(PyExc_ValueError, "w, m, u and g must have the same length");
    }
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
        where_ = i;
        if (!read(items[i], operand, &(*views)[size_t(i)][size_t(operand)])) return false;
    }
    return true;
}

bool Plan::add_parameters(
    PyObject* const columns[kOperands], PyObject* scalars, PyObject* frames) {
    // Column by column: what is next to each other is of one type.
    for (int k = 0; k < kOperands; ++k) {
        if (!read_column(columns[k], k, &of_parameters_)) return false;
    }
    for (size_t i = 0; i < of_parameters_.size(); ++i) {
        where_ = int64_t(i);
        if (!check_operands(of_parameters_[i])) return false;
        if (!same_shape(of_parameters_[i][3], of_parameters_[i][0])) return unfit(3);
    }
    const size_t count = of_parameters_.size();
    step.parameters.resize(count);
    View view;
    if (!read_numbers(scalars, Dtype::kFloat64, 2, &view)) return false;
    if (view.shape[1] != kScalars ||
        (view.shape[0] != 1 && size_t(view.shape[0]) != count)) {
        return error(PyExc_ValueError, "scalars must have the shape (n, 10) or (1, 10)");
    }
    const auto* numbers = reinterpret_cast<const double*>(view.data);
    for (size_t i = 0; i < count; ++i) {
        const double* row = numbers + (view.shape[0] == 1 ? 0 : i) * kScalars;
        step.parameters[i].scalars = scalars_at(row);
        step.parameters[i].rounding = rounding_of(row[8], int64_t(i), row[9] != 0);
    }
    if (frames == Py_None) {
        for (size_t i = 0; i < count; ++i) {
            where_ = int64_t(i);
            float* none;
            if (!read_frames(Py_None, of_parameters_[i], 1, &none)) return false;
        }
        return true;
    }
    const Sequence of_frames(frames);
    if (!of_frames) return false;
    if (size_t(of_frames.size()) != count) {
        return error(PyExc_ValueError, "frames must have the length of w");
    }
    for (size_t i = 0; i < count; ++i) {
        where_ = int64_t(i);
        Parameter& parameter = step.parameters[i];
        if (!read_frames(
                of_frames[Py_ssize_t(i)], of_parameters_[i], 1, &parameter.frame)) {
            return false;
        }
        if (parameter.frame) {
            parameter.rounding.frame =
                Frame::after_decay(*parameter.frame, parameter.scalars.beta_2);
        }
    }
    return true;
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

bool Plan::add_counters(PyObject* counters) {
    const Sequence items(counters);
    if (!items) return false;
    step.counters.reserve(size_t(items.size()));
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
        View view;
        where_ = i;
        if (!read(items[i], kOperands, &view)) return false;
        const bool known = view.dtype == Dtype::kFloat32 || view.dtype == Dtype::kFloat64 ||
                           view.dtype == Dtype::kInt64;
        if (!known || view.length() != 1 || view.complex || view.swapped ||
            !view.writeable) {
            return unfit(kOperands);
        }
        step.counters.push_back({view.data, view.dtype});
    }
    return true;
}

bool Plan::finish() {
    std::vector<Range> written;
    written.reserve(3 * (of_parameters_.size() + of_tables_.size()));
    for (const auto* views : {&of_parameters_, &of_tables_}) {
        for (const Views& each : *views) {
            for (size_t k = 0; k < 3; ++k) {
                const Range range = Range::of(each[k]);
                if (range.begin != range.end) written.push_back(range);
            }
        }
    }
    std::sort(written.begin(), written.end());
    uintptr_t reach = 0;
    for (Range& range : written) {
        step.in_turn = step.in_turn || range.begin < reach;
        reach = std::max(reach, range.end);
        range.end = reach;  // so that ends ascend, too
    }
    for (auto* views : {&of_parameters_, &of_tables_}) {
        for (Views& each : *views) {
            const Range range = Range::of(each[3]);
            // The first that ends behind the start.
            const auto next = std::upper_bound(written.begin(), written.end(), range.begin,
                [](uintptr_t begin, const Range& other) { return begin < other.end; });
            if (next != written.end() && next->begin < range.end) copy(&each[3]);
        }
    }
    for (size_t i = 0; i < of_parameters_.size(); ++i) {
        place(of_parameters_[i], &step.parameters[i]);
    }
    for (size_t i = 0; i < of_tables_.size(); ++i) {
        place(of_tables_[i], &step.tables[i].rows);
    }
    if (step.clips()) {
        for (const Views& each : of_parameters_) step.gradients.emplace_back(each[3]);
        for (size_t i = 0; i < of_tables_.size(); ++i) {
            step.gradients.emplace_back(of_tables_[i][3], &step.tables[i].keys);
        }
    }
    return true;
}

// Makes a view one of a contiguous copy.
void Plan::copy(View* view) {
    const int64_t size = view->element_size(),
                  count = view->length() / (view->complex ? 2 : 1);
    copies_.emplace_back(size_t(count * size));
    strides_.emplace_back(size_t(view->ndim));
    std::vector<int64_t>& strides = strides_.back();
    int64_t stride = size;
    for (int i = view->ndim; i-- > 0;) {
        strides[size_t(i)] = stride;
        stride *= view->shape[i];
    }
    char* to = copies_.back().data();
    for (int64_t element = 0; element < count; ++element, to += size) {
        const char* from = view->data;
        int64_t rest = element;
        for (int i = view->ndim; i-- > 0;) {
            from += rest % view->shape[i] * view->strides[i] * view->unit;
            rest /= view->shape[i];
        }
        std::memcpy(to, from, size_t(size));
    }
    view->data = copies_.back().data();
    view->strides = strides.data();
    view->unit = 1;
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
