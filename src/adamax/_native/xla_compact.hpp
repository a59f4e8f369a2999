// Handlers for compact state, and for parameters that are rounded by random bits.
//
// `scalars` are float32: those of the other handlers, and what rounding to float32 has left
// out of beta_2. `frame` has one element, or one for each row. `random` is two arguments:
// uint32 `(leaves, 15)`, and an int32 number of one of these leaves. Of each there are the
// two words of the seed, the lower first, whether parameters of bfloat16 are rounded by
// random bits, and twelve numbers for programs that do without handlers.
#pragma once

#include "xla_exact.hpp"

namespace adamax::xla {

inline Scalars<double> compact_scalars(const Call& call, size_t i) {
    const auto* s = call.numbers<float>(i, Dtype::kFloat32, {6});
    constexpr double kNone = std::numeric_limits<double>::infinity();
    return {s[0], s[1], 1, 0, s[2], double(s[3]) + double(s[5]), s[4], kNone};
}

inline Rounding rounding_of(const Call& call, size_t i) {
    require(call[i].ndim == 2);
    const int64_t leaves = call[i].shape[0];
    const auto* words = call.numbers<uint32_t>(i, Dtype::kUInt32, {leaves, 15});
    const int32_t leaf = *call.numbers<int32_t>(i + 1, Dtype::kInt32, {1});
    require(leaf >= 0 && leaf < leaves);
    words += 15 * int64_t(leaf);
    Rounding rounding;
    rounding.seed = uint64_t(words[1]) << 32 | words[0];
    rounding.stochastic = words[2] != 0;
    return rounding;
}

// As check_state(), of a parameter whose arithmetic is float32.
inline void check_compact_state(const Call& call, Dtype m, Dtype u, size_t gradient) {
    require(is_float(call[0].dtype) && call[0].dtype != Dtype::kFloat64 &&
            is_float(call[gradient].dtype) && call[1].dtype == m && call[2].dtype == u &&
            same_shape(call[1], call[0]) && same_shape(call[2], call[0]));
}

inline void check_8bit_state(const Call& call, size_t gradient) {
    check_compact_state(call, Dtype::kInt8, Dtype::kUInt8, gradient);
}

inline void check_rounded_state(const Call& call, size_t gradient) {
    const Dtype dtype = call[1].dtype;
    require(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16);
    check_compact_state(call, dtype, dtype, gradient);
}

// A table with its state, and the argument that has values of its rows.
inline Rows rounded_table(const Call& call, size_t values, size_t random) {
    check_rounded_state(call, values);
    Rows rows = rows_of({&call[0], &call[1], &call[2], &call[values]});
    rows.rounding = rounding_of(call, random);
    return rows;
}

// The same with a frame for each row, which are the argument `frame`.
inline Rows table_8bit(const Call& call, size_t frame, size_t values, size_t random) {
    check_8bit_state(call, values);
    Rows rows = rows_of({&call[0], &call[1], &call[2], &call[values]});
    rows.rounding = rounding_of(call, random);
    rows.frames = call.numbers<float>(frame, Dtype::kFloat32, {rows.count});
    return rows;
}

inline void run_dense(const Call& call, size_t gradient, float* frame) {
    require(same_shape(call[gradient], call[0]));
    Step step;
    step.parameters.emplace_back();
    Parameter& parameter = step.parameters[0];
    place(&parameter, {&call[0], &call[1], &call[2], &call[gradient]}, call[0].length());
    parameter.scalars = compact_scalars(call, gradient + 1);
    parameter.rounding = rounding_of(call, gradient + 2);
    parameter.frame = frame;
    if (frame) {
        parameter.rounding.frame =
            Frame::shifted(*frame, Frame::shift_of(parameter.scalars.beta_2));
    }
    step.threads = call.threads();
    step.run();
}

inline void rounded_dense(const Call& call) {
    check_rounded_state(call, 3);
    run_dense(call, 3, nullptr);
}

// A gradient of all rows, each of which has a frame.
inline void dense_of_rows(const Call& call) {
    require(same_shape(call[4], call[0]));
    const Rows rows = table_8bit(call, 3, 4, 6);
    const RowScalars<float> scalars(rows, compact_scalars(call, 5));
    const Operand& g = rows.operands[3];
    const int64_t length = rows.length(), step = rows.walk.step[3];
    in_pieces(call, rows, rows.count, 1, [&](int64_t start, int64_t stop) {
        for (int64_t row = start; row < stop;) {
            // As many as have the same frame.
            int64_t end = row + 1;
            while (end < stop && rows.frames[end] == rows.frames[row]) ++end;
            const Rounding rounding = rows.rounding_of(row, scalars.shift);
            Places places;
            for (int k = 0; k < kOperands; ++k) {
                places[k] = const_cast<char*>(rows.base[k]) + row * rows.row_step[k];
            }
            const bool direct = is_direct<float>(g, places[3], step);
            update_elements<float>(rows.operands, places, rows.walk.step, row * length,
                (end - row) * length, scalars.rounded, rounding,
                direct ? reinterpret_cast<const float*>(places[3]) : nullptr,
                [&](int64_t first, int64_t count, float* numbers) {
                    load(g, places[3] + first * step, step, count, numbers);
                });
            for (; row < end; ++row) rows.advance(row, rounding);
        }
    });
}

inline void dense_8bit(const Call& call) {
    check_8bit_state(call, 4);
    require(call[3].ndim == 1);
    if (call[3].shape[0] == 1) {
        run_dense(call, 4, call.numbers<float>(3, Dtype::kFloat32, {1}));
    } else {
        dense_of_rows(call);
    }
}

// `values` is the number of the argument that has them.
inline Keys keys_of_values(const Call& call, const Rows& rows, size_t values) {
    return keys_of(call, values - 1, rows.count, call[values].shape[0]);
}

inline void run_rows(const Call& call, const Rows& rows, size_t values) {
    const Keys keys = keys_of_values(call, rows, values);
    const RowScalars<float> scalars(rows, compact_scalars(call, values + 1));
    each_row_in_parallel(call, rows, keys, 2,
        [&](int64_t i, int64_t end) { update_row(rows, keys, i, end, scalars); });
}

inline void rounded_rows(const Call& call) { run_rows(call, rounded_table(call, 4, 6), 4); }

inline void rows_8bit(const Call& call) { run_rows(call, table_8bit(call, 3, 5, 7), 5); }

// --- Exact updates -----------------------------------------------------------------------

inline void exact_step_compact(const Call& call, const Rows& rows, size_t values) {
    const Keys keys = keys_of_values(call, rows, values);
    run_exact_step(call, rows, keys, compact_scalars(call, values + 1), values + 4);
}

inline void exact_rounded_step(const Call& call) {
    exact_step_compact(call, rounded_table(call, 5, 7), 5);
}

inline void exact_8bit_step(const Call& call) {
    exact_step_compact(call, table_8bit(call, 4, 6, 8), 6);
}

inline void exact_rounded_flush(const Call& call) {
    run_exact_flush(call, rounded_table(call, 0, 4), 6);
}

inline void exact_8bit_flush(const Call& call) {
    run_exact_flush(call, table_8bit(call, 4, 0, 5), 7);
}

inline void exact_rounded_lookup(const Call& call) {
    check_rounded_state(call, 0);
    Rows rows = looked_up_table(call);
    rows.rounding = rounding_of(call, 5);
    run_exact_lookup(call, rows, 4, 7);
}

inline void exact_8bit_lookup(const Call& call) {
    check_8bit_state(call, 0);
    Rows rows = looked_up_table(call);
    rows.rounding = rounding_of(call, 6);
    rows.frames = call.numbers<float>(4, Dtype::kFloat32, {rows.count});
    run_exact_lookup(call, rows, 5, 8);
}

}  // namespace adamax::xla
