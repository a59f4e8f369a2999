#include "plan_items.hpp"

#include <algorithm>
#include <optional>

namespace adamax {
namespace {

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
    return add_frames(frames);
}

// `frames` is None, or has a frame or None for each parameter.
bool Plan::add_frames(PyObject* frames) {
    std::vector<PyObject*> each(of_parameters_.size(), Py_None);
    std::optional<Sequence> items;
    if (frames != Py_None) {
        items.emplace(frames);
        if (!*items) return false;
        if (size_t(items->size()) != each.size()) {
            return error(PyExc_ValueError, "frames must have the length of w");
        }
        std::copy_n(items->items(), each.size(), each.begin());
    }
    for (size_t i = 0; i < each.size(); ++i) {
        where_ = int64_t(i);
        Parameter& parameter = step.parameters[i];
        if (!read_frames(each[i], of_parameters_[i], 1, &parameter.frame)) return false;
        if (!parameter.frame) continue;
        parameter.rounding.frame =
            Frame::shifted(*parameter.frame, Frame::shift_of(parameter.scalars.beta_2));
    }
    return true;
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

}  // namespace adamax
