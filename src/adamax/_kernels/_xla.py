"""The verbs for XLA on the CPU: handlers of its foreign-function interface.

XLA calls a handler with the addresses of buffers, from a thread of its own, without Python.
So handlers are compiled, take no lock of Python and share their work with XLA's threads.
Since threads may start late, all they need is in memory that the last of them frees.

The interface is that of ``xla/ffi/api/c_api.h``, version 0.3. XLA refuses a handler of
another version when it is registered.

``dense``: arguments ``w``, ``m``, ``u``, ``g`` and the scalars, results ``w``, ``m``,
``u``. ``rows``: arguments ``w``, ``m``, ``u``, indices (int32), values and the scalars,
results ``w``, ``m``, ``u``. Indices outside of the table are skipped. The scalars are an
array of the dtype of ``m``: the step size, what ``w`` is multiplied by, ``1 - beta_1``,
``beta_2`` and epsilon.

``exact_step``: arguments ``w``, ``m``, ``u``, stamps, indices, values, scalars and the
history, results ``w``, ``m``, ``u``, stamps. Rows are brought up to date before the step.
Indices for which there are no values are of rows that do not step. ``exact_flush``:
arguments ``w``, ``m``, ``u``, stamps and the history, results ``w``, ``m``, ``u``, stamps.
``exact_lookup``: arguments ``w``, ``m``, ``u``, stamps, indices and the history, the result
is the rows, up to date, and zeros for indices outside of the table. The history is what
``adamax._jax_exact.Deferred`` describes: recent, final and decay; the powers of the betas,
epsilon and the number of steps so far.

``put``, ``add``: arguments an array, indices (int32) and values of its rows, result the
array with the values in those rows, or added to them in the order in which they are given
(not for 16-bit arrays, whose sums would be rounded each time). Indices outside of the array
are skipped.

Results are where the arguments are, but for the rows that are looked up.
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

import numpy as np

from . import Storage, _cpu, _threads
from ._cpu import (
    _CLOSED,
    _ELEMENTS_WORTH_A_THREAD,
    _HELPERS,
    _LOOKS,
    _PREFETCH_ROWS,
    _PREFETCH_STAMPS,
    _ROWS_PIECE_ELEMENTS,
    _add,
    _as_number,
    _dense_step,
    _end_of_row,
    _inlined,
    _itemsize,
    _join,
    _leave,
    _load,
    _look,
    _next_row,
    _or,
    _pay_out,
    _pointer,
    _prefetch,
    _prefetch_begin,
    _prefetch_row,
    _rows_step,
    _scalars,
    _scratch,
    _sort_keys,
    _split,
    _store,
    _sum_row,
    _take,
    _update,
)

# --- The interface: what is used of its structures, as offsets in bytes -----------------

_API_MAJOR, _API_MINOR = 0, 3

_FRAME_EXTENSION = 8
_FRAME_API = 16
_FRAME_CONTEXT = 24
_FRAME_ARGUMENTS = 72  # where the pointers to the buffers are
_FRAME_RESULTS = 112

_BUFFER_DATA = 24
_BUFFER_RANK = 32
_BUFFER_DIMENSIONS = 40

_EXTENSION_TYPE = 8
_EXTENSION_METADATA = 24
_METADATA = 1  # the type of the extension that asks for it
_METADATA_MAJOR = 24
_METADATA_MINOR = 28
_METADATA_TRAITS = 32

_API_ERROR_CREATE = 48
_API_ERROR_DESTROY = 64
_API_THREAD_POOL_SCHEDULE = 136
_API_THREAD_POOL_NUM_THREADS = 144

_RESOURCE_EXHAUSTED = 8
_INTERNAL = 13


@_inlined
def _word(address):
    return _load(_pointer(address, np.int64(0)), 0)


@_inlined
def _put_word(address, word):
    _store(_pointer(address, np.int64(0)), 0, np.int64(word))


@_inlined
def _half_word(address):
    return _load(_pointer(address, np.int32(0)), 0)


@_inlined
def _put_half_word(address, word):
    _store(_pointer(address, np.int32(0)), 0, np.int32(word))


def _c_function(name: str, returns: Any, *argument_types: Any) -> Any:
    """A function of the C library that takes and returns integers."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(
            context.get_value_type(returns),
            [context.get_value_type(argument) for argument in argument_types],
        )
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, arguments)

    if argument_types:

        @intrinsic
        def call(typing_context, argument):
            return returns(*argument_types), codegen
    else:

        @intrinsic
        def call(typing_context):
            return returns(), codegen

    return call


_malloc = _c_function("malloc", types.int64, types.int64)
_free = _c_function("free", types.int64, types.int64)
_yield = _c_function("sched_yield", types.int32)


@intrinsic
def _call(typing_context, function, argument):
    """Call the C function at an address with a pointer; the pointer that it returns."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(arguments[1].type, [arguments[1].type])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.call(function, [arguments[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _room(typing_context):
    """The address of some words on the stack, for the arguments of a call."""

    def codegen(context, builder, signature, arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 8))
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), codegen


def _c_string(text: str) -> Any:
    """A function that returns the address of a string."""

    @intrinsic
    def address(typing_context):
        def codegen(context, builder, signature, arguments):
            string = context.insert_const_string(builder.module, text)
            return builder.ptrtoint(string, ir.IntType(64))

        return types.int64(), codegen

    return address


_not_in_place = _c_string("adamax: the results are not where the arguments are")
_no_memory = _c_string("adamax: out of memory")


# --- Answers to XLA ---------------------------------------------------------------------


@_inlined
def _is_question(frame):
    """Whether this is no call but the question for the version; answers it."""
    extension = _word(frame + _FRAME_EXTENSION)
    if extension == 0 or _half_word(extension + _EXTENSION_TYPE) != _METADATA:
        return False
    metadata = _word(extension + _EXTENSION_METADATA)
    _put_half_word(metadata + _METADATA_MAJOR, _API_MAJOR)
    _put_half_word(metadata + _METADATA_MINOR, _API_MINOR)
    _put_half_word(metadata + _METADATA_TRAITS, 0)
    return True


@_inlined
def _ask(frame, function, arguments, size):
    """Call a function of the interface with its arguments, their first two words unset."""
    _put_word(arguments, size)
    _put_word(arguments + 8, 0)  # no extension
    return _call(_word(_word(frame + _FRAME_API) + function), arguments)


@_inlined
def _error(frame, code, message):
    arguments = _room()
    _put_word(arguments + 16, message)
    _put_word(arguments + 24, code)
    return _ask(frame, _API_ERROR_CREATE, arguments, 28)


@_inlined
def _succeeded(frame, error):
    if error == 0:
        return True
    arguments = _room()
    _put_word(arguments + 16, error)
    _ask(frame, _API_ERROR_DESTROY, arguments, 24)
    return False


@_inlined
def _num_threads(frame):
    """The number of threads in XLA's pool, 0 if there is none."""
    arguments, number = _room(), _room()
    _put_word(arguments + 16, _word(frame + _FRAME_CONTEXT))
    _put_word(arguments + 24, number)
    error = _ask(frame, _API_THREAD_POOL_NUM_THREADS, arguments, 32)
    return _word(number) if _succeeded(frame, error) else np.int64(0)


@_inlined
def _schedule(frame, task, job):
    """Have a thread of XLA call ``task(job)`` some time; whether it will."""
    arguments = _room()
    _put_word(arguments + 16, _word(frame + _FRAME_CONTEXT))
    _put_word(arguments + 24, task)
    _put_word(arguments + 32, job)
    return _succeeded(frame, _ask(frame, _API_THREAD_POOL_SCHEDULE, arguments, 40))


@_inlined
def _buffer(frame, buffers, number):
    return _word(_word(frame + buffers) + 8 * number)


@_inlined
def _data(frame, buffers, number):
    return _word(_buffer(frame, buffers, number) + _BUFFER_DATA)


@_inlined
def _in_place(frame, buffers):
    for number in range(buffers):
        if _data(frame, _FRAME_RESULTS, number) != _data(frame, _FRAME_ARGUMENTS, number):
            return False
    return True


@_inlined
def _size(buffer, axis):
    """The number of elements of a buffer, from an axis on."""
    size = np.int64(1)
    for i in range(axis, _word(buffer + _BUFFER_RANK)):
        size *= _word(_word(buffer + _BUFFER_DIMENSIONS) + 8 * i)
    return size


@_inlined
def _dimension(frame, argument, axis):
    buffer = _buffer(frame, _FRAME_ARGUMENTS, argument)
    return _word(_word(buffer + _BUFFER_DIMENSIONS) + 8 * axis)


# --- Jobs -------------------------------------------------------------------------------
#
# A job is memory that holds all that the threads of a launch need, in words of 8 bytes: a
# board (see _cpu), how many threads may still look at the job, and what the kernel is
# given.

_OWNERS = 2 * _HELPERS  # on a cache line of its own, as what is on the board
_ADDRESSES = _OWNERS + _HELPERS  # of w, m, u, and of the gradient
_LENGTH = _ADDRESSES + 4  # of the arrays, or of a row
_FACTORS = _LENGTH + 1
_COEFFICIENTS = _FACTORS + 4
_KEYS = _COEFFICIENTS + 4  # where the keys of the rows are
_COUNT = _KEYS + 1  # of them
_SHIFT = _COUNT + 1
# Of exact updates: addresses, shapes and numbers.
_STAMPS = _SHIFT + 1
_RECENT = _STAMPS + 1
_FINAL = _RECENT + 1
_DECAY = _FINAL + 1  # 0 without weight decay
_POWERS = _DECAY + 1
_NOW = _POWERS + 1
_WINDOW = _NOW + 1
_TERMS = _WINDOW + 1
_ENTRIES = _TERMS + 1
_EPSILON = _ENTRIES + 1
_ROWS = _EPSILON + 1  # of the table
_VALUES = _ROWS + 1  # how many of the indices have values
_INDICES = _VALUES + 1
_RESULT = _INDICES + 1
_WORDS = _RESULT + 1


@_inlined
def _get(job, place):
    return _word(job + 8 * place)


@_inlined
def _put(job, place, word):
    _put_word(job + 8 * place, word)


@_inlined
def _integers(job, place, shape):
    return numba.carray(_pointer(job + 8 * place, np.int64(0)), shape)


@_inlined
def _numbers(job, place, shape):
    return numba.carray(_pointer(job + 8 * place, np.float64(0)), shape)


@_inlined
def _new_job(frame, keys):
    """A job on w, m and u, with room for that many keys; 0 if there is no memory."""
    job = _malloc(8 * (_WORDS + keys))
    if job == 0:
        return job
    for place in range(_ADDRESSES):
        _put(job, place, 0)
    for i in range(3):
        _put(job, _ADDRESSES + i, _data(frame, _FRAME_ARGUMENTS, i))
    return job


@_inlined
def _put_gradient(job, frame, values, scalars, number):
    """Tell a job where the gradient and the scalars are among the arguments."""
    _put(job, _ADDRESSES + 3, _data(frame, _FRAME_ARGUMENTS, values))
    given = _pointer(_data(frame, _FRAME_ARGUMENTS, scalars), number)
    factors = _numbers(job, _FACTORS, (4,))
    factors[0], factors[1] = _load(given, 0), _load(given, 1)
    factors[2], factors[3] = 1.0, 0.0  # as Factor: no scale, no coupled decay
    coefficients = _numbers(job, _COEFFICIENTS, (4,))
    for i in range(3):
        coefficients[i] = _load(given, 2 + i)
    coefficients[3] = np.inf  # no clipping


@_inlined
def _put_history(job, frame, first, number):
    """Tell a job of exact updates what the arguments from the ``first`` on say."""
    _put(job, _STAMPS, _data(frame, _FRAME_ARGUMENTS, 3))
    for i in range(4):
        _put(job, _RECENT + i, _data(frame, _FRAME_ARGUMENTS, first + i))
    if _dimension(frame, first + 2, 0) == 0:
        _put(job, _DECAY, 0)
    _put(job, _WINDOW, _dimension(frame, first, 1))
    _put(job, _TERMS, _dimension(frame, first, 2))
    _put(job, _ENTRIES, _dimension(frame, first + 1, 0))
    epsilon = _pointer(_data(frame, _FRAME_ARGUMENTS, first + 4), number)
    _numbers(job, _EPSILON, (1,))[0] = _load(epsilon, 0)
    _put(job, _NOW, _half_word(_data(frame, _FRAME_ARGUMENTS, first + 5)))
    _put(job, _ROWS, _dimension(frame, 0, 0))
    _put(job, _LENGTH, _size(_buffer(frame, _FRAME_ARGUMENTS, 0), 1))


@_inlined
def _put_keys(job, frame, indices, keys):
    """Have a job do the rows of some of the ``indices``, in order.

    ``keys``: how many there is room for, twice that of the indices.
    """
    count = keys // 2
    position_bits = 0
    while count > 1 << position_bits:
        position_bits += 1
    shift = np.uint64(position_bits)
    rows = _dimension(frame, 0, 0)
    both = numba.carray(_pointer(job + 8 * _WORDS, np.uint64(0)), (2, count))
    data = _data(frame, _FRAME_ARGUMENTS, indices)
    known, ascending, largest = _take_known(data, count, rows, shift, both[0])
    in_scratch = 0
    if not ascending and _sort_keys(both[0][:known], both[1][:known], shift, largest):
        in_scratch = 1
    _put(job, _KEYS, job + 8 * (_WORDS + in_scratch * count))
    _put(job, _COUNT, known)
    _put(job, _SHIFT, position_bits)
    _put(job, _LENGTH, _size(_buffer(frame, _FRAME_ARGUMENTS, 0), 1))
    return known * _get(job, _LENGTH)


@_inlined
def _invite(frame, job, task, elements):
    """Ask threads of XLA to help with a job, as many as it is worth."""
    helpers = np.int64(0)
    if elements >= _ELEMENTS_WORTH_A_THREAD:
        helpers = min(_num_threads(frame) - 1, elements // _ELEMENTS_WORTH_A_THREAD)
    _put(job, _OWNERS, 1 + max(helpers, 0))
    for _ in range(helpers):
        if not _schedule(frame, task, job):
            _add(job + 8 * _OWNERS, -1)


@_inlined
def _finish(job):
    """Let no helper join any more, and wait until all have left."""
    _or(job + 8 * _HELPERS, _CLOSED)
    looks = 0
    while _look(job + 8 * _HELPERS) != _CLOSED:
        looks += 1
        if looks > _LOOKS:  # a helper is there that does not run
            _yield()
    _disown(job)


@_inlined
def _disown(job):
    if _add(job + 8 * _OWNERS, -1) == 1:
        _free(job)


@_inlined
def _take_known(indices, count, rows, shift, keys):
    """Write the keys of the indices of known rows.

    Returns their number, whether they are ascending, and the largest row.
    """
    indices = _pointer(indices, np.int32(0))
    known, ascending, previous = 0, True, np.int64(0)
    largest = np.int64(0)
    for position in range(count):
        row = np.int64(_load(indices, position))
        if 0 <= row < rows:
            keys[known] = (np.uint64(row) << shift) | np.uint64(position)
            known += 1
            ascending = ascending and row >= previous
            previous = row
            largest = max(largest, row)
    return known, ascending, largest


# --- What rows have missed ---------------------------------------------------------------


@_inlined
def _missed(job, behind, number):
    """What a row that is behind has missed, as :func:`_pay_out` takes it."""
    now, window, terms = _get(job, _NOW), _get(job, _WINDOW), _get(job, _TERMS)
    later = of_w = of_m = of_u = 1.0
    if behind > window:
        sums = _pointer(_get(job, _FINAL), number)
        place = ((now - behind) & (_get(job, _ENTRIES) - 1)) * terms
    else:
        sums = _pointer(_get(job, _RECENT), number)
        place = (behind - 1) * terms
    if _get(job, _DECAY):
        of_w = _decayed(job, now - behind, number)
        if behind > window:
            later = _decayed(job, now - behind + window, number)
    powers = _pointer(_get(job, _POWERS), number)
    for digit in range(4):
        place_of_power = 256 * digit + ((behind >> 8 * digit) & 255)
        of_m *= _load(powers, place_of_power)
        of_u *= _load(powers, 256 * 4 + place_of_power)
    return (of_w, of_m, of_u), later, sums, place, terms


@_inlined
def _decayed(job, since, number):
    """The product of the decay factors of all steps after one."""
    decay, last = _pointer(_get(job, _DECAY), number), _get(job, _ENTRIES) - 1
    before, after = 3 * (since & last), 3 * (_get(job, _NOW) & last)
    high = np.float64(_load(decay, after)) - np.float64(_load(decay, before))
    low = np.float64(_load(decay, after + 1)) - np.float64(_load(decay, before + 1))
    product = math.exp(high + low)
    return product if _load(decay, after + 2) == _load(decay, before + 2) else -product


@_inlined
def _behind(job, row):
    """How many steps; int32 numbers of steps may have overflowed."""
    stamp = _load(_pointer(_get(job, _STAMPS) + 4 * row, np.int32(0)), 0)
    return np.int64(np.int32(_get(job, _NOW) - stamp))


@_inlined
def _set_stamp(job, row, step):
    _store(_pointer(_get(job, _STAMPS) + 4 * row, np.int32(0)), 0, np.int32(step))


@_inlined
def _row(job, array, row, of):
    """A pointer to a row of w, m or u, whose elements are of the type of ``of``."""
    address = _get(job, _ADDRESSES + array)
    return _pointer(address + row * _get(job, _LENGTH) * _itemsize(of), of)


@_inlined
def _catch_up(job, row, scratch, word, number):
    behind = _behind(job, row)
    if behind > 0:
        _pay_out(
            _row(job, 0, row, word),
            _row(job, 1, row, number),
            _row(job, 2, row, number),
            _get(job, _LENGTH),
            _missed(job, behind, number),
            _numbers(job, _EPSILON, (1,))[0],
            scratch,
            word,
        )


@_inlined
def _prefetch_stamp(job, row):
    _prefetch(_get(job, _STAMPS) + 4 * row)


# --- Handlers, and what helpers do ------------------------------------------------------


def _handler_kernel(function: Callable[..., Any]) -> Any:
    # Numba's disk cache goes by the file a kernel is in, and this one contains kernels of
    # another file.
    function.__qualname__ += f"_{Path(_cpu.__file__).stat().st_mtime_ns:x}"
    return _cpu._kernel()(function)


@_inlined
def _board(job):
    return _integers(job, 0, (_HELPERS + 1,))


@_inlined
def _keys(job):
    return numba.carray(_pointer(_get(job, _KEYS), np.uint64(0)), (_get(job, _COUNT),))


@_inlined
def _piece(job):
    return max(1, _ROWS_PIECE_ELEMENTS // max(_get(job, _LENGTH), 1))


@_inlined
def _work_on_arrays(job, helping, word, number):
    _dense_step(
        word,
        number,
        _integers(job, _ADDRESSES, (1, 4)),
        _integers(job, _LENGTH, (1,)),
        _numbers(job, _FACTORS, (1, 4)),
        _numbers(job, _COEFFICIENTS, (4,)),
        _board(job),
        helping,
    )


@_inlined
def _work_on_rows(job, helping, word, number):
    _rows_step(
        word,
        number,
        _keys(job),
        np.uint64(_get(job, _SHIFT)),
        _integers(job, _ADDRESSES, (4,)),
        _get(job, _LENGTH),
        _numbers(job, _FACTORS, (4,)),
        _numbers(job, _COEFFICIENTS, (4,)),
        _piece(job),
        _board(job),
        helping,
    )


@_inlined
def _work_on_exact_rows(job, helping, word, number):
    keys, shift = _keys(job), np.uint64(_get(job, _SHIFT))
    count, length, board = keys.shape[0], _get(job, _LENGTH), _board(job)
    addresses = _integers(job, _ADDRESSES, (4,))
    word_bytes, number_bytes = length * _itemsize(word), length * _itemsize(number)
    factors, coefficients = (
        _numbers(job, _FACTORS, (4,)),
        _numbers(job, _COEFFICIENTS, (4,)),
    )
    scalars = _scalars(factors, coefficients, word)
    given, now, piece = _get(job, _VALUES), _get(job, _NOW), _piece(job)
    scratch = np.empty((3, length))  # room for either type of number
    if not _join(board, helping):
        return
    while True:
        start = _take(board, piece)
        if start >= count:
            break
        stop = min(start + piece, count)
        i = _next_row(keys, shift, start, stop)
        while i < stop:
            if i + _PREFETCH_STAMPS < count:
                _prefetch_stamp(job, _split(keys[i + _PREFETCH_STAMPS], shift)[0])
            if i + _PREFETCH_ROWS < count:
                row, position = _split(keys[i + _PREFETCH_ROWS], shift)
                _prefetch_row(addresses, row, word_bytes, number_bytes)
                if position < given:
                    _prefetch_begin(addresses[3] + position * word_bytes, word_bytes)
            row, position = _split(keys[i], shift)
            end = _end_of_row(keys, shift, i)
            _catch_up(job, row, scratch, word, number)
            # A row comes without values once at most, and then last.
            _, last = _split(keys[end - 1], shift)
            end_of_values = end if last < given else end - 1
            if end_of_values > i:
                g = _pointer(addresses[3] + position * word_bytes, word)
                w = _row(job, 0, row, word)
                m, u = _row(job, 1, row, number), _row(job, 2, row, number)
                if end_of_values == i + 1:
                    _update(w, m, u, g, length, scalars)
                else:
                    values, total = addresses[3], _scratch(scratch[2], number)
                    _sum_row(total, keys, shift, i, end_of_values, values, length, word)
                    _update(w, m, u, total, length, scalars)
                _set_stamp(job, row, now + 1)
            else:
                _set_stamp(job, row, now)
            i = end
    _leave(board, helping)


@_inlined
def _work_on_table(job, helping, word, number):
    rows, board, piece = _get(job, _ROWS), _board(job), 8 * _piece(job)
    scratch = np.empty((2, _get(job, _LENGTH)))  # room for either type of number
    if not _join(board, helping):
        return
    while True:
        start = _take(board, piece)
        if start >= rows:
            break
        for row in range(start, min(start + piece, rows)):
            _catch_up(job, row, scratch, word, number)
            _set_stamp(job, row, _get(job, _NOW))
    _leave(board, helping)


@_inlined
def _work_on_lookup(job, helping, word, number):
    indices = _pointer(_get(job, _INDICES), np.int32(0))
    count, rows, length = _get(job, _COUNT), _get(job, _ROWS), _get(job, _LENGTH)
    addresses, board, piece = _integers(job, _ADDRESSES, (4,)), _board(job), _piece(job)
    word_bytes, number_bytes = length * _itemsize(word), length * _itemsize(number)
    scratch = np.empty((4, length))  # room for either type of number
    if not _join(board, helping):
        return
    while True:
        start = _take(board, piece)
        if start >= count:
            break
        for i in range(start, min(start + piece, count)):
            if i + _PREFETCH_STAMPS < count:
                row = np.int64(_load(indices, i + _PREFETCH_STAMPS))
                if 0 <= row < rows:
                    _prefetch_stamp(job, row)
            if i + _PREFETCH_ROWS < count:
                row = np.int64(_load(indices, i + _PREFETCH_ROWS))
                if 0 <= row < rows:
                    _prefetch_row(addresses, row, word_bytes, number_bytes)
            row = np.int64(_load(indices, i))
            result = _pointer(_get(job, _RESULT) + i * word_bytes, word)
            if not 0 <= row < rows:
                for k in range(length):
                    _store(result, k, _as_number(0.0, word))
                continue
            w = _row(job, 0, row, word)
            for k in range(length):
                _store(result, k, _load(w, k))
            behind = _behind(job, row)
            if behind > 0:
                m, u = _scratch(scratch[2], number), _scratch(scratch[3], number)
                of_table = _row(job, 1, row, number), _row(job, 2, row, number)
                for k in range(length):
                    _store(m, k, _load(of_table[0], k))
                    _store(u, k, _load(of_table[1], k))
                missed = _missed(job, behind, number)
                epsilon = _numbers(job, _EPSILON, (1,))[0]
                _pay_out(result, m, u, length, missed, epsilon, scratch, word)
    _leave(board, helping)


@_inlined
def _change_rows(frame, word, add):
    """Put values into rows, or add them; in this thread, since it is soon done."""
    if _is_question(frame):
        return 0
    if not _in_place(frame, 1):
        return _error(frame, _INTERNAL, _not_in_place())
    array = _data(frame, _FRAME_ARGUMENTS, 0)
    indices = _pointer(_data(frame, _FRAME_ARGUMENTS, 1), np.int32(0))
    values = _data(frame, _FRAME_ARGUMENTS, 2)
    rows, count = _dimension(frame, 0, 0), _dimension(frame, 1, 0)
    length = _size(_buffer(frame, _FRAME_ARGUMENTS, 0), 1)
    row_bytes = length * _itemsize(word)
    for position in range(count):
        if position + _PREFETCH_ROWS < count:
            row = np.int64(_load(indices, position + _PREFETCH_ROWS))
            if 0 <= row < rows:
                _prefetch_begin(array + row * row_bytes, row_bytes)
        row = np.int64(_load(indices, position))
        if 0 <= row < rows:
            into = _pointer(array + row * row_bytes, word)
            of_row = _pointer(values + position * row_bytes, word)
            if add:
                for i in range(length):
                    _store(into, i, _load(into, i) + _load(of_row, i))
            else:
                for i in range(length):
                    _store(into, i, _load(of_row, i))
    return 0


@_handler_kernel
def _dense_task(job, word, number):
    _work_on_arrays(job, True, word, number)
    _disown(job)


@_handler_kernel
def _rows_task(job, word, number):
    _work_on_rows(job, True, word, number)
    _disown(job)


@_handler_kernel
def _exact_step_task(job, word, number):
    _work_on_exact_rows(job, True, word, number)
    _disown(job)


@_handler_kernel
def _exact_flush_task(job, word, number):
    _work_on_table(job, True, word, number)
    _disown(job)


@_handler_kernel
def _exact_lookup_task(job, word, number):
    _work_on_lookup(job, True, word, number)
    _disown(job)


@_handler_kernel
def _dense_handler(frame, task, word, number):
    if _is_question(frame):
        return 0
    if not _in_place(frame, 3):
        return _error(frame, _INTERNAL, _not_in_place())
    length = _size(_buffer(frame, _FRAME_ARGUMENTS, 0), 0)
    job = _new_job(frame, 0)
    if job == 0:
        return _error(frame, _RESOURCE_EXHAUSTED, _no_memory())
    _put_gradient(job, frame, 3, 4, number)
    _put(job, _LENGTH, length)
    _invite(frame, job, task, length)
    _work_on_arrays(job, False, word, number)
    _finish(job)
    return 0


@_handler_kernel
def _rows_handler(frame, task, word, number):
    if _is_question(frame):
        return 0
    if not _in_place(frame, 3):
        return _error(frame, _INTERNAL, _not_in_place())
    keys = 2 * _dimension(frame, 3, 0)
    job = _new_job(frame, keys)
    if job == 0:
        return _error(frame, _RESOURCE_EXHAUSTED, _no_memory())
    _put_gradient(job, frame, 4, 5, number)
    elements = _put_keys(job, frame, 3, keys)
    _invite(frame, job, task, 2 * elements)
    _work_on_rows(job, False, word, number)
    _finish(job)
    return 0


@_handler_kernel
def _exact_step_handler(frame, task, word, number):
    if _is_question(frame):
        return 0
    if not _in_place(frame, 4):
        return _error(frame, _INTERNAL, _not_in_place())
    keys = 2 * _dimension(frame, 4, 0)
    job = _new_job(frame, keys)
    if job == 0:
        return _error(frame, _RESOURCE_EXHAUSTED, _no_memory())
    _put_gradient(job, frame, 5, 6, number)
    _put_history(job, frame, 7, number)
    _put(job, _VALUES, _dimension(frame, 5, 0))
    elements = _put_keys(job, frame, 4, keys)
    _invite(frame, job, task, 3 * elements)
    _work_on_exact_rows(job, False, word, number)
    _finish(job)
    return 0


@_handler_kernel
def _exact_flush_handler(frame, task, word, number):
    if _is_question(frame):
        return 0
    if not _in_place(frame, 4):
        return _error(frame, _INTERNAL, _not_in_place())
    job = _new_job(frame, 0)
    if job == 0:
        return _error(frame, _RESOURCE_EXHAUSTED, _no_memory())
    _put_history(job, frame, 4, number)
    _invite(frame, job, task, _get(job, _ROWS) * _get(job, _LENGTH))
    _work_on_table(job, False, word, number)
    _finish(job)
    return 0


@_handler_kernel
def _exact_lookup_handler(frame, task, word, number):
    if _is_question(frame):
        return 0
    job = _new_job(frame, 0)
    if job == 0:
        return _error(frame, _RESOURCE_EXHAUSTED, _no_memory())
    _put_history(job, frame, 5, number)
    _put(job, _INDICES, _data(frame, _FRAME_ARGUMENTS, 4))
    _put(job, _COUNT, _dimension(frame, 4, 0))
    _put(job, _RESULT, _data(frame, _FRAME_RESULTS, 0))
    _invite(frame, job, task, 3 * _get(job, _COUNT) * _get(job, _LENGTH))
    _work_on_lookup(job, False, word, number)
    _finish(job)
    return 0


@_handler_kernel
def _put_handler(frame, task, word, number):
    return _change_rows(frame, word, False)


@_handler_kernel
def _add_handler(frame, task, word, number):
    return _change_rows(frame, word, True)


_KERNELS = {
    "dense": (_dense_task, _dense_handler),
    "rows": (_rows_task, _rows_handler),
    "exact_step": (_exact_step_task, _exact_step_handler),
    "exact_flush": (_exact_flush_task, _exact_flush_handler),
    "exact_lookup": (_exact_lookup_task, _exact_lookup_handler),
    "put": (None, _put_handler),
    "add": (None, _add_handler),
}


@functools.cache
def handler(verb: str, storage: Storage) -> Any:
    """The compiled handler of a verb for parameters of this storage.

    It must be kept as long as XLA may call it.

    Raises:
        NotImplementedError: on this operating system.
    """
    if os.name != "posix":
        raise NotImplementedError("they need sched_yield, which is of POSIX")
    made: list[Any] = []
    _threads.run_uninterrupted(lambda: made.append(_compiled(verb, storage)))
    return made[0]


def _compiled(verb: str, storage: Storage) -> Any:
    word, number = _cpu._types_of(storage)
    of_task, of_handler = _KERNELS[verb]

    def compile_for(kernel: Any, addresses: int) -> None:
        signature = (*addresses * [types.int64], *map(numba.typeof, (word, number)))
        _cpu._compile(kernel, signature)

    task_function: Any = None
    if of_task is not None:
        compile_for(of_task, 1)

        def task(job):
            of_task(job, word, number)

        task_function = numba.cfunc(types.void(types.int64))(task)
    # An int would become part of a type, and of the name of a file in the cache.
    task_address = np.int64(task_function.address if task_function else 0)
    compile_for(of_handler, 2)

    def handler(frame):
        return of_handler(frame, task_address, word, number)

    function: Any = numba.cfunc(types.int64(types.int64))(handler)
    function.task = task_function  # is kept as well
    return function
