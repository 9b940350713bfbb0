"""Arithmetic within the groups of a whole tree, and the numbers per group in a state."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.arguments import OTHER_SPHERES
from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._core.boxes import (
    box_like,
    is_end,
    open_box,
    put_in_box,
    put_in_box_per_group,
    to_dictionaries,
)
from spherical_optax._core.paths import Path, list_leaves
from spherical_optax._core.safe_math import upcast
from spherical_optax._core.shapes import Params, PerGroup, Shape


@dataclasses.dataclass(frozen=True)
class Groups:
    """Spheres matched with the leaves of a tree: all other modules compute with these.

    A "group-sized" tree holds one number per group. It has the structure of the parameters without boxes
    (see `boxes`), its leaves have keepdims shapes, and it holds None in place of the leaves off the
    spheres.

    Attributes:
      treedef: the structure of the parameters without boxes; a None is a leaf.
      paths: the path of each leaf.
      shapes: the shape of each leaf; None for a leaf that is None.
      leaves: how each leaf splits into groups; None for a leaf off the spheres.
      ties: for each tie, the indices of the leaves that form their spheres together.
    """

    treedef: Any
    paths: list[Path]
    shapes: list[Shape | None]
    leaves: list[ArrayGroups | None]
    ties: list[list[int]]

    def with_tangent_space(self) -> "Groups":
        """The groups without those leaves whose groups have one coordinate and thus no tangent space.

        Optimizers treat such leaves element by element, like leaves off the spheres.
        """
        leaves = [None if leaf is None or leaf.size < 2 else leaf for leaf in self.leaves]
        ties = [tie for tie in self.ties if leaves[tie[0]] is not None]
        return dataclasses.replace(self, leaves=leaves, ties=ties)

    def parts(self) -> list[tuple[list[int], "Groups"]]:
        """The indices of each tie, or of each single leaf on spheres, and a `Groups` of it alone.

        The tree of such a `Groups` is the list of these leaves.
        """
        tied = {i for tie in self.ties for i in tie}
        alone = [[i] for i, leaf in enumerate(self.leaves) if leaf is not None and i not in tied]
        return [
            (
                where,
                Groups(
                    jax.tree.structure([0] * len(where)),
                    [self.paths[i] for i in where],
                    [self.shapes[i] for i in where],
                    [self.leaves[i] for i in where],
                    [list(range(len(where)))] if len(where) > 1 else [],
                ),
            )
            for where in sorted([*alone, *self.ties])
        ]

    def list_leaves(self, tree: Any) -> list[Any]:
        """The leaves of a tree like the parameters, taken out of their boxes."""
        return list(map(open_box, self._list_boxes(tree)))

    def _list_boxes(self, tree: Any) -> list[Any]:
        """The leaves of a tree like the parameters, in their boxes."""
        return self.treedef.flatten_up_to(to_dictionaries(tree))

    def _zip_leaves(self, trees: Sequence[Any]):
        """(how the leaf splits, its entry in each of the trees), leaf by leaf."""
        return zip(self.leaves, *map(self.list_leaves, trees), strict=True)

    def _zip_arrays(self, *trees: Any, per_group: Sequence[Any] = ()):
        """The same, but raises if an array on spheres has another shape: it might broadcast.

        The trees in `per_group` may also be group-sized.
        """
        entries = self._zip_leaves((*trees, *per_group))
        for path, (leaf, *arrays) in zip(self.paths, entries, strict=True):
            if leaf is not None:
                own, either = [leaf.shape], [leaf.shape, leaf.group_shape]
                fitting = [own] * len(trees) + [either] * len(per_group)
                for x, shapes in zip(arrays, fitting, strict=True):
                    if x is not None and jnp.shape(x) not in shapes:
                        raise ValueError(
                            f"{'/'.join(path)!r} has shape {jnp.shape(x)} in one tree, where "
                            f"{' or '.join(map(str, dict.fromkeys(shapes)))} fits the spheres"
                        )
            yield leaf, *arrays

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """A tree like the parameters, without boxes."""
        return jax.tree.unflatten(self.treedef, leaves)

    def _unflatten_like(self, tree: Any, leaves: Sequence[Any]) -> Any:
        """A tree like the parameters, in boxes like those of `tree`."""
        return box_like(tree, self.unflatten(leaves))

    def sum(self, f: Callable[..., jax.Array], *trees: Any) -> PerGroup:
        """Group-sized sum of f(*leaves) over each group, in at least float32."""
        sums: list[Any] = [
            None if leaf is None else leaf.sum(f(*map(upcast, arrays)))
            for leaf, *arrays in self._zip_arrays(*trees)
        ]
        for tie in self.ties:
            tied = [(i, leaf) for i in tie if (leaf := self.leaves[i]) is not None]
            parts = [leaf.to_counts(sums[i]) for i, leaf in tied]
            widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
            total = functools.reduce(operator.add, (part.astype(widest) for part in parts))
            for (i, leaf), part in zip(tied, parts, strict=True):
                sums[i] = leaf.from_counts(total).astype(part.dtype)
        return self.unflatten(sums)

    def map(
        self,
        f: Callable[..., jax.Array],
        tree: Any,
        *rest: Any,
        off: Callable[..., Any] = lambda x, *_: x,
    ) -> Any:
        """`map_arrays`, whose results are brought to the dtypes of `tree`."""
        return self.map_arrays(
            lambda x, *others: f(upcast(x), *others).astype(jnp.result_type(x)),
            tree,
            *rest,
            off=off,
        )

    def map_arrays(
        self,
        f: Callable[..., jax.Array],
        tree: Any,
        *rest: Any,
        off: Callable[..., Any] = lambda x, *_: x,
    ) -> Any:
        """Applies f to the arrays on spheres, and `off` to the other arrays.

        `rest` are trees shaped like `tree`, or group-sized; f gets them in at least float32.
        """

        def apply(leaf: ArrayGroups | None, x: Any, *others: Any) -> Any:
            if x is None:
                return None
            if leaf is None:
                return off(x, *others)
            return f(x, *(leaf.spread(upcast(y)) for y in others))

        return self._unflatten_like(
            tree, [apply(*entries) for entries in self._zip_arrays(tree, per_group=rest)]
        )

    def map_per_group(
        self, f: Callable[..., Any], *trees: Any, off: Callable[..., Any] = lambda *_: None
    ) -> Any:
        """Applies f to the leaves of group-sized trees, and `off` to their entries off the spheres."""
        leaves = self._zip_leaves(trees)
        return self.unflatten([(off if leaf is None else f)(*xs) for leaf, *xs in leaves])

    def to_per_group(self, value: Any, like: PerGroup) -> PerGroup:
        """A number for every group, like the tree `like`; a group-sized tree stays as it is."""
        if jax.tree_util.all_leaves([value]) and jnp.ndim(value) == 0:
            return self.map_per_group(lambda x: jnp.full_like(x, value), like)
        return value

    def mean(self, sums: PerGroup) -> PerGroup:
        """Divides group-sized sums by the number of coordinates of each group."""
        leaves = self._zip_leaves((sums,))
        return self.unflatten(
            [None if leaf is None else s / max(float(leaf.size), 1.0) for leaf, s in leaves]
        )

    def choose(self, on: Any, off: Any) -> Any:
        """The tree with the leaves of `on` on the spheres and the leaves of `off` elsewhere."""
        leaves = self._zip_leaves((on, off))
        return self.unflatten([b if leaf is None else a for leaf, a, b in leaves])

    def make_state(
        self,
        values: PerGroup,
        params: Params,
        off: Callable[[Any], Any] = lambda _: jnp.zeros((), jnp.float32),
    ) -> Any:
        """A group-sized tree as a new optimizer state, which has the structure of the parameters.

        In place of every None there is `off` of the parameter. In boxes, mesh axes are named on the
        axes that a number per group has in common with its array, and on no others.
        """

        def make(leaf: ArrayGroups | None, shape: Shape | None, box: Any, value: Any) -> Any:
            if leaf is not None:
                return put_in_box_per_group(box, value, leaf.uncut)
            found = off(open_box(box))
            return found if found is None or found.shape != shape else put_in_box(box, found)

        boxes, leaves = self._list_boxes(params), self.list_leaves(values)
        return self.unflatten(list(map(make, self.leaves, self.shapes, boxes, leaves)))

    def box_state(self, tree: Any, params: Params) -> Any:
        """A tree like the parameters as a new optimizer state: in boxes like theirs, but for a None."""
        boxes, leaves = self._list_boxes(params), self.list_leaves(tree)
        pairs = zip(boxes, leaves, strict=True)
        return self.unflatten([None if x is None else put_in_box(box, x) for box, x in pairs])

    def make_zeros(self, params: Params, **options: Any) -> Any:
        """A zero per group, as a new optimizer state.

        Zeros are summed rather than made: shape, dtype and sharding are then those of later sums.
        """
        sums = self.sum(lambda x: x, jax.tree.map(jnp.zeros_like, params))
        return self.make_state(sums, params, **options)

    def read_state(self, field: str, state: Any, *, full: bool = False) -> Any:
        """The numbers per group in a state; off the spheres, its entries as they are.

        A state that was made for other spheres might broadcast without a word: it is refused.

        Args:
          field: the name of the field, for the error.
          state: the tree of the state, which is not in boxes.
          full: whether its entries off the spheres have the shapes of the parameters.
        """
        found = dict(list_leaves(state))
        for path, shape, leaf in zip(self.paths, self.shapes, self.leaves, strict=True):
            if shape is not None:  # without an update the state stays as it is
                expected = (shape if full else ()) if leaf is None else leaf.group_shape
                _require_entry(field, found, path, shape, expected)
        return self.unflatten([found.get(path) for path in self.paths])

    def require_moment(self, field: str, moment: Any) -> None:
        """Raises if an array of a state has another shape than its parameter."""
        found = dict(list_leaves(moment))
        for path, shape in zip(self.paths, self.shapes, strict=True):
            if shape is not None:
                _require_entry(field, found, path, shape, shape)

    def label(self, tree: Any, f: Callable[[ArrayGroups | None], Any]) -> Any:
        """f of how each leaf splits, in the containers of `tree`: for `optax.masked` and the like."""
        treedef = jax.tree.structure(tree, is_leaf=is_end)
        return jax.tree.unflatten(treedef, map(f, self.leaves))


def _require_entry(
    field: str, found: dict[Path, Any], path: Path, shape: Shape, expected: Shape
) -> None:
    """Raises if the entry of a state is missing, or has not the expected shape."""
    if path in found and (found[path] is None or jnp.shape(found[path]) == expected):
        return
    has = f"shape {jnp.shape(found[path])}" if path in found else "no entry"
    raise ValueError(
        f"{field} of the state has {has} for the parameter {'/'.join(path)!r} of shape {shape}, where "
        f"{expected} fits: {OTHER_SPHERES}"
    )
