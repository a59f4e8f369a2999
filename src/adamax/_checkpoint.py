"""State on disk: checkpoints through safetensors, and memory-mapped state."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Protocol, Self

import numpy.typing as npt

import numpy as np

from ._kernels._memory import zeros_beside

Array = npt.NDArray[Any]
Order = Literal["C", "F"]

_FORMAT = {"format": "adamax", "version": "1"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
_OTHER: np.dtype[Any] = np.dtype(object)
_BYTES_AT_ONCE = 1 << 26


class ArrayLike(Protocol):
    """What an array and an entry of a file have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, key: Any, /) -> Any: ...


def copy_in_pieces(target: Array, source: ArrayLike) -> None:
    """Copy ``source`` into ``target`` with little memory beside them."""
    if target.size == 0:
        return
    if target.ndim == 0:
        target[...] = source[()]
        return
    rows = max(1, _BYTES_AT_ONCE // (target.nbytes // len(target)))
    for start in range(0, len(target), rows):
        stop = min(start + rows, len(target))
        target[start:stop] = source[start:stop]


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file that is there wholly or not at all."""
    safetensors = _safetensors()
    contiguous = {name: np.require(array, None, "C") for name, array in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        temporary.touch()
        permissions = temporary.stat().st_mode  # what new files get; safetensors is strict
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata=_FORMAT)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {str(path)!r}: {error}") from None
        temporary.chmod(permissions)
        _flush_to_disk(temporary)
        temporary.replace(path)
    _flush_to_disk(path.parent)


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
        yield {name: _Entry(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


class _Entry:
    """A tensor in a file, with as much of an array's interface as copying needs."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.shape: tuple[int, ...] = tuple(stored.get_shape())
        self.dtype: np.dtype[Any] = _DTYPES.get(stored.get_dtype(), _OTHER)

    def __getitem__(self, key: Any) -> Any:
        return self._stored[... if key == () else key]


class StateFiles:
    """Makes zero state: in memory, or in files of a directory if one is given.

    As a context manager, it removes the files it made if the block fails.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._made: list[Path] = []

    def zeros(
        self,
        file_name: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        order: Order,
        *,
        beside: int,
        number: int,
    ) -> Array:
        """``beside`` and ``number`` are for :func:`zeros_beside`."""
        if self._directory is None or 0 in shape:
            return zeros_beside(beside, number, shape, dtype, order)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / file_name
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise FileExistsError(
                f"state_dir must not hold the state of another optimizer, but "
                f"{str(path)!r} exists"
            ) from None
        self._made.append(path)
        # A new file reads as zeros, and takes up disk only where it is written.
        return np.lib.format.open_memmap(
            path, mode="w+", dtype=dtype, shape=shape, fortran_order=order == "F"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            for path in self._made:
                path.unlink(missing_ok=True)


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
