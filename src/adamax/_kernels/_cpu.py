"""The verbs for the CPU: fused passes over memory, compiled by Numba.

All compiled code is in this one file because Numba's disk cache notices a change of the
file a kernel is defined in, and of no other.

Kernels share their work by taking pieces from a counter in memory, so a thread that the
operating system delays does not delay the others. No fast-math flag is used that assumes
there are no NaNs, and none at all where results must not depend on the vector width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from adamax._rule import Coefficients

from . import Float64Array, Int64Array, Storage, _threads, state_dtype

# Pieces of work: large enough that taking one costs nothing, small enough to balance.
_DENSE_PIECE = 32 * 1024
_SQUARE_SUM_BLOCK = 64 * 1024
_ROWS_PIECE_ELEMENTS = 16 * 1024
# Waking a thread takes about as long as updating this many elements in a cache, or half
# as many in rows all over memory.
_ELEMENTS_WORTH_A_THREAD = 128 * 1024

_PREFETCH_ROWS = 8
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


@intrinsic
def _take(typing_context, counter, amount):
    """Add ``amount`` to the int64 at address ``counter``, atomically; the value before."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

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


def _call(kernel: Any, *arguments: Any) -> Any:
    """Call ``kernel``; failing to write to the cache (a full disk, say) is no error."""
    try:
        return kernel(*arguments)
    except OSError:
        # Only compiling can raise this, before the kernel has run, and Numba keeps what
        # it compiled in memory before it tries to save it.
        return kernel(*arguments)


def _call_in_parallel(kernel: Any, elements: int, threads: int, *arguments: Any) -> None:
    """Call ``kernel(*arguments, counter)`` in as many threads as the work is worth."""
    counter = np.zeros(1, np.int64)

    def task() -> None:
        _call(kernel, *arguments, counter)

    _threads.run(task, min(threads, 1 + elements // _ELEMENTS_WORTH_A_THREAD))


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
def _dense_step(word, number, addresses, lengths, factors, coefficients, counter):
    total = lengths.sum()
    while True:
        start = _take(counter.ctypes.data, _DENSE_PIECE)
        if start >= total:
            return
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


@_kernel()
def _rows_step(
    word, number, keys, shift, addresses, row_length, factors, coefficients, piece, counter
):
    count = keys.shape[0]
    word_bytes = row_length * _itemsize(word)
    number_bytes = row_length * _itemsize(number)
    scalars = _scalars(factors, coefficients, word)
    summed = np.empty(row_length, np.float64)  # room for either type of number
    total = _pointer(summed.ctypes.data, number)
    while True:
        start = _take(counter.ctypes.data, piece)
        if start >= count:
            return
        stop = min(start + piece, count)
        i = _next_row(keys, shift, start, stop)
        while i < stop:
            if i + _PREFETCH_ROWS < count:
                row, position = _split(keys[i + _PREFETCH_ROWS], shift)
                for line in range(0, min(word_bytes, _PREFETCH_BYTES), _CACHE_LINE):
                    _prefetch(addresses[0] + row * word_bytes + line)
                    _prefetch(addresses[3] + position * word_bytes + line)
                for line in range(0, min(number_bytes, _PREFETCH_BYTES), _CACHE_LINE):
                    _prefetch(addresses[1] + row * number_bytes + line)
                    _prefetch(addresses[2] + row * number_bytes + line)
            row, position = _split(keys[i], shift)
            w = _pointer(addresses[0] + row * word_bytes, word)
            m = _pointer(addresses[1] + row * number_bytes, number)
            u = _pointer(addresses[2] + row * number_bytes, number)
            end = _end_of_row(keys, shift, i)
            if end == i + 1:
                g = _pointer(addresses[3] + position * word_bytes, word)
                _update(w, m, u, g, row_length, scalars)
            else:
                _sum_row(total, keys, shift, i, end, addresses[3], row_length, word)
                _update(w, m, u, total, row_length, scalars)
            i = end


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
def _make_keys(index, indices, rows, shift, keys):
    """Write the keys of the indices at an address.

    Returns the position of the first index outside ``[0, rows)`` or -1, whether the keys
    are in ascending order, and the largest index.
    """
    index = _pointer(indices, index)
    ascending, previous, largest = True, np.int64(-1), np.int64(0)
    for position in range(keys.shape[0]):
        row = np.int64(_load(index, position))
        if row < 0 or row >= rows:
            return position, ascending, largest
        keys[position] = (np.uint64(row) << shift) | np.uint64(position)
        ascending = ascending and row >= previous
        previous = row
        largest = max(largest, row)
    return -1, ascending, largest


@_kernel()
def _sort_keys(keys, scratch, shift, bits):
    """Radix sort by the ``bits`` bits above ``shift``; equal rows keep their order.

    Returns whether the sorted keys are in ``scratch``.
    """
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
def _dense_square_sums(word, addresses, lengths, first_blocks, sums, counter):
    while True:
        block = _take(counter.ctypes.data, 1)
        if block >= sums.shape[0]:
            return
        i = np.searchsorted(first_blocks, block, side="right") - 1
        start = (block - first_blocks[i]) * _SQUARE_SUM_BLOCK
        length = min(_SQUARE_SUM_BLOCK, lengths[i] - start)
        g = _pointer(addresses[i] + start * _itemsize(word), word)
        total = 0.0
        for j in range(length):
            number = np.float64(_load(g, j))
            total += number * number
        sums[block] = total


@_kernel(fastmath={"reassoc"})
def _rows_square_sums(word, number, keys, shift, values, row_length, piece, sums, counter):
    summed = np.empty(row_length, np.float64)  # room for either type of number
    total = _pointer(summed.ctypes.data, number)
    while True:
        block = _take(counter.ctypes.data, 1)
        if block >= sums.shape[0]:
            return
        stop = min((block + 1) * piece, keys.shape[0])
        i = _next_row(keys, shift, block * piece, stop)
        square_sum = 0.0
        while i < stop:
            end = _end_of_row(keys, shift, i)
            _sum_row(total, keys, shift, i, end, values, row_length, word)
            for j in range(row_length):
                element = np.float64(_load(total, j))
                square_sum += element * element
            i = end
        sums[block] = square_sum


@_kernel()
def _read_words(addresses, words):
    zero = np.int64(0)
    for i in range(addresses.shape[0]):
        words[i] = _load(_pointer(addresses[i], zero), 0)


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
    indices = np.require(indices, requirements="C")
    position_bits = max(indices.size - 1, 0).bit_length()
    if position_bits + rows.bit_length() > 64:
        raise ValueError(f"cannot group {indices.size} indices into {rows} rows")
    shift = np.uint64(position_bits)
    keys = np.empty(indices.size, np.uint64)
    outside, ascending, largest = _call(
        _make_keys, indices.dtype.type(0), indices.ctypes.data, rows, shift, keys
    )
    if outside >= 0:
        raise IndexError(
            f"indices[{outside}] must be in [0, {rows}), got {indices[outside]}"
        )
    if not ascending:
        scratch = np.empty_like(keys)
        if _call(_sort_keys, keys, scratch, shift, largest.bit_length()):
            keys = scratch
    return RowGroups(keys, shift)


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


def advance(storage: Storage, addresses: Int64Array) -> Float64Array:
    values = np.empty(addresses.size)
    _call(_advance, _WORD_OF[storage], addresses, values)
    return values


def array_addresses(arrays: Sequence[npt.NDArray[Any]]) -> Int64Array:
    """Where the elements of NumPy arrays begin; ``.ctypes.data`` takes a microsecond each.

    The pointer is the first field of an array object, on which all extensions that were
    compiled against NumPy rely. That it is there is checked all the same.
    """
    if not arrays:
        return np.empty(0, np.int64)
    objects = np.array([id(array) for array in arrays], np.int64)
    addresses = np.empty(len(arrays), np.int64)
    _call(_read_words, objects + object.__basicsize__, addresses)
    if addresses[0] != arrays[0].ctypes.data or addresses[-1] != arrays[-1].ctypes.data:
        return np.array([array.ctypes.data for array in arrays], np.int64)
    return addresses


def _types_of(storage: Storage) -> tuple[Any, Any]:
    return _WORD_OF[storage], state_dtype(storage).type(0)


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
