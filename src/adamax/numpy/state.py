"""The state of a parameter in memory or in a checkpoint, float32 or compact."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .._core.compact import TO_NEAREST, decode, encode
from .._core.kernels import state_dtype

Array: TypeAlias = npt.NDArray[Any]
Part: TypeAlias = Literal["m", "u", "frame"]


class ArrayLike(Protocol):
    """What an array and an entry of a file have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, key: Any, /) -> Any: ...


def bfloat16() -> np.dtype[Any]:
    """The dtype of that name, which NumPy itself lacks.

    Raises:
        ModuleNotFoundError: ml_dtypes is not installed.
    """
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "state_dtype='bfloat16' needs ml_dtypes: pip install ml_dtypes", name=error.name
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def dtypes_of(kind: str, dtype: np.dtype[Any], name: str) -> dict[Part, np.dtype[Any]]:
    """The dtypes of the parts of state of a kind, for a parameter of ``dtype``.

    Raises:
        ValueError: compact state for a float64 parameter.
    """
    arithmetic: np.dtype[Any] = state_dtype(dtype.name)
    if kind == "float32":
        return {"m": arithmetic, "u": arithmetic}
    if arithmetic == np.float64:
        raise ValueError(
            f"with state_dtype={kind!r} parameter {name!r} must be of at most 32 bits, got "
            f"{dtype}"
        )
    if kind == "bfloat16":
        return {"m": bfloat16(), "u": bfloat16()}
    names: tuple[tuple[Part, str], ...] = (("m", "int8"), ("u", "uint8"))
    return {part: np.dtype(name) for part, name in (*names, ("frame", "float32"))}


def kind_of(parts: Mapping[Part, ArrayLike]) -> str | None:
    """The kind of the state in a checkpoint, or None for dtypes that no state has."""
    dtypes = [parts[part].dtype for part in ("m", "u")]
    if all(dtype.kind == "f" for dtype in dtypes):
        return "float32"
    names = [dtype.name for dtype in dtypes]
    if all(name in ("bfloat16", "uint16") for name in names):  # files have its words
        return "bfloat16"
    return "8bit" if names == ["int8", "uint8"] and "frame" in parts else None


def moments(kind: str, parts: Mapping[Part, ArrayLike], at: Any) -> tuple[Array, Array]:
    """``m`` and ``u`` of some rows as floats."""
    m, u = parts["m"][at], parts["u"][at]
    if kind == "bfloat16":
        words = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in (m, u))
        m, u = ((x << 16).view(np.float32) for x in words)
    elif kind == "8bit":
        m, u = decode(m, u, _frame_at(parts["frame"], at, np.ndim(m)))
    return m, u


def store(kind: str, parts: Mapping[Part, Array], at: Any, m: Array, u: Array) -> None:
    """Write what :func:`moments` returned, rounded to nearest."""
    if kind == "8bit":
        m, u = (np.asarray(x, np.float32) for x in (m, u))
        nearest = np.full(m.shape, TO_NEAREST, np.uint32)
        m, u = encode(m, u, _frame_at(parts["frame"], at, m.ndim), nearest)
    parts["m"][at], parts["u"][at] = m, u


def _frame_at(frame: ArrayLike, at: Any, ndim: int) -> Array:
    """The frames of some rows, in a shape that can be broadcast."""
    if ndim == 0:
        return np.asarray(frame[0:1]).reshape(())
    of_rows = frame[0:1] if frame.shape == (1,) else frame[at]
    return np.asarray(of_rows).reshape(-1, *(1,) * (ndim - 1))
