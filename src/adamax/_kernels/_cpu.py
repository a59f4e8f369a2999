"""The verbs for the CPU: fused passes over memory, compiled by Numba.

All compiled code is in this one file because Numba's disk cache notices a change of the
file a kernel is defined in, and of no other.

Kernels share their work by taking pieces of it as they go, so a thread that the
operating system delays does not delay the others. No fast-math flag is used that assumes
there are no NaNs, and none at all where results must not depend on the vector width.
"""

import ctypes
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

import numpy as np
from adamax._exact import History
from adamax._rule import Coefficients

from . import Float64Array, Int64Array, Storage, _threads, state_dtype

# Pieces of work: large enough that taking one costs nothing, small enough to balance.
_DENSE_PIECE = 32 * 1024
_SQUARE_SUM_BLOCK = 64 * 1024
_ROWS_PIECE_ELEMENTS = 4 * 1024
# Waking a thread takes about as long as updating this many elements in a cache, or half
# as many in rows all over memory.
_ELEMENTS_WORTH_A_THREAD = 128 * 1024

_PREFETCH_ROWS = 2
_PREFETCH_STAMPS = 8
_PREFETCH_BYTES = 512  # of each row
_CACHE_LINE = 64
_RADIX_BITS = 11

# A zero of the type that stands for a storage inside compiled code, which knows neither
# half-precision type: their 16-bit words pass as integers.
_WORD_OF = {
    Storage.FLOAT32: np.float32(0),
    Storage.FLOAT64: np.float64(0),
    Storage.FLOAT16: np.int16(0),
    Storage.BFLOAT16: np.uint16(0),
}
_FLOAT16, _BFLOAT16 = types.int16, types.uint16


# --- Memory and conversions, in terms LLVM can vectorise -------------------------------


def _number_type(word: types.Type) -> types.Type:
    return types.float32 if word in (_FLOAT16, _BFLOAT16) else word


@intrinsic
def _pointer(typing_context, address, word):
    """``address`` as a pointer to words of the type of ``word``."""
    signature = types.CPointer(word)(address, word)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, codegen


@intrinsic
def _itemsize(typing_context, word):
    """The size of a word in bytes."""

    def codegen(context, builder, signature, arguments):
        size = context.get_abi_sizeof(context.get_value_type(word))
        return context.get_constant(types.int64, size)

    return types.int64(word), codegen


@intrinsic
def _load(typing_context, pointer, index):
    """The number at ``pointer[index]``, 16-bit words widened to float32."""
    word = pointer.dtype
    signature = _number_type(word)(pointer, index)

    def codegen(context, builder, signature, arguments):
        bits = builder.load(builder.gep(arguments[0], [arguments[1]]))
        return _widen[word](builder, bits) if word in _widen else bits

    return signature, codegen


@intrinsic
def _store(typing_context, pointer, index, number):
    """Round ``number`` to nearest, ties to even, and write it to ``pointer[index]``."""
    word = pointer.dtype
    signature = types.void(pointer, index, number)

    def codegen(context, builder, signature, arguments):
        target, number = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        builder.store(_narrow[word](builder, number) if word in _narrow else number, target)
        return context.get_dummy_value()

    return signature, codegen


# 16-bit words are converted in integer arithmetic: without hardware support LLVM would call
# functions that are not there, and abort.

_BITS = ir.IntType(32)
_HALF_EXPONENT = 0x7C00  # of infinity and NaN
_REBIAS = (127 - 15) << 23  # from the exponents of float16 to those of float32


def _float(builder, bits):
    return builder.bitcast(bits, ir.FloatType())


def _widen_bfloat16(builder, word):
    return _float(builder, builder.shl(builder.zext(word, _BITS), _BITS(16)))


def _narrow_bfloat16(builder, number):
    bits = builder.bitcast(number, _BITS)
    high = builder.lshr(bits, _BITS(16))
    rounded = builder.lshr(_round_half_to_even(builder, bits, 16), _BITS(16))
    quiet_nan = builder.or_(high, _BITS(0x40))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, quiet_nan, rounded), ir.IntType(16))


def _widen_float16(builder, word):
    bits = builder.zext(word, _BITS)
    sign = builder.shl(builder.and_(bits, _BITS(0x8000)), _BITS(16))
    size = builder.and_(bits, _BITS(0x7FFF))
    shifted = builder.shl(size, _BITS(13))
    normal = builder.add(shifted, _BITS(_REBIAS))
    special = builder.or_(shifted, _BITS(0x7F800000))
    subnormal = builder.bitcast(
        builder.fmul(builder.uitofp(size, ir.FloatType()), ir.FloatType()(2.0**-24)), _BITS
    )
    is_special = builder.icmp_unsigned(">=", size, _BITS(_HALF_EXPONENT))
    is_subnormal = builder.icmp_unsigned("<", size, _BITS(0x0400))
    finite = builder.select(is_subnormal, subnormal, normal)
    return _float(builder, builder.or_(builder.select(is_special, special, finite), sign))


def _narrow_float16(builder, number):
    bits = builder.bitcast(number, _BITS)
    sign = builder.and_(builder.lshr(bits, _BITS(16)), _BITS(0x8000))
    size = builder.and_(bits, _BITS(0x7FFFFFFF))
    rounded = _round_half_to_even(builder, size, 13)
    normal = builder.lshr(builder.sub(rounded, _BITS(_REBIAS)), _BITS(13))
    # Adding 0.5 leaves as many bits as the result has, correctly rounded.
    half = ir.FloatType()(0.5)
    subnormal = builder.sub(
        builder.bitcast(builder.fadd(_float(builder, size), half), _BITS), _BITS(0x3F000000)
    )
    payload = builder.and_(builder.lshr(size, _BITS(13)), _BITS(0x01FF))
    quiet_nan = builder.or_(payload, _BITS(0x7E00))
    result = builder.select(
        builder.icmp_unsigned("<", size, _BITS(0x38800000)), subnormal, normal
    )
    overflows = builder.icmp_unsigned(">=", size, _BITS(0x477FF000))
    result = builder.select(overflows, _BITS(_HALF_EXPONENT), result)
    is_nan = builder.icmp_unsigned(">", size, _BITS(0x7F800000))
    result = builder.select(is_nan, quiet_nan, result)
    return builder.trunc(builder.or_(result, sign), ir.IntType(16))


def _round_half_to_even(builder, bits, dropped):
    """``bits``, rounded so that the lowest ``dropped`` bits can be shifted out."""
    odd = builder.and_(builder.lshr(bits, _BITS(dropped)), _BITS(1))
    return builder.add(bits, builder.add(odd, _BITS((1 << (dropped - 1)) - 1)))


_widen = {_FLOAT16: _widen_float16, _BFLOAT16: _widen_bfloat16}
_narrow = {_FLOAT16: _narrow_float16, _BFLOAT16: _narrow_bfloat16}


@intrinsic
def _as_number(typing_context, scalar, word):
    """The float64 ``scalar`` in the type arithmetic on words of this type is done in."""
    number = _number_type(word)
    signature = number(types.float64, word)

    def codegen(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], types.float64, number)

    return signature, codegen


@intrinsic
def _power_of_two(typing_context, exponent):
    """``2.0**exponent`` for an exponent that normal numbers have."""

    def codegen(context, builder, signature, arguments):
        word = ir.IntType(64)
        bits = builder.shl(builder.add(arguments[0], word(1023)), word(52))
        return builder.bitcast(bits, ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def _prefetch(typing_context, address):
    """Ask for the cache line at ``address``; harmless for any address."""
    signature = types.void(types.int64)

    def codegen(context, builder, signature, arguments):
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            (pointer,),
            ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]),
        )
        for_writing, keep, data = i32(1), i32(3), i32(1)
        target = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [target, for_writing, keep, data])
        return context.get_dummy_value()

    return signature, codegen


def _atomic(operation):
    """The function ``(address, number)`` that applies ``operation`` to the int64 there.

    It returns what was there before.
    """

    @intrinsic
    def atomic(typing_context, address, number):
        signature = types.int64(types.int64, types.int64)

        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], "seq_cst")

        return signature, codegen

    return atomic


_add, _or = _atomic("add"), _atomic("or")


@intrinsic
def _look(typing_context, address):
    """The int64 at ``address``, as it is at this moment."""
    signature = types.int64(types.int64)

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", align=8)

    return signature, codegen


# --- Compilation -----------------------------------------------------------------------

_inlined = numba.njit(error_model="numpy")


def _kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile on first use, release the GIL, keep the machine code on disk if possible."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(
                function
            )
        except RuntimeError:  # no directory that Numba could write a cache to
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return compiled


_compiled: set[tuple[Any, ...]] = set()


def _call(kernel: Any, *arguments: Any) -> Any:
    """Call ``kernel``, compiled before for arguments of these types."""
    signature = (kernel, *map(type, arguments))
    if signature not in _compiled:
        types_ = tuple(map(numba.typeof, arguments))
        # An interrupt in the midst of code generation leaves machine code that is broken.
        _threads.run_uninterrupted(lambda: _compile(kernel, types_))
        _compiled.add(signature)
    return kernel(*arguments)


def _compile(kernel: Any, signature: tuple[types.Type, ...]) -> None:
    try:
        kernel.compile(signature)
    except OSError:
        # The cache cannot be written (a full disk, say). Numba keeps what it compiled in
        # memory before it tries to save it.
        kernel.compile(signature)


# --- Work shared between threads --------------------------------------------------------
#
# A board is memory that the threads of one launch share: how much of the work has been
# taken, and far enough away to be on another cache line, how many helpers are at it, or
# that it is closed to them.

_TAKEN, _HELPERS = 0, 16
_CLOSED = 1 << 32
_LOOKS = 50_000  # about as long as it takes to go to sleep and wake up
_SECONDS_TO_SLEEP = 1e-5


@_inlined
def _at(board, place):
    return board.ctypes.data + place * board.itemsize


@_inlined
def _take(board, amount):
    """Take ``amount`` of the work; where it begins."""
    return _add(_at(board, _TAKEN), amount)


@_inlined
def _join(board, helping):
    """Whether this thread may work; if so it calls :func:`_leave` in the end."""
    if not helping or _add(_at(board, _HELPERS), 1) < _CLOSED:
        return True
    _add(_at(board, _HELPERS), -1)
    return False


@_inlined
def _leave(board, helping):
    if helping:
        _add(_at(board, _HELPERS), -1)
        # The owner goes first, or it would have to sleep until the GIL is free again.
        looks = 0
        while looks < _LOOKS and _look(_at(board, _HELPERS)) < _CLOSED:
            looks += 1


@_kernel()
def _close(board):
    """Let no helper join any more; whether all have left within a short time."""
    _or(_at(board, _HELPERS), _CLOSED)
    looks = 0
    while looks < _LOOKS and _look(_at(board, _HELPERS)) != _CLOSED:
        looks += 1
    return looks < _LOOKS


class _Launch:
    """A kernel that is called in several threads."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        self._kernel = kernel
        self._arguments = arguments
        self._board = np.zeros(_HELPERS + 1, np.int64)
        self._closed = False

    def work(self) -> None:
        _call(self._kernel, *self._arguments, self._board, False)

    def help(self) -> None:
        _call(self._kernel, *self._arguments, self._board, True)

    def close(self) -> None:
        while not self._closed:
            self._closed = _call(_close, self._board)
            if not self._closed:
                time.sleep(_SECONDS_TO_SLEEP)


def _call_in_parallel(kernel: Any, elements: int, threads: int, *arguments: Any) -> None:
    """Call ``kernel(*arguments, board, helping)`` in the threads the work is worth."""
    threads = min(threads, 1 + elements // _ELEMENTS_WORTH_A_THREAD)
    _threads.run(_Launch(kernel, arguments), threads)


# --- The rule --------------------------------------------------------------------------


@_inlined
def _scalars(factors, coefficients, word):
    """What :func:`_update` takes besides memory, in the type of its arithmetic."""
    return (
        _as_number(factors[0], word),  # in the order of Factor
        _as_number(factors[1], word),
        _as_number(factors[2], word),
        _as_number(factors[3], word),
        _as_number(coefficients[0], word),
        _as_number(coefficients[1], word),
        _as_number(coefficients[2], word),
        _as_number(coefficients[3], word),
    )


@_inlined
def _update(w, m, u, g, length, scalars):
    """The rule on ``length`` elements at four pointers."""
    step_size, decay, scale, coupled_decay = scalars[:4]
    one_minus_beta_1, beta_2, epsilon, clipvalue = scalars[4:]
    for i in range(length):
        parameter = _load(w, i)
        gradient = scale * _load(g, i)
        gradient = clipvalue if gradient > clipvalue else gradient
        gradient = -clipvalue if gradient < -clipvalue else gradient
        if coupled_decay != 0:  # else an infinite parameter would make the gradient NaN
            gradient = gradient + coupled_decay * parameter
        moment = _load(m, i)
        moment = moment + one_minus_beta_1 * (gradient - moment)
        size = abs(gradient)
        decayed = beta_2 * _load(u, i)
        # A NaN in either must come out, hence not max().
        norm = decayed if decayed > size or decayed != decayed else size
        _store(m, i, moment)
        _store(u, i, norm)
        _store(w, i, decay * parameter - step_size * (moment / (norm + epsilon)))


@_kernel()
def _dense_step(word, number, addresses, lengths, factors, coefficients, board, helping):
    total = lengths.sum()
    if not _join(board, helping):
        return
    while True:
        start = _take(board, _DENSE_PIECE)
        if start >= total:
            break
        stop = min(start + _DENSE_PIECE, total)
        before = 0
        for i in range(lengths.shape[0]):
            first = max(start - before, 0)
            length = min(stop - before, lengths[i]) - first
            before += lengths[i]
            if length > 0:
                _update(
                    _pointer(addresses[i, 0] + first * _itemsize(word), word),
                    _pointer(addresses[i, 1] + first * _itemsize(number), number),
                    _pointer(addresses[i, 2] + first * _itemsize(number), number),
                    _pointer(addresses[i, 3] + first * _itemsize(word), word),
                    length,
                    _scalars(factors[i], coefficients, word),
                )
    _leave(board, helping)


@_inlined
def _scratch(room, number):
    """A pointer to memory of this thread.

    It must be asked for in the loop that needs it: Numba frees an array after the last use
    of its name, whatever still points to it, and another thread may then get the memory.
    """
    return _pointer(room.ctypes.data, number)


@_inlined
def _prefetch_begin(address, length):
    """Fetch what begins at an address, as far as it is worth it."""
    for line in range(0, min(length, _PREFETCH_BYTES), _CACHE_LINE):
        _prefetch(address + line)


@_inlined
def _prefetch_row(addresses, row, word_bytes, number_bytes):
    """Fetch a row of w, m and u."""
    _prefetch_begin(addresses[0] + row * word_bytes, word_bytes)
    _prefetch_begin(addresses[1] + row * number_bytes, number_bytes)
    _prefetch_begin(addresses[2] + row * number_bytes, number_bytes)


@_kernel()
def _rows_step(
    word,
    number,
    keys,
    shift,
    addresses,
    row_length,
    factors,
    coefficients,
    piece,
    board,
    helping,
):
    count = keys.shape[0]
    word_bytes = row_length * _itemsize(word)
    number_bytes = row_length * _itemsize(number)
    scalars = _scalars(factors, coefficients, word)
    summed = np.empty(row_length, np.float64)  # room for either type of number
    if not _join(board, helping):
        return
    while True:
        start = _take(board, piece)
        if start >= count:
            break
        stop = min(start + piece, count)
        i = _next_row(keys, shift, start, stop)
        while i < stop:
            if i + _PREFETCH_ROWS < count:
                row, position = _split(keys[i + _PREFETCH_ROWS], shift)
                _prefetch_row(addresses, row, word_bytes, number_bytes)
                _prefetch_begin(addresses[3] + position * word_bytes, word_bytes)
            row, position = _split(keys[i], shift)
            w = _pointer(addresses[0] + row * word_bytes, word)
            m = _pointer(addresses[1] + row * number_bytes, number)
            u = _pointer(addresses[2] + row * number_bytes, number)
            end = _end_of_row(keys, shift, i)
            if end == i + 1:
                g = _pointer(addresses[3] + position * word_bytes, word)
                _update(w, m, u, g, row_length, scalars)
            else:
                total = _scratch(summed, number)
                _sum_row(total, keys, shift, i, end, addresses[3], row_length, word)
                _update(w, m, u, total, row_length, scalars)
            i = end
    _leave(board, helping)


# --- What rows have missed ---------------------------------------------------------------


@_inlined
def _opened(history):
    """Where the numbers of a history lie, and those of now."""
    sums, products, zeros, steps, window = history
    return (
        _pointer(sums.ctypes.data, 0.0),
        sums.shape[1],
        _pointer(products.ctypes.data, 0.0),
        _pointer(products.ctypes.data + steps * products.itemsize * 6, 0.0),
        _pointer(zeros.ctypes.data, 0),
        steps,
        window,
    )


@_inlined
def _product(opened, column, entry):
    """The product of the factors in a column of all steps after ``entry``."""
    _, _, products, last, zeros, _, _ = opened
    if entry < _load(zeros, column):
        return 0.0
    product = _load(last, column) / _load(products, 6 * entry + column)
    exponent = np.int64(_load(last, column + 3) - _load(products, 6 * entry + column + 3))
    if -1022 <= exponent <= 1023:
        return product * _power_of_two(exponent)
    return math.ldexp(product, exponent)


@_inlined
def _four_terms(s, x, a, b):
    """Clenshaw's recurrence for the terms ``s`` of a Chebyshev series in ``x / 2``."""
    b = s[3] + x * a - b
    a = s[2] + x * b - a
    b = s[1] + x * a - b
    a = s[0] + x * b - a
    return a, b


@_inlined
def _missed(opened, entry):
    """What a row has missed since an entry of the history.

    That is the factors of w, m and u, and what the sums must be multiplied by, where they
    are, at which place, and how many.
    """
    sums, terms, _, _, _, steps, window = opened
    later = _product(opened, 0, entry + window) if entry + window < steps else 1.0
    factors = (
        _product(opened, 0, entry),
        _product(opened, 1, entry),
        _product(opened, 2, entry),
    )
    return factors, later, sums, entry * terms, terms


@_inlined
def _pay_out(w, m, u, length, missed, epsilon, scratch, word):
    """Bring one row at three pointers up to date."""
    factors, later, sums, place, terms = missed
    of_w = _as_number(factors[0], word)
    of_m = _as_number(factors[1], word)
    of_u = _as_number(factors[2], word)
    epsilon = _as_number(epsilon, word)
    zero, half, one = _as_number(0.0, word), _as_number(0.5, word), _as_number(1.0, word)
    two, four = _as_number(2.0, word), _as_number(4.0, word)
    constant = _as_number(_load(sums, place) * later, word)
    s = _terms(sums, place + 1, later, word)
    if terms == 5:
        for i in range(length):
            norm, moment = _load(u, i), _load(m, i)
            inverse = one / (norm + epsilon)
            x = four * (norm * inverse) - two
            a, b = _four_terms(s, x, zero, zero)
            series = constant + half * x * a - b
            _store(w, i, of_w * _load(w, i) - moment * inverse * series)
            _store(m, i, of_m * moment)
            _store(u, i, of_u * norm)
        return
    first, second = _scratch(scratch[0], half), _scratch(scratch[1], half)
    for i in range(length):
        _store(first, i, zero)
        _store(second, i, zero)
    for n in range(terms - 4, 0, -4):
        some = _terms(sums, place + n, later, word)
        for i in range(length):
            norm = _load(u, i)
            x = four * (norm * (one / (norm + epsilon))) - two
            a, b = _four_terms(some, x, _load(first, i), _load(second, i))
            _store(first, i, a)
            _store(second, i, b)
    for i in range(length):
        norm, moment = _load(u, i), _load(m, i)
        inverse = one / (norm + epsilon)
        x = four * (norm * inverse) - two
        _store(first, i, constant + half * x * _load(first, i) - _load(second, i))
        _store(second, i, moment * inverse)
        _store(m, i, of_m * moment)
        _store(u, i, of_u * norm)
    for i in range(length):
        _store(w, i, of_w * _load(w, i) - _load(second, i) * _load(first, i))


@_inlined
def _terms(sums, place, later, word):
    return (
        _as_number(_load(sums, place) * later, word),
        _as_number(_load(sums, place + 1) * later, word),
        _as_number(_load(sums, place + 2) * later, word),
        _as_number(_load(sums, place + 3) * later, word),
    )


@_inlined
def _catch_up_row(row, word, number, addresses, row_length, opened, now, epsilon, scratch):
    """Whether the row was behind; it is not any more."""
    stamp = _pointer(addresses[3] + 4 * row, np.uint32(0))
    behind = np.int64(np.uint32(now - _load(stamp, 0)))
    if behind == 0:
        return 0
    _pay_out(
        _pointer(addresses[0] + row * row_length * _itemsize(word), word),
        _pointer(addresses[1] + row * row_length * _itemsize(number), number),
        _pointer(addresses[2] + row * row_length * _itemsize(number), number),
        row_length,
        _missed(opened, opened[5] - behind),
        epsilon,
        scratch,
        word,
    )
    _store(stamp, 0, now)
    return 1


@_kernel()
def _catch_up_rows(
    word,
    number,
    keys,
    shift,
    addresses,
    row_length,
    history,
    now,
    epsilon,
    piece,
    caught_up,
    board,
    helping,
):
    count = keys.shape[0]
    word_bytes = row_length * _itemsize(word)
    number_bytes = row_length * _itemsize(number)
    scratch = np.empty((2, row_length))  # room for either type of number
    opened = _opened(history)
    copies = addresses[4]
    if not _join(board, helping):
        return
    mine = 0
    while True:
        start = _take(board, piece)
        if start >= count:
            break
        stop = min(start + piece, count)
        i = _next_row(keys, shift, start, stop)
        while i < stop:
            if i + _PREFETCH_STAMPS < count:
                row, _ = _split(keys[i + _PREFETCH_STAMPS], shift)
                _prefetch(addresses[3] + 4 * row)
            if i + _PREFETCH_ROWS < count:
                row, _ = _split(keys[i + _PREFETCH_ROWS], shift)
                _prefetch_row(addresses, row, word_bytes, number_bytes)
            row, _ = _split(keys[i], shift)
            mine += _catch_up_row(
                row, word, number, addresses, row_length, opened, now, epsilon, scratch
            )
            end = _end_of_row(keys, shift, i)
            if copies:
                w = _pointer(addresses[0] + row * word_bytes, word)
                for j in range(i, end):
                    _, position = _split(keys[j], shift)
                    copy = _pointer(copies + position * word_bytes, word)
                    for k in range(row_length):
                        _store(copy, k, _load(w, k))
            i = end
    _add(_at(caught_up, 0), mine)
    _leave(board, helping)


@_kernel()
def _catch_up_table(
    word,
    number,
    first,
    last,
    addresses,
    row_length,
    history,
    now,
    epsilon,
    piece,
    caught_up,
    board,
    helping,
):
    scratch = np.empty((2, row_length))  # room for either type of number
    opened = _opened(history)
    if not _join(board, helping):
        return
    mine = 0
    while True:
        start = first + _take(board, piece)
        if start >= last:
            break
        for row in range(start, min(start + piece, last)):
            mine += _catch_up_row(
                row, word, number, addresses, row_length, opened, now, epsilon, scratch
            )
    _add(_at(caught_up, 0), mine)
    _leave(board, helping)


@_kernel()
def _find_behind(keys, shift, stamps, now):
    for i in range(keys.shape[0]):
        row, _ = _split(keys[i], shift)
        if _load(_pointer(stamps + 4 * row, np.uint32(0)), 0) != now:
            return row
    return -1


@_kernel()
def _stamp_rows(keys, shift, stamps, now):
    for i in range(keys.shape[0]):
        row, _ = _split(keys[i], shift)
        _store(_pointer(stamps + 4 * row, np.uint32(0)), 0, now)


# --- Grouping of indices: a key is the row in the high bits, the position in the low ----


@_inlined
def _split(key, shift):
    position = key & ((np.uint64(1) << shift) - np.uint64(1))
    return np.int64(key >> shift), np.int64(position)


@_inlined
def _next_row(keys, shift, start, stop):
    """The first position in ``[start, stop)`` at which a row begins, or ``stop``."""
    if start > 0:
        row = keys[start - 1] >> shift
        while start < stop and (keys[start] >> shift) == row:
            start += 1
    return start


@_inlined
def _end_of_row(keys, shift, start):
    row = keys[start] >> shift
    end = start + 1
    while end < keys.shape[0] and (keys[end] >> shift) == row:
        end += 1
    return end


@_inlined
def _sum_row(total, keys, shift, start, end, values, row_length, word):
    """Sum the values of one row, in the order in which they were given."""
    row_bytes = row_length * _itemsize(word)
    for i in range(start, end):
        _, position = _split(keys[i], shift)
        g = _pointer(values + position * row_bytes, word)
        if i == start:
            for j in range(row_length):
                _store(total, j, _load(g, j))
        else:
            for j in range(row_length):
                _store(total, j, _load(total, j) + _load(g, j))


@_kernel()
def _group_rows(index, indices, rows, shift, keys, scratch):
    """Write the sorted keys of the indices at an address.

    Returns the position of the first index outside ``[0, rows)`` or -1, and whether the
    keys are in ``scratch``.
    """
    index = _pointer(indices, index)
    ascending, previous, largest = True, np.int64(-1), np.int64(0)
    for position in range(keys.shape[0]):
        row = np.int64(_load(index, position))
        if row < 0 or row >= rows:
            return position, False
        keys[position] = (np.uint64(row) << shift) | np.uint64(position)
        ascending = ascending and row >= previous
        previous = row
        largest = max(largest, row)
    return -1, not ascending and _sort_keys(keys, scratch, shift, largest)


@_inlined
def _sort_keys(keys, scratch, shift, largest):
    """Radix sort by the row, at most ``largest``; equal rows keep their order.

    Returns whether the sorted keys are in ``scratch``.
    """
    bits = 1
    while largest >> bits:
        bits += 1
    passes = (bits + _RADIX_BITS - 1) // _RADIX_BITS
    width = (bits + passes - 1) // passes
    places = np.empty(1 << width, np.int64)
    mask = np.uint64((1 << width) - 1)
    for digit in range(passes):
        low = shift + np.uint64(digit * width)
        places[:] = 0
        for i in range(keys.shape[0]):
            places[np.int64((keys[i] >> low) & mask)] += 1
        place = 0
        for value in range(places.shape[0]):
            occurrences = places[value]
            places[value] = place
            place += occurrences
        for i in range(keys.shape[0]):
            value = np.int64((keys[i] >> low) & mask)
            scratch[places[value]] = keys[i]
            places[value] += 1
        keys, scratch = scratch, keys
    return passes % 2 == 1


# --- Sums of squares: float64, in blocks of a fixed size, so that any number of threads
# adds in the same order ----------------------------------------------------------------


@_kernel(fastmath={"reassoc"})
def _dense_square_sums(word, addresses, lengths, first_blocks, sums, board, helping):
    if not _join(board, helping):
        return
    while True:
        block = _take(board, 1)
        if block >= sums.shape[0]:
            break
        i = np.searchsorted(first_blocks, block, side="right") - 1
        start = (block - first_blocks[i]) * _SQUARE_SUM_BLOCK
        length = min(_SQUARE_SUM_BLOCK, lengths[i] - start)
        g = _pointer(addresses[i] + start * _itemsize(word), word)
        total = 0.0
        for j in range(length):
            number = np.float64(_load(g, j))
            total += number * number
        sums[block] = total
    _leave(board, helping)


@_kernel(fastmath={"reassoc"})
def _rows_square_sums(
    word, number, keys, shift, values, row_length, piece, sums, board, helping
):
    summed = np.empty(row_length, np.float64)  # room for either type of number
    if not _join(board, helping):
        return
    while True:
        block = _take(board, 1)
        if block >= sums.shape[0]:
            break
        stop = min((block + 1) * piece, keys.shape[0])
        i = _next_row(keys, shift, block * piece, stop)
        square_sum = 0.0
        while i < stop:
            end = _end_of_row(keys, shift, i)
            total = _scratch(summed, number)
            _sum_row(total, keys, shift, i, end, values, row_length, word)
            for j in range(row_length):
                element = np.float64(_load(total, j))
                square_sum += element * element
            i = end
        sums[block] = square_sum
    _leave(board, helping)


# The fields of a NumPy array object, which all extensions that were compiled against NumPy
# know as well. Python code takes 20 microseconds to ask for an address when that code is
# not in the caches, which is a twentieth of a sparse step, and a millisecond to look at
# some hundred arrays.
_TYPE = object.__basicsize__ - 8
_DATA = object.__basicsize__
_RANK = _DATA + 8
_SHAPE = _DATA + 16
_STRIDES = _DATA + 24
_DTYPE = _DATA + 40
_FLAGS = _DATA + 48
_ALIGNED, _WRITEABLE = 0x0100, 0x0400


def _check_fields() -> None:
    """Raise if the NumPy that is installed has other fields."""
    array = np.zeros((3, 7), np.float32)[:, 1:5]
    array.flags.writeable = False

    def read(address: int, type_: Any = ctypes.c_int64) -> int:
        value: int = type_.from_address(address).value
        return value

    start = id(array)
    known = (
        read(start + _TYPE) == id(np.ndarray)
        and read(start + _DATA) == array.ctypes.data
        and read(start + _DTYPE) == id(array.dtype)
        and read(start + _RANK, ctypes.c_int32) == 2
        and read(start + _FLAGS, ctypes.c_int32) & (_ALIGNED | _WRITEABLE) == _ALIGNED
        and read(read(start + _SHAPE) + 8) == array.shape[1]
        and read(read(start + _STRIDES) + 8) == array.strides[1]
    )
    if not known:
        raise ImportError(
            f"NumPy {np.__version__} keeps its arrays in a way that this version of adamax "
            f"does not know; NUMBA_DISABLE_JIT=1 makes it do without, slowly"
        )


_check_fields()


@_kernel()
def _read_word(address):
    return _load(_pointer(address, np.int64(0)), 0)


@_inlined
def _read_half_word(address):
    return np.int64(_load(_pointer(address, np.int32(0)), 0))


@_kernel()
def _find_arrays(objects, array_type, layouts, flags, addresses):
    """Write the addresses of arrays, and return whether all have the given layouts.

    A layout is the address of the dtype, the rank, the shape and the strides.
    """
    for i in range(objects.shape[0]):
        array, layout = objects[i], layouts[i]
        rank = layout[1]
        if (
            _read_word(array + _TYPE) != array_type
            or _read_word(array + _DTYPE) != layout[0]
            or _read_half_word(array + _RANK) != rank
            or _read_half_word(array + _FLAGS) & flags != flags
        ):
            return False
        shape, strides = _read_word(array + _SHAPE), _read_word(array + _STRIDES)
        for axis in range(rank):
            if (
                _read_word(shape + 8 * axis) != layout[2 + axis]
                or _read_word(strides + 8 * axis) != layout[2 + rank + axis]
            ):
                return False
        addresses[i] = _read_word(array + _DATA)
    return True


@_kernel()
def _advance(word, addresses, values):
    for i in range(addresses.shape[0]):
        counter = _pointer(addresses[i], word)
        value = _load(counter, 0) + _as_number(1.0, word)
        _store(counter, 0, value)
        values[i] = value


# --- The verbs -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowGroups:
    keys: npt.NDArray[np.uint64]  # ascending
    shift: np.uint64  # row and position part here


def dense_step(
    storage: Storage,
    addresses: Int64Array,
    lengths: Int64Array,
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    _call_in_parallel(
        _dense_step,
        int(lengths.sum()),
        threads,
        *_types_of(storage),
        addresses,
        lengths,
        factors,
        _as_array(coefficients),
    )


def dense_square_sums(
    storage: Storage, addresses: Int64Array, lengths: Int64Array, threads: int
) -> Float64Array:
    blocks = np.maximum(-(-lengths // _SQUARE_SUM_BLOCK), 1)
    first_blocks = np.cumsum(blocks) - blocks
    sums = np.empty(int(blocks.sum()))
    _call_in_parallel(
        _dense_square_sums,
        int(lengths.sum()),
        threads,
        _WORD_OF[storage],
        addresses,
        lengths,
        first_blocks,
        sums,
    )
    return np.add.reduceat(sums, first_blocks) if sums.size else sums


def group_rows(indices: npt.NDArray[np.int32] | Int64Array, rows: int) -> RowGroups:
    if not indices.flags.c_contiguous:
        indices = indices.copy()
    position_bits = max(indices.size - 1, 0).bit_length()
    if position_bits + rows.bit_length() > 64:
        raise ValueError(f"cannot group {indices.size} indices into {rows} rows")
    shift = np.uint64(position_bits)
    keys, scratch = np.empty((2, indices.size), np.uint64)
    outside, in_scratch = _call(
        _group_rows,
        indices.dtype.type(0),
        array_address(indices),
        rows,
        shift,
        keys,
        scratch,
    )
    if outside >= 0:
        raise IndexError(
            f"indices[{outside}] must be in [0, {rows}), got {indices[outside]}"
        )
    return RowGroups(scratch if in_scratch else keys, shift)


def rows_step(
    storage: Storage,
    groups: RowGroups,
    addresses: Int64Array,
    row_length: int,
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    _call_in_parallel(
        _rows_step,
        2 * groups.keys.size * row_length,
        threads,
        *_types_of(storage),
        groups.keys,
        groups.shift,
        addresses,
        row_length,
        factors,
        _as_array(coefficients),
        _rows_piece(row_length),
    )


def rows_square_sum(
    storage: Storage, groups: RowGroups, address: int, row_length: int, threads: int
) -> float:
    piece = _rows_piece(row_length)
    sums = np.empty(-(-groups.keys.size // piece))
    _call_in_parallel(
        _rows_square_sums,
        2 * groups.keys.size * row_length,
        threads,
        *_types_of(storage),
        groups.keys,
        groups.shift,
        address,
        row_length,
        piece,
        sums,
    )
    return float(sums.sum())


def catch_up_rows(
    storage: Storage,
    groups: RowGroups,
    addresses: Int64Array,
    row_length: int,
    history: History,
    now: int,
    epsilon: float,
    threads: int,
) -> int:
    caught_up = np.zeros(1, np.int64)
    _call_in_parallel(
        _catch_up_rows,
        3 * groups.keys.size * row_length,
        threads,
        *_types_of(storage),
        groups.keys,
        groups.shift,
        addresses,
        row_length,
        _arrays_of(history),
        np.uint32(now % 2**32),
        epsilon,
        _rows_piece(row_length),
        caught_up,
    )
    return int(caught_up[0])


def catch_up_table(
    storage: Storage,
    rows: tuple[int, int],
    addresses: Int64Array,
    row_length: int,
    history: History,
    now: int,
    epsilon: float,
    threads: int,
) -> int:
    caught_up = np.zeros(1, np.int64)
    _call_in_parallel(
        _catch_up_table,
        (rows[1] - rows[0]) * row_length,
        threads,
        *_types_of(storage),
        *rows,
        addresses,
        row_length,
        _arrays_of(history),
        np.uint32(now % 2**32),
        epsilon,
        8 * _rows_piece(row_length),
        caught_up,
    )
    return int(caught_up[0])


def find_behind(groups: RowGroups, stamps: int, now: int) -> int:
    row: int = _call(
        _find_behind, groups.keys, groups.shift, stamps, np.uint32(now % 2**32)
    )
    return row


def stamp_rows(groups: RowGroups, stamps: int, now: int) -> None:
    _call(_stamp_rows, groups.keys, groups.shift, stamps, np.uint32(now % 2**32))


def _arrays_of(history: History) -> tuple[Any, ...]:
    return history.sums, history.products, history.zeros, history.steps, history.window


def advance(storage: Storage, addresses: Int64Array) -> Float64Array:
    values = np.empty(addresses.size)
    _call(_advance, _WORD_OF[storage], addresses, values)
    return values


def array_address(array: npt.NDArray[Any]) -> int:
    address: int = _call(_read_word, id(array) + _DATA)
    return address


@dataclass(frozen=True, slots=True)
class ArrayLayouts:
    layouts: Int64Array
    dtypes: list[np.dtype[Any]]  # whose addresses are in ``layouts``


def array_layouts(arrays: Sequence[npt.NDArray[Any]]) -> ArrayLayouts:
    width = 2 + 2 * max((array.ndim for array in arrays), default=0)
    layouts = np.zeros((len(arrays), width), np.int64)
    for layout, array in zip(layouts, arrays, strict=True):
        fields = (id(array.dtype), array.ndim, *array.shape, *array.strides)
        layout[: len(fields)] = fields
    return ArrayLayouts(layouts, [array.dtype for array in arrays])


def find_arrays(
    like: ArrayLayouts, arrays: Sequence[npt.NDArray[Any]], *, writeable: bool
) -> Int64Array | None:
    addresses = np.empty(len(arrays), np.int64)
    found = _call(
        _find_arrays,
        np.fromiter(map(id, arrays), np.int64, len(arrays)),
        id(np.ndarray),
        like.layouts,
        _ALIGNED | _WRITEABLE if writeable else _ALIGNED,
        addresses,
    )
    return addresses if found else None


def _types_of(storage: Storage) -> tuple[Any, Any]:
    return _WORD_OF[storage], state_dtype(storage).type(0)


@functools.lru_cache(maxsize=16)  # the same in all steps of an optimizer
def _as_array(coefficients: Coefficients) -> Float64Array:
    return np.array(
        [
            coefficients.one_minus_beta_1,
            coefficients.beta_2,
            coefficients.epsilon,
            coefficients.clipvalue,
        ]
    )


def _rows_piece(row_length: int) -> int:
    return max(1, _ROWS_PIECE_ELEMENTS // max(row_length, 1))
