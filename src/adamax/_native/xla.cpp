// The verbs as handlers of XLA, on the buffers of programs of JAX.
//
// XLA calls a handler from a thread of its own, which knows nothing of Python. Arrays are
// contiguous and do not overlap, and indices outside a table are of no row. A program may
// have been saved by another version of this package: what a handler takes and does never
// changes, and another one gets another name. Results are in the place of arguments, but
// for those "of its own".
//
//   adamax_dense         w, m, u, g, scalars -> w, m, u
//   adamax_rows          w, m, u, indices, values, scalars -> w, m, u
//   adamax_rounded_dense w, m, u, g, scalars, random -> w, m, u
//   adamax_rounded_rows  w, m, u, indices, values, scalars, random -> w, m, u
//   adamax_8bit_dense    w, m, u, frame, g, scalars, random -> w, m, u, frame
//   adamax_8bit_rows     w, m, u, frame, indices, values, scalars, random
//                        -> w, m, u, frame
//   adamax_exact_step    w, m, u, stamps, indices, values, scalars, history
//                        -> w, m, u, stamps; also brings the rows in turn to the step
//                        before
//   adamax_exact_flush   w, m, u, stamps, history -> w, m, u, stamps
//   adamax_exact_lookup  w, m, u, stamps, indices, history -> rows, of its own
//   adamax_exact_rounded_step    w, m, u, stamps, indices, values, scalars, random, history
//                                -> w, m, u, stamps
//   adamax_exact_rounded_flush   w, m, u, stamps, random, history -> w, m, u, stamps
//   adamax_exact_rounded_lookup  w, m, u, stamps, indices, random, history
//                                -> rows, of its own
//   adamax_exact_8bit_step       w, m, u, stamps, frame, indices, values, scalars, random,
//                                history -> w, m, u, stamps, frame
//   adamax_exact_8bit_flush      w, m, u, stamps, frame, random, history
//                                -> w, m, u, stamps, frame
//   adamax_exact_8bit_lookup     w, m, u, stamps, frame, indices, random, history
//                                -> rows, of its own
//   adamax_sum           indices, values, number of rows -> indices, sums, of its own:
//                        distinct rows, ascending, and the sum of each; what is left over
//                        has zeros, and indices of no row
//   adamax_put           array, indices, rows -> array
//   adamax_8bit_put      the same for arrays of the codes of state
//   adamax_add           array, indices, values -> array
//
// `scalars` are of the state's dtype: the step size, the decay factor, 1 - beta_1, beta_2
// and epsilon. `history`: see StateHistory. Indices and stamps are int32. For `frame`,
// `random` and the `scalars` beside it see xla_compact.hpp.

#include "xla_rows.hpp"

#include "xla_compact.hpp"
#include "xla_exact.hpp"

namespace adamax::xla {
namespace {

void dense(const Call& call) {
    check_state(call);
    require(same_shape(call[3], call[0]));
    Step step;
    step.parameters.emplace_back();
    place(&step.parameters[0], {&call[0], &call[1], &call[2], &call[3]}, call[0].length());
    step.parameters[0].scalars = scalars_of(call, 4);
    step.threads = call.threads();
    step.run();
}

void rows(const Call& call) {
    const Rows rows = table_of(call, 4);
    const Keys keys = keys_of(call, 3, rows.count, call[4].shape[0]);
    dispatch(call[0].dtype, [&](auto kind) {
        const RowScalars<decltype(kind)> scalars(rows, scalars_of(call, 5));
        each_row_in_parallel(call, rows, keys, 2,
            [&](int64_t i, int64_t end) { update_row(rows, keys, i, end, scalars); });
    });
}

// What the values at the keys [i, end) have from element `first` on, added up.
template <class T>
void sum_row(const Rows& rows, const Keys& keys, int64_t i, int64_t end, int64_t first,
    int64_t count, T* sums) {
    const int64_t step = rows.walk.step[3];
    if (end == i + 1) {
        const char* const value = rows.value(keys.position(i)) + first * step;
        load(rows.operands[3], value, step, count, sums);
        return;
    }
    double wide[kBlock];
    sum_values(rows, keys, i, end, first * step, count, wide);
    std::copy(wide, wide + count, sums);
}

void sum(const Call& call) {
    const View &values = call[1], &indices = call.result(0), &sums = call.result(1);
    Rows rows = rows_of({&values, &values, &values, &values});
    rows.count = *call.numbers<int32_t>(2, Dtype::kInt32, {1});
    const int64_t given = values.shape[0], length = rows.length();
    require(is_float(values.dtype) && same_shape(sums, values) &&
            sums.dtype == arithmetic_of(values.dtype) && same_shape(indices, call[0]) &&
            indices.dtype == Dtype::kInt32);
    const Keys keys = keys_of(call, 0, rows.count, given);
    std::vector<int64_t> starts;  // of the keys of each row
    starts.reserve(size_t(keys.count()));
    for (int64_t i = 0; i < keys.count(); i = keys.end_of_row(i)) starts.push_back(i);
    const auto distinct = int64_t(starts.size());
    auto* const of_sums = reinterpret_cast<int32_t*>(indices.data);
    dispatch(sums.dtype, [&](auto kind) {
        auto* const to = reinterpret_cast<decltype(kind)*>(sums.data);
        in_pieces(call, rows, distinct, 1, [&](int64_t begin, int64_t stop) {
            for (int64_t n = begin; n < stop; ++n) {
                const int64_t start = starts[size_t(n)], end = keys.end_of_row(start);
                of_sums[n] = int32_t(keys.row(start));
                for (int64_t first = 0; first < length; first += kBlock) {
                    const int64_t count = std::min(kBlock, length - first);
                    sum_row(rows, keys, start, end, first, count, to + n * length + first);
                }
            }
        });
        std::fill(to + distinct * length, to + given * length, decltype(kind)(0));
    });
    for (int64_t n = distinct; n < given; ++n) of_sums[n] = int32_t(rows.count + n);
}

// Calls `change(place, i, end)` for each row of the array that has keys.
template <class Change>
void change_rows(
    const Call& call, const Rows& rows, const Keys& keys, const Change& change) {
    each_row_in_parallel(call, rows, keys, 1, [&](int64_t i, int64_t end) {
        change(call[0].data + keys.row(i) * rows.row_step[0], i, end);
    });
}

void put(const Call& call) {
    const Rows rows = rows_of({&call[0], &call[0], &call[0], &call[2]});
    require(call[2].dtype == call[0].dtype);
    const Keys keys = keys_of(call, 1, rows.count, call[2].shape[0]);
    change_rows(call, rows, keys, [&](char* place, int64_t, int64_t end) {
        std::memcpy(place, rows.value(keys.position(end - 1)), size_t(rows.row_step[0]));
    });
}

void add(const Call& call) {
    const Rows rows = rows_of({&call[0], &call[0], &call[0], &call[2]});
    require(is_float(call[0].dtype) && is_float(call[2].dtype));
    const Keys keys = keys_of(call, 1, rows.count, call[2].shape[0]);
    dispatch(call[0].dtype, [&](auto kind) {
        change_rows(call, rows, keys, [&](char* place, int64_t i, int64_t end) {
            decltype(kind) sums[kBlock], numbers[kBlock];
            const int64_t step = rows.walk.step[0];
            for (int64_t first = 0; first < rows.length(); first += kBlock) {
                const int64_t count = std::min(kBlock, rows.length() - first);
                sum_row(rows, keys, i, end, first, count, sums);
                load(rows.operands[0], place + first * step, step, count, numbers);
                for (int64_t j = 0; j < count; ++j) numbers[j] += sums[j];
                store(numbers, count, rows.operands[0], place + first * step, step);
            }
        });
    });
}

constexpr struct {
    const char* name;
    Handler* handler;
} kHandlers[] = {
    {"adamax_dense", handle<dense, 5, 3, true>},
    {"adamax_rows", handle<rows, 6, 3, true>},
    {"adamax_rounded_dense", handle<rounded_dense, 7, 3, true>},
    {"adamax_rounded_rows", handle<rounded_rows, 8, 3, true>},
    {"adamax_8bit_dense", handle<dense_8bit, 8, 4, true>},
    {"adamax_8bit_rows", handle<rows_8bit, 9, 4, true>},
    {"adamax_exact_step", handle<exact_step, 13, 4, true>},
    {"adamax_exact_flush", handle<exact_flush, 10, 4, true>},
    {"adamax_exact_lookup", handle<exact_lookup, 11, 1, false>},
    {"adamax_exact_rounded_step", handle<exact_rounded_step, 15, 4, true>},
    {"adamax_exact_rounded_flush", handle<exact_rounded_flush, 12, 4, true>},
    {"adamax_exact_rounded_lookup", handle<exact_rounded_lookup, 13, 1, false>},
    {"adamax_exact_8bit_step", handle<exact_8bit_step, 16, 5, true>},
    {"adamax_exact_8bit_flush", handle<exact_8bit_flush, 13, 5, true>},
    {"adamax_exact_8bit_lookup", handle<exact_8bit_lookup, 14, 1, false>},
    {"adamax_sum", handle<sum, 3, 2, false>},
    {"adamax_put", handle<put, 3, 1, true>},
    {"adamax_8bit_put", handle<put, 3, 1, true>},
    {"adamax_add", handle<add, 3, 1, true>},
};

}  // namespace
}  // namespace adamax::xla

namespace adamax {

// A new dict of the handlers by name, as capsules.
PyObject* xla_handlers() {
    PyObject* handlers = PyDict_New();
    for (const auto& each : xla::kHandlers) {
        PyObject* capsule = handlers ? PyCapsule_New(reinterpret_cast<void*>(each.handler),
                                           "xla._CUSTOM_CALL_TARGET", nullptr)
                                     : nullptr;
        if (!capsule || PyDict_SetItemString(handlers, each.name, capsule) < 0) {
            Py_CLEAR(handlers);
        }
        Py_XDECREF(capsule);
    }
    return handlers;
}

}  // namespace adamax
