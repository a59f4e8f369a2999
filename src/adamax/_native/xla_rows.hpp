// The operands of a call as what the loops work on.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>

#include "step.hpp"
#include "xla_call.hpp"

namespace adamax::xla {

// Of w, m, u and the gradient, or what stands for them.
using FourViews = std::array<const View*, kOperands>;

// Calls `function(kind)` with a zero of the type that arithmetic on this dtype is done in.
template <class Function>
void dispatch(Dtype dtype, const Function& function) {
    dtype == Dtype::kFloat64 ? function(double()) : function(float());
}

// Has the operands of the rule lie where views are, with runs of `length` elements.
template <class Rule>
void place(Rule* rule, const FourViews& views, int64_t length) {
    rule->walk.inner = length;
    for (size_t k = 0; k < kOperands; ++k) {
        rule->operands[k] = Operand::of(*views[k]);
        rule->base[k] = views[k]->data;
        rule->walk.step[k] = itemsize(views[k]->dtype);
    }
}

inline Scalars<double> scalars_of(const Call& call, size_t i) {
    const Dtype dtype = arithmetic_of(call[0].dtype);
    constexpr double kNone = std::numeric_limits<double>::infinity();
    Scalars<double> scalars{};
    dispatch(dtype, [&](auto kind) {
        const auto* s = call.numbers<decltype(kind)>(i, dtype, {5});
        scalars = {s[0], s[1], 1, 0, s[2], s[3], s[4], kNone};
    });
    return scalars;
}

// The arguments 0 to 2 must be a parameter and its state, the argument 3 a gradient or not.
inline void check_state(const Call& call, size_t gradient = 3) {
    require(is_float(call[0].dtype) && is_float(call[gradient].dtype));
    for (size_t k = 1; k < 3; ++k) {
        require(
            call[k].dtype == arithmetic_of(call[0].dtype) && same_shape(call[k], call[0]));
    }
}

inline Rows rows_of(const FourViews& views) {
    const View &w = *views[0], &values = *views[3];
    require(w.ndim > 0 && values.ndim == w.ndim &&
            std::equal(w.shape + 1, w.shape + w.ndim, values.shape + 1));
    Rows rows;
    place(&rows, views, w.length(1));
    rows.count = w.shape[0];
    for (int k = 0; k < kOperands; ++k) {
        rows.row_step[k] = rows.length() * rows.walk.step[k];
    }
    return rows;
}

// A table, its state, and the argument that has values of its rows.
inline Rows table_of(const Call& call, size_t values) {
    check_state(call, values);
    return rows_of({&call[0], &call[1], &call[2], &call[values]});
}

inline Keys keys_of(const Call& call, size_t i, int64_t rows, int64_t count) {
    call.numbers<int32_t>(i, Dtype::kInt32, {count});
    Keys keys;
    int64_t outside;
    keys.build(call[i], rows, &outside, Keys::Outside::kSkip);
    return keys;
}

// Calls `function(start, stop)` for pieces of [0, count), which are of rows.
template <class Function>
void in_pieces(const Call& call, const Rows& rows, int64_t count, int passes,
    const Function& function) {
    const int64_t piece_size = rows.piece();
    parallel_for(worth(call.threads(), passes * count * rows.length()),
        (count + piece_size - 1) / piece_size, [&](int64_t piece) {
            const int64_t start = piece * piece_size;
            function(start, std::min(start + piece_size, count));
        });
}

template <class Function>
void each_row_in_parallel(const Call& call, const Rows& rows, const Keys& keys, int passes,
    const Function& function) {
    in_pieces(call, rows, keys.count(), passes,
        [&](int64_t start, int64_t stop) { each_row(rows, keys, start, stop, function); });
}

}  // namespace adamax::xla
