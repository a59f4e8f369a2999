// The verbs as handlers of XLA, on the buffers of programs of JAX.
//
// XLA calls a handler from a thread of its own, which knows nothing of Python. Arrays are
// contiguous and do not overlap, and indices outside a table are of no row. A program may
// have been saved by another version of this package: what a handler takes and does never
// changes, and another one gets another name. Results are in place of arguments, but for
// "of its own".
//
//   adamax_dense         w, m, u, g, scalars -> w, m, u
//   adamax_rows          w, m, u, indices, values, scalars -> w, m, u
//   adamax_exact_step    w, m, u, stamps, indices, values, scalars, history -> w, m, u,
//   stamps
//                        Also brings the rows whose turn it is to the step before.
//   adamax_exact_flush   w, m, u, stamps, history -> w, m, u, stamps
//   adamax_exact_lookup  w, m, u, stamps, indices, history -> rows, of its own
//                        Zeros for indices of no row.
//   adamax_sum           indices, values, rows of the table -> indices, sums, of their own
//                        Distinct rows, ascending, and the sum of each; what is left over
//                        has zeros, and indices of no row.
//   adamax_put           array, indices, rows -> array
//   adamax_add           array, indices, values -> array, rounded once for each row
//
// `scalars` are of the state's dtype: the step size, the decay factor, 1 - beta_1, beta_2
// and epsilon. `history`: see History below. Indices and stamps are int32.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "step.hpp"
#include "xla_call.hpp"

namespace adamax {
namespace {

using xla::Call;
using xla::require;

// Calls `function(kind)` with a zero of the type that arithmetic on this dtype is done in.
template <class Function>
void dispatch(Dtype dtype, const Function& function) {
    dtype == Dtype::kFloat64 ? function(double()) : function(float());
}

Scalars<double> read_scalars(const Call& call, size_t i) {
    const Dtype dtype = arithmetic_of(call[0].dtype);
    Scalars<double> scalars{};
    dispatch(dtype, [&](auto kind) {
        const auto* s = call.numbers<decltype(kind)>(i, dtype, {5});
        constexpr double kNone = std::numeric_limits<double>::infinity();
        scalars = {s[0], s[1], 1, 0, s[2], s[3], s[4], kNone};
    });
    return scalars;
}

// Has the operands of the rule lie where views are, with runs of `length` elements.
template <class Rule>
void place(Rule* rule, const View* const views[kOperands], int64_t length) {
    rule->walk.inner = length;
    for (int k = 0; k < kOperands; ++k) {
        require(is_float(views[k]->dtype), "adamax: an operand of another dtype");
        rule->operands[k] = Operand::of(*views[k]);
        rule->base[k] = views[k]->data;
        rule->walk.step[k] = itemsize(views[k]->dtype);
    }
}

// Arguments 0 to 2 are a parameter and its state.
void check_state(const Call& call) {
    for (size_t k = 1; k < 3; ++k) {
        require(
            call[k].dtype == arithmetic_of(call[0].dtype) && same_shape(call[k], call[0]),
            "adamax: state of another dtype or shape than its parameter's");
    }
}

Rows rows_of(const View& w, const View& m, const View& u, const View& values) {
    require(w.ndim > 0 && values.ndim == w.ndim &&
                std::equal(w.shape + 1, w.shape + w.ndim, values.shape + 1),
        "adamax: values of another shape than rows of the table");
    Rows rows;
    const View* const views[kOperands] = {&w, &m, &u, &values};
    place(&rows, views, w.length(1));
    rows.count = w.shape[0];
    for (int k = 0; k < kOperands; ++k)
        rows.row_step[k] = rows.length() * rows.walk.step[k];
    return rows;
}

Rows table_of(const Call& call, size_t values) {
    check_state(call);
    return rows_of(call[0], call[1], call[2], call[values]);
}

Keys keys_of(const Call& call, size_t i, int64_t rows, int64_t count) {
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

// --- The rule ----------------------------------------------------------------------------

void dense(const Call& call) {
    check_state(call);
    require(same_shape(call[3], call[0]), "adamax: a gradient of another shape");
    Step step;
    step.parameters.emplace_back();
    const View* const views[kOperands] = {&call[0], &call[1], &call[2], &call[3]};
    place(&step.parameters[0], views, call[0].length());
    step.parameters[0].scalars = read_scalars(call, 4);
    step.threads = call.threads();
    step.run();
}

void rows(const Call& call) {
    const Rows rows = table_of(call, 4);
    const Scalars<double> scalars = read_scalars(call, 5);
    const Keys keys = keys_of(call, 3, rows.count, call[4].shape[0]);
    dispatch(call[0].dtype, [&](auto kind) {
        in_pieces(call, rows, keys.count(), 2, [&](int64_t start, int64_t stop) {
            each_row(rows, keys, start, stop, [&](int64_t i, int64_t end) {
                update_row<decltype(kind)>(rows, keys, i, end, scalars);
            });
        });
    });
}

// --- Exact updates -----------------------------------------------------------------------

// The steps that rows have not taken, as jax/history.py keeps them: six arguments, in the
// dtype of the state where no other is given.
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
        const View &of_recent = call[first], &of_finals = call[first + 1];
        require(of_recent.ndim == 3 && of_finals.ndim == 2, "adamax: another history");
        window = of_recent.shape[1];
        terms = of_recent.shape[2];
        entries = of_finals.shape[0];
        require(window >= 1 && entries >= 2 * window && (entries & (entries - 1)) == 0 &&
                    terms <= kMostTerms && terms % 4 == 1,
            "adamax: a history of another length");
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
    Gap<T> gap(int64_t behind, double, T* of_gap) const {
        const bool is_final = behind > window;
        const T* sums = is_final
                            ? finals + (int64_t(steps - behind) & (entries - 1)) * terms
                            : recent + (behind - 1) * terms;
        const double later = is_final ? decayed(behind - window) : 1;
        for (int64_t n = 0; n < terms; ++n) of_gap[n] = T(sums[n] * later);
        double of_m = 1, of_u = 1;
        for (int64_t digit = 0, rest = behind; digit < 4; ++digit, rest /= 256) {
            of_m *= powers[digit * 256 + rest % 256];
            of_u *= powers[(4 + digit) * 256 + rest % 256];
        }
        return {T(decayed(behind)), T(of_m), T(of_u), T(epsilon), of_gap, terms};
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

// A table some of whose rows are stale. Its stamps are the argument 3.
template <class T>
struct ExactTable {
    const Rows& rows;
    const StateHistory<T> history;
    const Stamps stamps;

    ExactTable(const Call& call, const Rows& of_table, size_t of_history)
        : rows(of_table),
          history(call, of_history),
          stamps{call.numbers<uint32_t>(3, Dtype::kInt32, {rows.count})} {}

    bool is_known(int64_t row) const {
        return stamps.gap(row, history.now()) < history.entries;
    }
    void catch_up_row(int64_t row) const { catch_up<T>(rows, row, stamps, history, 0); }

    // `row(i)` is one of `count` rows, or negative.
    template <class RowOf>
    void check(int64_t count, const RowOf& row) const {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t ahead =
                i + kPrefetchStamps < count ? row(i + kPrefetchStamps) : -1;
            if (ahead >= 0) stamps.prefetch_row(ahead);
            if (row(i) >= 0) refuse_unless(is_known(row(i)));
        }
    }
    static void refuse_unless(bool known) {
        require(known,
            "adamax: stamps that do not belong to the history of their table: its "
            "state was changed while rows were stale");
    }
};

void exact_step(const Call& call) {
    const Rows rows = table_of(call, 5);
    const Scalars<double> scalars = read_scalars(call, 6);
    const Keys keys = keys_of(call, 4, rows.count, call[5].shape[0]);
    dispatch(call[0].dtype, [&](auto kind) {
        using T = decltype(kind);
        const ExactTable<T> table(call, rows, 7);
        const int64_t now = table.history.now(), cycle = table.history.entries / 2;
        const int64_t turn = (rows.count + cycle - 1) / cycle;
        const int64_t first = std::min((now & (cycle - 1)) * turn, rows.count);
        const int64_t last = std::min(first + turn, rows.count);
        table.check(keys.count(), [&](int64_t i) { return keys.row(i); });
        table.check(last - first, [&](int64_t i) { return first + i; });
        in_pieces(call, rows, keys.count(), 3, [&](int64_t start, int64_t stop) {
            each_row(rows, keys, start, stop, [&](int64_t i, int64_t end) {
                table.catch_up_row(keys.row(i));
                update_row<T>(rows, keys, i, end, scalars);
                table.stamps.set(keys.row(i), now + 1);
            });
        });
        for (int64_t row = first; row < last; ++row) {
            if (table.stamps.gap(row, now + 1) != 0) table.catch_up_row(row);
        }
    });
}

void exact_flush(const Call& call) {
    const Rows rows = table_of(call, 0);
    dispatch(call[0].dtype, [&](auto kind) {
        const ExactTable<decltype(kind)> table(call, rows, 4);
        std::atomic<bool> known{true};
        in_pieces(call, rows, rows.count, 1, [&](int64_t start, int64_t stop) {
            for (int64_t row = start; row < stop; ++row) {
                table.is_known(row) ? table.catch_up_row(row) : known.store(false);
            }
        });
        table.refuse_unless(known);
    });
}

// Copies a row to a place and brings the copy up to date.
template <class T>
void look_up(const ExactTable<T>& table, int64_t row, char* to) {
    const Rows& rows = table.rows;
    const int64_t* const step = rows.walk.step;
    const char* of_row[3];
    rows.place(row, of_row);
    std::memcpy(to, of_row[0], size_t(rows.row_step[0]));
    const int64_t behind = table.stamps.gap(row, table.history.now());
    if (behind == 0) return;
    T terms[kMostTerms], m[kBlock], u[kBlock];
    const Gap<T> gap = table.history.template gap<T>(behind, 0, terms);
    for (int64_t first = 0; first < rows.length(); first += kBlock) {
        const int64_t count = std::min(kBlock, rows.length() - first);
        std::memcpy(m, of_row[1] + first * step[1], size_t(count) * sizeof(T));
        std::memcpy(u, of_row[2] + first * step[2], size_t(count) * sizeof(T));
        const Places places = {to + first * step[0], reinterpret_cast<char*>(m),
            reinterpret_cast<char*>(u), nullptr};
        catch_up_elements(rows.operands, places, step, count, gap);
    }
}

void exact_lookup(const Call& call) {
    const Rows rows = table_of(call, 0);
    const View& result = call.result(0);
    require(result.ndim == call[0].ndim && result.dtype == call[0].dtype &&
                result.length(1) == rows.length(),
        "adamax: a result of another dtype or shape");
    const int64_t count = result.shape[0];
    const auto* indices = call.numbers<int32_t>(4, Dtype::kInt32, {count});
    auto row = [&](int64_t i) { return indices[i] < rows.count ? indices[i] : -1; };
    dispatch(call[0].dtype, [&](auto kind) {
        const ExactTable<decltype(kind)> table(call, rows, 5);
        table.check(count, row);
        in_pieces(call, rows, count, 3, [&](int64_t start, int64_t stop) {
            for (int64_t i = start; i < stop; ++i) {
                const int64_t ahead =
                    i + kPrefetchRows < count ? row(i + kPrefetchRows) : -1;
                if (ahead >= 0) rows.prefetch_row(ahead);
                char* const to = result.data + i * rows.row_step[0];
                if (row(i) >= 0) {
                    look_up(table, row(i), to);
                } else {
                    std::memset(to, 0, size_t(rows.row_step[0]));
                }
            }
        });
    });
}

// --- Rows of arrays ----------------------------------------------------------------------

void sum(const Call& call) {
    const View &values = call[1], &indices = call.result(0), &sums = call.result(1);
    Rows rows = rows_of(values, values, values, values);
    rows.count = *call.numbers<int32_t>(2, Dtype::kInt32, {1});
    const int64_t given = values.shape[0], length = rows.length();
    require(same_shape(sums, values) && sums.dtype == arithmetic_of(values.dtype) &&
                same_shape(indices, call[0]) && indices.dtype == Dtype::kInt32,
        "adamax: a result of another dtype or shape");
    const Keys keys = keys_of(call, 0, rows.count, given);
    std::vector<int64_t> starts;  // of the keys of each row
    starts.reserve(size_t(keys.count()));
    for (int64_t i = 0; i < keys.count(); i = keys.end_of_row(i)) starts.push_back(i);
    const auto distinct = int64_t(starts.size());
    auto* const rows_of_sums = reinterpret_cast<int32_t*>(indices.data);
    dispatch(sums.dtype, [&](auto kind) {
        using T = decltype(kind);
        auto* const to = reinterpret_cast<T*>(sums.data);
        in_pieces(call, rows, distinct, 1, [&](int64_t begin, int64_t stop) {
            for (int64_t n = begin; n < stop; ++n) {
                const int64_t start = starts[size_t(n)], end = keys.end_of_row(start);
                rows_of_sums[n] = int32_t(keys.row(start));
                for (int64_t first = 0; first < length; first += kBlock) {
                    const int64_t count = std::min(kBlock, length - first);
                    double sum[kBlock];
                    sum_values(
                        rows, keys, start, end, first * rows.walk.step[3], count, sum);
                    std::copy(sum, sum + count, to + n * length + first);
                }
            }
        });
        std::fill(to + distinct * length, to + given * length, T(0));
    });
    for (int64_t n = distinct; n < given; ++n) rows_of_sums[n] = int32_t(rows.count + n);
}

void put(const Call& call) {
    const View &array = call[0], &from = call[2];
    require(array.ndim > 0 && from.ndim == array.ndim && from.dtype == array.dtype &&
                std::equal(array.shape + 1, array.shape + array.ndim, from.shape + 1),
        "adamax: rows of another dtype or shape than the array's");
    const int64_t size = array.length(1) * itemsize(array.dtype), count = from.shape[0];
    const auto* indices = call.numbers<int32_t>(1, Dtype::kInt32, {count});
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = indices[i];
        if (row >= 0 && row < array.shape[0]) {
            std::memcpy(array.data + row * size, from.data + i * size, size_t(size));
        }
    }
}

void add(const Call& call) {
    const View &array = call[0], &values = call[2];
    const Rows rows = rows_of(array, array, array, values);
    const Keys keys = keys_of(call, 1, rows.count, values.shape[0]);
    const Operand& operand = rows.operands[0];
    const int64_t* const step = rows.walk.step;
    dispatch(array.dtype, [&](auto kind) {
        in_pieces(call, rows, keys.count(), 1, [&](int64_t start, int64_t stop) {
            each_row(rows, keys, start, stop, [&](int64_t i, int64_t end) {
                for (int64_t first = 0; first < rows.length(); first += kBlock) {
                    const int64_t count = std::min(kBlock, rows.length() - first);
                    char* const to =
                        array.data + keys.row(i) * rows.row_step[0] + first * step[0];
                    double sum[kBlock], before[kBlock];
                    decltype(kind) after[kBlock];
                    sum_values(rows, keys, i, end, first * step[3], count, sum);
                    load(operand, to, step[0], count, before);
                    for (int64_t j = 0; j < count; ++j) {
                        after[j] = decltype(kind)(before[j] + sum[j]);
                    }
                    store(after, count, operand, to, step[0]);
                }
            });
        });
    });
}

constexpr struct {
    const char* name;
    xla::Handler* handler;
} kHandlers[] = {
    {"adamax_dense", xla::handle<dense, 5, 3, true>},
    {"adamax_rows", xla::handle<rows, 6, 3, true>},
    {"adamax_exact_step", xla::handle<exact_step, 13, 4, true>},
    {"adamax_exact_flush", xla::handle<exact_flush, 10, 4, true>},
    {"adamax_exact_lookup", xla::handle<exact_lookup, 11, 1, false>},
    {"adamax_sum", xla::handle<sum, 3, 2, false>},
    {"adamax_put", xla::handle<put, 3, 1, true>},
    {"adamax_add", xla::handle<add, 3, 1, true>},
};

}  // namespace

// A new dict of the handlers by name, as capsules.
PyObject* xla_handlers() {
    PyObject* handlers = PyDict_New();
    for (const auto& each : kHandlers) {
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
