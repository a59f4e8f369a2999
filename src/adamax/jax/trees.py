"""Trees of parameters, and what belongs to each parameter in other trees."""

from collections.abc import Callable
from typing import Any

import jax

from .rows import PyTree, is_gradient


def at(path: Any) -> str:
    """Where a leaf is, as a part of a message."""
    return f" at {jax.tree_util.keystr(path)}" if path else ""


class Leaves:
    """The leaves of a tree of gradients, and those of other trees that belong to each."""

    def __init__(self, gradients: PyTree, *trees: PyTree) -> None:
        self._structure: Any
        paths, self._structure = jax.tree.flatten_with_path(gradients, is_leaf=is_gradient)
        self.names = [at(path) for path, _ in paths]
        self._columns = [[leaf for _, leaf in paths], *map(self.flatten, trees)]

    def __len__(self) -> int:
        return len(self.names)

    def flatten(self, tree: PyTree) -> list[Any]:
        leaves: list[Any] = self._structure.flatten_up_to(tree)
        return leaves

    def map(self, function: Callable[..., tuple[Any, ...]], results: int) -> list[PyTree]:
        """Trees of what ``function(number of the leaf, *leaves)`` returns."""
        rows = zip(range(len(self)), *self._columns, strict=True)
        of_leaves = [function(*row) for row in rows]
        return [
            self._structure.unflatten(of_leaf[i] for of_leaf in of_leaves)
            for i in range(results)
        ]


def for_each_parameter(tree: PyTree, params: PyTree, name: str) -> PyTree:
    """``tree`` with a leaf for each parameter, where it may end earlier.

    Nodes may be of different types if the paths are alike: a dict for a frozen one, say.

    Raises:
        ValueError: ``tree`` has nothing for a parameter, or has something for none.
    """
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_gradient)
    given: dict[Any, Any] = {_names(path): leaf for path, leaf in leaves}

    def prefix(path: Any) -> Any:
        names = _names(path)
        prefixes = (names[:length] for length in range(len(names) + 1))
        return next((prefix for prefix in prefixes if prefix in given), None)

    # What has been masked out is a node without leaves.
    ends = jax.tree.leaves_with_path(params, is_leaf=lambda node: not jax.tree.leaves(node))
    if {prefix(path) for path, _ in ends} != given.keys():
        raise ValueError(
            f"{name} must be a pytree like that of the parameters, or one that ends "
            f"earlier, got {tree} for parameters with the paths "
            f"{[at(path) for path, _ in ends]}"
        )
    found = lambda path, _: given[prefix(path)]  # noqa: E731
    return jax.tree.map_with_path(found, params, is_leaf=is_gradient)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
