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
from .state import ArrayLike, Part, kind_of, moments, store

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

Array: TypeAlias = npt.NDArray[Any]
Layout: TypeAlias = tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]
State: TypeAlias = dict[Part, Array]

_FORMAT = {"format": "adamax", "version": "1"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),  # the words of bfloat16
}
_OTHER: np.dtype[Any] = np.dtype(object)
_BYTES_AT_ONCE = 1 << 26
_MOST_ITERATIONS = 1 << 53  # float64 tells them apart


class WithState(Protocol):
    """A parameter, as far as it matters here."""

    name: str
    state: State

    @property
    def array(self) -> Array | None: ...
    @property
    def state_dtype(self) -> str: ...
    @property
    def layouts(self) -> dict[Part, Layout]: ...


# --- New state ---------------------------------------------------------------------------


def zero_state(
    parameters: Sequence[WithState], directory: Path | None, first_number: int
) -> list[State]:
    """Zero state for each parameter, in memory or in files of a directory.

    Frames of compact state are in memory.

    Raises:
        FileExistsError: a file of another optimizer is in the way.
        OSError: there is no room for the files. None is left behind then.
    """
    if directory is None:
        return [{part: _in_memory(p, part) for part in p.layouts} for p in parameters]
    names: tuple[Part, Part] = ("m", "u")
    of_files = [
        {part: directory / f"{first_number + i}.{part}.npy" for part in names}
        for i in range(len(parameters))
    ]
    paths = [path for files in of_files for path in files.values()]
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"state_dir must not hold the state of another optimizer, but "
                f"{str(path)!r} exists"
            )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return [
            {
                part: _in_file(files[part], layout)
                if part in files
                else _in_memory(parameter, part)
                for part, layout in parameter.layouts.items()
            }
            for parameter, files in zip(parameters, of_files, strict=True)
        ]
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _in_memory(parameter: WithState, part: Part) -> Array:
    assert parameter.array is not None
    shape, dtype, order = parameter.layouts[part]
    address, number = parameter.array.ctypes.data, 1 if part == "m" else 2
    return zeros_beside(address, number, shape, dtype, order)


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

Loading: TypeAlias = list[tuple[WithState, dict[Part, ArrayLike]]]


def checked_state(
    state_dict: Mapping[str, Any], parameters: Iterable[WithState]
) -> tuple[int, Loading]:
    """The step count in a state dict, and what to load into the parameters.

    Raises:
        TypeError: an entry that is no array, or of a dtype that state cannot have.
        ValueError: entries missing or left over, other shapes, a count out of range.
    """
    parameters = list(parameters)
    parts = {p.name: _parts(p.name, state_dict) for p in parameters}
    expected = {f"{name}.{part}" for name, of_name in parts.items() for part in of_name}
    names = {"iterations", *expected}
    if missing := sorted(names - state_dict.keys()):
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
    if unexpected := sorted(state_dict.keys() - names):
        raise ValueError(
            f"state_dict has entries that belong to no parameter of this optimizer: "
            f"{', '.join(unexpected)} (build() it with all parameters first)"
        )
    counted = _entry("iterations", state_dict, (), np.dtype(np.int64), "iu")
    iterations = int(counted[()])
    if not 0 <= iterations < _MOST_ITERATIONS:
        raise ValueError(
            f"state_dict['iterations'] must be in [0, 2**53), got {iterations}"
        )
    return iterations, [
        (p, _checked_parts(p, parts[p.name], state_dict)) for p in parameters
    ]


def _parts(name: str, state_dict: Mapping[str, Any]) -> tuple[Part, ...]:
    """What the state of a parameter in a state dict must consist of."""
    dtype = getattr(state_dict.get(f"{name}.m"), "dtype", None)
    return ("m", "u", "frame") if dtype == np.int8 else ("m", "u")


def _checked_parts(
    parameter: WithState, parts: tuple[Part, ...], state_dict: Mapping[str, Any]
) -> dict[Part, ArrayLike]:
    shape, expected, _ = parameter.layouts["m"]
    kinds = {"m": "i", "u": "u"} if "frame" in parts else dict.fromkeys(parts, "f")
    if parts == ("m", "u") and _is_bfloat16(state_dict[f"{parameter.name}.m"]):
        kinds = dict.fromkeys(parts, "uV")
    checked: dict[Part, ArrayLike] = {}
    for part in parts:
        name = f"{parameter.name}.{part}"
        if part == "frame":
            given = np.shape(state_dict[name])
            of_rows = shape[:1] if given != (1,) else (1,)
            frame = _entry(name, state_dict, of_rows, np.dtype(np.float32), "f")
            numbers = frame[:]
            if not np.all((numbers >= 0) & (numbers < 1)):
                raise ValueError(f"state_dict[{name!r}] must be in [0, 1)")
            checked[part] = frame
        else:
            checked[part] = _entry(name, state_dict, shape, expected, kinds[part])
    if kind_of(checked) is None:
        raise TypeError(
            f"state_dict[{parameter.name + '.u'!r}] has the dtype {checked['u'].dtype}, "
            f"which does not go with {checked['m'].dtype} of 'm'"
        )
    return checked


def _is_bfloat16(entry: Any) -> bool:
    dtype = getattr(entry, "dtype", None)
    return isinstance(dtype, np.dtype) and dtype.name in ("bfloat16", "uint16")


def _entry(
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
    in_memory: list[tuple[WithState, State]] = []
    in_files: Loading = []
    for parameter, parts in loading:
        if isinstance(parameter.state["m"], np.memmap):
            parts = {  # copies of what may be of the state that is replaced
                part: np.array(entry) if isinstance(entry, np.ndarray) else entry
                for part, entry in parts.items()
            }
            in_files.append((parameter, parts))
            for at in _pieces(parameter.state["m"]):  # to see that all can be read
                moments(_kind(parts), parts, at)
        else:
            new = {part: _in_memory(parameter, part) for part in parameter.layouts}
            _copy(parts, parameter.state_dtype, new)
            in_memory.append((parameter, new))
    for parameter, parts in in_files:
        _copy(parts, parameter.state_dtype, parameter.state)
    for parameter, state in in_memory:
        parameter.state = state


def _kind(parts: Mapping[Part, ArrayLike]) -> str:
    kind = kind_of(parts)
    assert kind is not None
    return kind


def _copy(parts: Mapping[Part, ArrayLike], wanted: str, to: State) -> None:
    """Copy state, converted to the kind that is wanted."""
    kind = _kind(parts)
    if wanted == "8bit":
        is_same = kind == wanted
        to["frame"] = np.array(parts["frame"][:] if is_same else [0], np.float32)
    for at in _pieces(to["m"]):
        if kind == wanted and kind != "bfloat16":
            to["m"][at], to["u"][at] = parts["m"][at], parts["u"][at]
        else:
            store(wanted, to, at, *moments(kind, parts, at))


def in_float32(parameter: WithState) -> State:
    """A copy of a parameter's state, not compact."""
    if parameter.state_dtype == "float32":
        return {part: array.copy() for part, array in parameter.state.items()}
    shape = parameter.state["m"].shape
    state: State = {"m": np.zeros(shape, np.float32), "u": np.zeros(shape, np.float32)}
    _copy(parameter.state, "float32", state)
    return state


def _pieces(like: Array) -> Iterator[Any]:
    """Indices of pieces of an array, of bounded memory each."""
    if like.size == 0:
        return
    if like.ndim == 0:
        yield ()
        return
    rows = max(1, _BYTES_AT_ONCE // (like.nbytes // len(like)))
    for start in range(0, len(like), rows):
        yield slice(start, min(start + rows, len(like)))


# --- Files -------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file that is there wholly or not at all."""
    safetensors = _safetensors()
    contiguous = {name: _words(np.require(a, None, "C")) for name, a in tensors.items()}
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


def _words(array: Array) -> Array:
    """An array, or the words of a bfloat16 one, which safetensors for NumPy lacks."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


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
