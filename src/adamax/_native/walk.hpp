// Walking the elements of several views of one shape at once, in any layout.
#pragma once

#include <algorithm>
#include <vector>

#include "view.hpp"

namespace adamax {

constexpr int kOperands = 4;  // w, m, u and g
using Places = char* [kOperands];

struct Operand {
    char* data;
    Dtype dtype;
    bool swapped;

    static Operand of(const View& view) { return {view.data, view.dtype, view.swapped}; }
};

// The elements of four views: `outer` runs of `inner` elements each. Contiguous views, and
// those whose dimensions have been exchanged alike, are a single run.
class Walk {
  public:
    int64_t inner = 1;
    int64_t outer = 1;
    int64_t step[kOperands] = {};  // from element to element of a run, in bytes

    // Of the dimensions from one on, where the views have the same shape. Elements come in
    // the order in which they lie in the memory of the first view; `offset` gets where the
    // first one is, in bytes, since strides may be negative.
    void build(const View* const views[kOperands], int from, int64_t offset[kOperands]) {
        build(views, from, offset, true);
    }

    // Of one view, in the order of its indices.
    void build_in_order(const View& view, int from) {
        const View* const views[kOperands] = {&view, &view, &view, &view};
        int64_t none[kOperands] = {};
        build(views, from, none, false);
    }

    // Of contiguous views, without looking at their dimensions.
    void build_flat(const View* const views[kOperands], int64_t length) {
        inner = length;
        for (int k = 0; k < kOperands; ++k) step[k] = itemsize(views[k]->dtype);
    }

    int64_t length() const { return inner * outer; }

    // Calls `function(places, first, count)` for the parts of runs that make up the
    // elements from `start` to before `stop`; `first` is the number of the element at
    // `places`.
    template <class Function>
    void each_run(const char* const base[kOperands], int64_t start, int64_t stop,
        const Function& function) const {
        while (start < stop) {
            const int64_t run = outer == 1 ? 0 : start / inner;
            const int64_t skipped = start - run * inner;
            const int64_t count = std::min(inner - skipped, stop - start);
            Places places;
            for (int k = 0; k < kOperands; ++k) {
                places[k] = const_cast<char*>(base[k]) + skipped * step[k];
            }
            int64_t rest = run;
            for (size_t i = dims_.size(); i-- > 0;) {
                const int64_t index = rest % dims_[i].size;
                rest /= dims_[i].size;
                for (int k = 0; k < kOperands; ++k) places[k] += index * dims_[i].step[k];
            }
            function(places, start, count);
            start += count;
        }
    }

  private:
    struct Dim {
        int64_t size;
        int64_t step[kOperands];
    };

    void build(const View* const views[kOperands], int from, int64_t offset[kOperands],
        bool sorted) {
        std::vector<Dim> dims;
        const View& first = *views[0];
        for (int i = from; i < first.ndim; ++i) {
            if (first.shape[i] == 1) continue;
            Dim dim{first.shape[i], {}};
            for (int k = 0; k < kOperands; ++k) {
                dim.step[k] = views[k]->strides[i] * views[k]->unit;
            }
            if (sorted && dim.step[0] < 0) {
                for (int k = 0; k < kOperands; ++k) {
                    offset[k] += (dim.size - 1) * dim.step[k];
                    dim.step[k] = -dim.step[k];
                }
            }
            dims.push_back(dim);
        }
        if (first.complex) {
            Dim parts{2, {}};
            for (int k = 0; k < kOperands; ++k) parts.step[k] = itemsize(views[k]->dtype);
            dims.push_back(parts);
        }
        if (sorted) {
            std::stable_sort(dims.begin(), dims.end(),
                [](const Dim& a, const Dim& b) { return a.step[0] > b.step[0]; });
        }
        // From the fastest on, as long as a dimension goes on where the one inside it ends.
        for (size_t i = dims.size(); i-- > 1;) {
            Dim &dim = dims[i], &around = dims[i - 1];
            bool goes_on = true;
            for (int k = 0; k < kOperands; ++k) {
                goes_on = goes_on && around.step[k] == dim.step[k] * dim.size;
            }
            if (goes_on) {
                dim.size *= around.size;
                dims.erase(dims.begin() + i - 1);
            }
        }
        if (!dims.empty()) {
            inner = dims.back().size;
            std::copy(dims.back().step, dims.back().step + kOperands, step);
            dims.pop_back();
        } else {
            for (int k = 0; k < kOperands; ++k) step[k] = itemsize(views[k]->dtype);
        }
        for (const Dim& dim : dims) outer *= dim.size;
        dims_ = std::move(dims);
    }

    std::vector<Dim> dims_;  // around the runs, slowest first
};

}  // namespace adamax
