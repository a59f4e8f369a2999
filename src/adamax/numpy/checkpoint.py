"""State in files: checkpoints by safetensors, and memory-mapped state."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .._core.memory import zeros_beside

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

Array: TypeAlias = npt.NDArray[Any]
Layout: TypeAlias = tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]

_FORMAT = {"format": "adamax", "version": "1"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
_OTHER: np.dtype[Any] = np.dtype(object)
_BYTES_AT_ONCE = 1 << 26
_MOST_ITERATIONS = 1 << 53  # float64 tells them apart


class WithState(Protocol):
    """A parameter, as far as it matters here."""

    name: str
    m: Array
    u: Array

    @property
    def array(self) -> Array | None: ...
    @property
    def state_layout(self) -> Layout: ...


class ArrayLike(Protocol):
    """What an array and an entry of a file have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, key: Any, /) -> Any: ...


# --- New state ---------------------------------------------------------------------------


def zero_state(
    parameters: Sequence[WithState], directory: Path | None, first_number: int
) -> list[tuple[Array, Array]]:
    """Zero ``m`` and ``u`` for each parameter, in memory or in files of a directory.

    Raises:
        FileExistsError: a file of another optimizer is in the way.
        OSError: there is no room for the files. None is left behind then.
    """
    if directory is None:
        return [(_in_memory(p, 1), _in_memory(p, 2)) for p in parameters]
    paths = [
        directory / f"{number}.{part}.npy"
        for number in range(first_number, first_number + len(parameters))
        for part in ("m", "u")
    ]
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"state_dir must not hold the state of another optimizer, but "
                f"{str(path)!r} exists"
            )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        arrays = [
            _in_file(path, parameters[i // 2].state_layout) for i, path in enumerate(paths)
        ]
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def _in_memory(parameter: WithState, number: int) -> Array:
    assert parameter.array is not None
    shape, dtype, order = parameter.state_layout
    return zeros_beside(parameter.array.ctypes.data, number, shape, dtype, order)


def _in_file(path: Path, layout: Layout) -> Array:
    shape, dtype, order = layout
    if 0 in shape:
        return np.zeros(shape, dtype)
    array = np.lib.format.open_memmap(
        path, mode="w+", dtype=dtype, shape=shape, fortran_order=order == "F"
    )
    if hasattr(os, "posix_fallocate"):
        # Else a full disk would kill the process when it writes to the memory.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


# --- Loading state -----------------------------------------------------------------------

Loading: TypeAlias = list[tuple[WithState, Literal["m", "u"], ArrayLike]]


def checked_state(
    state_dict: Mapping[str, Any], parameters: Iterable[WithState]
) -> tuple[int, Loading]:
    """The step count in a state dict, and what to load into the parameters.

    Raises:
        TypeError: an entry that is no array, or of a dtype that state cannot have.
        ValueError: entries missing or left over, other shapes, a count out of range.
    """
    parts: tuple[Literal["m"], Literal["u"]] = ("m", "u")
    expected = {f"{p.name}.{part}": (p, part) for p in parameters for part in parts}
    names = {"iterations", *expected}
    if missing := sorted(names - state_dict.keys()):
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
    if unexpected := sorted(state_dict.keys() - names):
        raise ValueError(
            f"state_dict has entries that belong to no parameter of this optimizer: "
            f"{', '.join(unexpected)} (build() it with all parameters first)"
        )
    counted = _checked_entry("iterations", state_dict, (), np.dtype(np.int64), "iu")
    iterations = int(counted[()])
    if not 0 <= iterations < _MOST_ITERATIONS:
        raise ValueError(
            f"state_dict['iterations'] must be in [0, 2**53), got {iterations}"
        )
    loading: Loading = []
    for name, (parameter, part) in expected.items():
        shape, dtype, _ = parameter.state_layout
        entry = _checked_entry(name, state_dict, shape, dtype, "f")
        loading.append((parameter, part, entry))
    return iterations, loading


def _checked_entry(
    name: str,
    state_dict: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    kinds: str,
) -> ArrayLike:
    entry: Any = state_dict[name]
    if not isinstance(entry, np.ndarray | _Entry):
        entry = np.asarray(entry)
    if entry.shape != shape:
        raise ValueError(
            f"state_dict[{name!r}] must have the shape {shape}, got {entry.shape}"
        )
    if entry.dtype.kind not in kinds:
        raise TypeError(
            f"state_dict[{name!r}] must have the dtype {dtype}, got {entry.dtype}"
        )
    checked: ArrayLike = entry
    return checked


def load_state(loading: Loading) -> None:
    """Replace the state of parameters: all of it, or none where an entry cannot be read."""
    in_memory: list[tuple[WithState, Literal["m", "u"], Array]] = []
    in_files: Loading = []
    for parameter, part, entry in loading:
        old = getattr(parameter, part)
        if isinstance(old, np.memmap):
            if isinstance(entry, np.ndarray):
                entry = np.array(entry)  # which may be of the state that is replaced
            in_files.append((parameter, part, entry))
            for _ in _pieces(entry, old):  # read once, to see that it can be read
                pass
        else:
            new = _in_memory(parameter, 1 if part == "m" else 2)
            for at, piece in _pieces(entry, old):
                new[at] = piece
            in_memory.append((parameter, part, new))
    for parameter, part, entry in in_files:
        target = getattr(parameter, part)
        for at, piece in _pieces(entry, target):
            target[at] = piece
    for parameter, part, array in in_memory:
        setattr(parameter, part, array)


def _pieces(entry: ArrayLike, like: Array) -> Iterator[tuple[Any, Any]]:
    """An entry in pieces of bounded memory, each with where it belongs."""
    if like.size == 0:
        return
    if like.ndim == 0:
        yield (), entry[()]
        return
    rows = max(1, _BYTES_AT_ONCE // (like.nbytes // len(like)))
    for start in range(0, len(like), rows):
        at = slice(start, min(start + rows, len(like)))
        yield at, entry[at]


# --- Files -------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file that is there wholly or not at all."""
    safetensors = _safetensors()
    contiguous = {name: np.require(array, None, "C") for name, array in tensors.items()}
    target = path.resolve()  # what a symbolic link points to
    with _folder_beside(target) as folder:
        temporary = folder / "state"
        temporary.touch()
        mode, *owner = _attributes(target if target.exists() else temporary)
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata=_FORMAT)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {str(path)!r}: {error}") from None
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, *owner)
        temporary.chmod(mode)  # safetensors makes it private
        _flush_to_disk(temporary)
        temporary.replace(target)
    _flush_to_disk(target.parent)


def _attributes(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_mode & 0o7777, stat.st_uid, stat.st_gid


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``; those of writers that are dead are removed.

    A writer holds a lock on its folder as long as it lives.
    """
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    prefix = f".adamax-{digest}-"  # names may be as long as the file system allows
    for left in target.parent.glob(f"{prefix}*"):
        with _locked(left, wait=False) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = target.with_name(prefix + secrets.token_hex(8))
        folder.mkdir()
        with _locked(folder, wait=True) as mine:
            try:
                if mine:  # else another writer has removed it before it was locked
                    yield folder
                    return
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this holds a lock on a folder that is still there."""
    if fcntl is None:
        yield wait
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # it is gone
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_there = folder.exists()
    except BlockingIOError:
        is_there = False
    try:
        yield is_there
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def read_tensors(path: Path) -> Iterator[Mapping[str, ArrayLike]]:
    """The entries of a file that :func:`write_tensors` wrote, read when they are sliced."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or not a safetensors file: {error}"
        ) from None
    with file:
        if (file.metadata() or {}) != _FORMAT:
            raise ValueError(f"{str(path)!r} does not hold the state of an optimizer")
        yield {name: _Entry(file, name) for name in file.keys()}  # noqa: SIM118


class _Entry:
    """A tensor in a file, with as much of an array's interface as copying needs."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._slices = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slices.get_shape())
        self.dtype: np.dtype[Any] = _DTYPES.get(self._slices.get_dtype(), _OTHER)

    def __getitem__(self, key: Any) -> Any:
        if key == ():  # slices of scalars need a newer safetensors
            return self._file.get_tensor(self._name)
        return self._slices[key]


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving and loading need safetensors: pip install 'adamax[numpy]'",
            name=error.name,
        ) from None
    return safetensors


def _flush_to_disk(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
