// The module adamax._native.verbs: the verbs of _core/kernels.py, which documents them.

#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>

#include "plan.hpp"

namespace adamax {

PyObject* xla_handlers();

namespace {

// Calls a function without the GIL.
//
// At the end of the interpreter, a thread that asks for the GIL is ended right there, as if
// an exception that nobody catches had been thrown: this must not happen in a destructor,
// and what is destroyed on the way must not touch objects of Python.
template <class Function>
void without_gil(const Function& function) {
    PyThreadState* const state = PyEval_SaveThread();
    Reader::may_release = false;
    std::exception_ptr error;
    try {
        const FloatingPointState numbers;
        function();
    } catch (const std::exception&) {
        error = std::current_exception();
    }
    PyEval_RestoreThread(state);
    Reader::may_release = true;
    if (error) std::rethrow_exception(error);
}

PyObject* failed(const Plan& plan) {
    const Problem& p = plan.problem;
    if (!p) return nullptr;
    return Py_BuildValue(
        "(sLLL)", p.kind, (long long)p.where, (long long)p.detail, (long long)p.value);
}

bool read_number(PyObject* object, double* number) {
    *number = PyFloat_AsDouble(object);
    return !(*number == -1 && PyErr_Occurred());
}

bool read_number(PyObject* object, int64_t* number) {
    *number = PyLong_AsLongLong(object);
    return !(*number == -1 && PyErr_Occurred());
}

bool read_threads(PyObject* object, int* threads) {
    int64_t number;
    if (!read_number(object, &number)) return false;
    *threads = int(std::min<int64_t>(std::max<int64_t>(number, 1), 1024));
    return true;
}

// The function of a verb that takes `kCount` arguments. Verbs throw before they write.
template <PyObject* (*kVerb)(PyObject* const*), Py_ssize_t kCount>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    if (given != kCount) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", kCount, given);
        return nullptr;
    }
    try {
        return kVerb(arguments);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    }
}

// step(w, m, u, g, scalars, frames, tables, counters, clipnorm, global_clipnorm, threads)
PyObject* step(PyObject* const* arguments) {
    Plan plan;
    Step& step = plan.step;
    if (!read_number(arguments[8], &step.clipnorm) ||
        !read_number(arguments[9], &step.global_clipnorm) ||
        !read_threads(arguments[10], &step.threads) ||
        !plan.add_parameters(arguments, arguments[4], arguments[5]) ||
        !plan.add_tables(arguments[6]) || !plan.add_counters(arguments[7]) ||
        !plan.finish()) {
        return failed(plan);
    }
    without_gil([&] { step.run(); });
    Py_RETURN_NONE;
}

// counts(counters)
PyObject* counts(PyObject* const* arguments) {
    Plan plan;
    if (!plan.add_counters(arguments[0])) return failed(plan);
    PyObject* list = PyList_New(Py_ssize_t(plan.step.counters.size()));
    Py_ssize_t i = 0;
    for (const Counter& counter : plan.step.counters) {
        PyObject* value = list ? PyFloat_FromDouble(counter.value()) : nullptr;
        if (!value) {
            Py_XDECREF(list);
            return nullptr;
        }
        PyList_SET_ITEM(list, i++, value);
    }
    return list;
}

// norm(indices, values, rows, threads)
PyObject* norm(PyObject* const* arguments) {
    Plan plan;
    View values;
    Keys keys;
    int64_t rows;
    int threads;
    if (!read_number(arguments[2], &rows) || !read_threads(arguments[3], &threads) ||
        !plan.read_values(arguments[1], &values) ||
        !plan.read_indices(arguments[0], rows, &keys) ||
        (keys.count() != values.shape[0] && !plan.unfit(3))) {
        return failed(plan);
    }
    const std::vector<Gradient> gradients{Gradient(values, &keys)};
    Norm norm;
    without_gil([&] { norm = norms_of(gradients, threads)[0]; });
    return PyFloat_FromDouble(norm.value());
}

// Calls `function(row_kind)` with a zero of the type that the arithmetic on rows is done
// in.
template <class Function>
void dispatch(const Rows& rows, const Function& function) {
    rows.is_double() ? function(double()) : function(float());
}

// catch_up_rows(table, indices, threads)
PyObject* catch_up_rows(PyObject* const* arguments) {
    Plan plan;
    StaleTable table;
    Keys keys;
    int threads;
    if (!read_threads(arguments[2], &threads) || !plan.read_table(arguments[0], &table) ||
        !plan.read_indices(arguments[1], table.rows.count, &keys) ||
        !plan.check_stamps(keys, table.stamps, table.history, false)) {
        return failed(plan);
    }
    const auto& [rows, stamps, history, epsilon] = table;
    std::atomic<int64_t> caught_up{0};
    without_gil([&] {
        const int64_t pieces = (keys.count() + rows.piece() - 1) / rows.piece();
        parallel_for(
            worth(threads, 3 * keys.count() * rows.length()), pieces, [&](int64_t piece) {
                const int64_t start = piece * rows.piece();
                int64_t mine = 0;
                dispatch(rows, [&](auto kind) {
                    each_row(
                        rows, keys, start, start + rows.piece(), [&](int64_t i, int64_t) {
                            mine += catch_up<decltype(kind)>(
                                rows, keys.row(i), stamps, history, epsilon);
                        });
                });
                caught_up += mine;
            });
    });
    return PyLong_FromLongLong(caught_up);
}

// catch_up_range(table, start, stop, threads)
PyObject* catch_up_range(PyObject* const* arguments) {
    Plan plan;
    StaleTable table;
    int64_t first, last;
    int threads;
    if (!read_number(arguments[1], &first) || !read_number(arguments[2], &last) ||
        !read_threads(arguments[3], &threads) || !plan.read_table(arguments[0], &table)) {
        return failed(plan);
    }
    const auto& [rows, stamps, history, epsilon] = table;
    first = std::max<int64_t>(first, 0);
    last = std::min(last, rows.count);
    const int64_t longest = history.longest();
    std::atomic<int64_t> caught_up{0}, wrong{-1};
    without_gil([&] {
        const int64_t of_piece = 8 * rows.piece();
        const int64_t pieces = std::max<int64_t>(last - first + of_piece - 1, 0) / of_piece;
        parallel_for(
            worth(threads, (last - first) * rows.length()), pieces, [&](int64_t piece) {
                const int64_t start = first + piece * of_piece;
                int64_t mine = 0;
                dispatch(rows, [&](auto kind) {
                    for (int64_t row = start; row < std::min(start + of_piece, last);
                        ++row) {
                        if (stamps.gap(row, history.steps) > longest) {
                            wrong = row;
                        } else {
                            mine += catch_up<decltype(kind)>(
                                rows, row, stamps, history, epsilon);
                        }
                    }
                });
                caught_up += mine;
            });
    });
    if (wrong >= 0) {
        plan.problem = {"history", 0, wrong, 0};
        return failed(plan);
    }
    return PyLong_FromLongLong(caught_up);
}

// use_isa(name): the loops of an instruction set, for tests; returns the name of those in
// use.
PyObject* use_isa(PyObject* const* arguments) {
    if (arguments[0] != Py_None) {
        const char* name = PyUnicode_AsUTF8(arguments[0]);
        if (!name) return nullptr;
        const Loops* chosen = choose_loops(name);
        if (!chosen) {
            return PyErr_Format(PyExc_ValueError,
                "this processor or this build has no instruction set %R", arguments[0]);
        }
        use_loops(*chosen);
    }
    return PyUnicode_FromString(loops().name);
}

#define ADAMAX_VERB(name, count)                                                        \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call<name, count>)), \
        METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    ADAMAX_VERB(step, 11),
    ADAMAX_VERB(counts, 1),
    ADAMAX_VERB(norm, 4),
    ADAMAX_VERB(catch_up_rows, 3),
    ADAMAX_VERB(catch_up_range, 4),
    ADAMAX_VERB(use_isa, 1),
    {"xla_handlers", [](PyObject*, PyObject*) { return xla_handlers(); }, METH_NOARGS,
        nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "adamax._native.verbs",
    nullptr,
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace adamax

PyMODINIT_FUNC PyInit_verbs() {
    using namespace adamax;
    if (!import_numpy()) return nullptr;
    make_pool();
    const char* isa = std::getenv("ADAMAX_ISA");
    const Loops* chosen = choose_loops(isa);
    if (!chosen) {
        return PyErr_Format(PyExc_ImportError,
            "ADAMAX_ISA=%s: this processor or this build has no such "
            "instruction set; known are base, avx2 and avx512",
            isa);
    }
    use_loops(*chosen);
    return PyModule_Create(&definition);
}
