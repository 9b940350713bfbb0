"""Many small arrays of one shape in one stack, for the optimizer; the model keeps its parameters."""

import collections
import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from spherical_optax._core.arguments import OTHER_SPHERES, require_transformation
from spherical_optax._core.boxes import is_end, is_sharded_by_box, open_box
from spherical_optax._core.matching import assign_specs, match
from spherical_optax._core.paths import Path, leaves_with_paths, list_leaves
from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._core.trees import is_placeholder


class Packed(NamedTuple):
    """A tree with its small arrays in stacks, one stack per shape, dtype and sphere."""

    alone: dict[str, Any]  # the arrays that are in no stack, by path
    stacks: list[Any]  # arrays on a new first axis


def stacked(
    make: Callable[[Spheres], optax.GradientTransformation],
    spheres: Spheres = None,
    *,
    below: int = 2**14,
) -> optax.GradientTransformationExtraArgs:
    """Hands small arrays of equal shape to an optimizer in one stack; every array keeps its spheres.

    Use this when a network has hundreds of small arrays: a step of its optimizer then spends its time
    on starting hundreds of tiny operations. A stack needs one operation in their place, and the steps
    are the same except for rounding. The state is stacked too: it does not have the structure of the
    parameters, and `optax.tree.map_params` cannot map it. Arrays that are seen to be sharded stay as
    they are, and so does their sharding.

    Args:
      make: function from spheres to an optimizer, such as `lambda spheres: so.adamsrt(1e-3, spheres)`.
        An optimizer inside must not select parameters by path, nor guess spheres from shapes.
      spheres: how the leaves split into groups; tied leaves stay as they are.
      below: arrays with at least this many entries stay as they are; for experiments.

    Returns:
      A `GradientTransformationExtraArgs`. State: that of the optimizer, for stacks.

    Raises:
      ValueError: if `make` is no function; in `init` and `update`, if `spheres` does not fit the
        parameters; in `update`, if a parameter in a stack has no update, or if the state was made with
        other spheres; in `optax.tree.map_params`.

    >>> params = {f"conv{i}": jnp.ones((3, 3, 4, 4)) for i in range(9)}
    >>> tx = so.stacked(lambda spheres: so.adamsrt(0.1, spheres), so.Sphere())
    >>> optax.tree.get(tx.init(params), "ema").stacks[0].shape
    (9, 3, 3, 4, 4)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["conv8"].shape
    (3, 3, 4, 4)

    Source: `optax.flatten` does the same to element-wise optimizers, with one vector.
    """
    if not callable(make):
        raise ValueError(
            f"stacked: {reprlib.repr(make)} is not a function from spheres to an optimizer; write "
            "stacked(lambda spheres: so.adamsrt(1e-3, spheres), spheres)"
        )
    stacking = Stacking(make, spheres, below)
    return optax.GradientTransformationExtraArgs(stacking.init, stacking.update)


class Plan(NamedTuple):
    """Which arrays go into which stack."""

    stacks: dict[Any, list[Path]]  # by shape, dtype and sphere, the paths in one stack
    specs: dict[Path, Sphere | None]  # the spheres of all arrays


@dataclasses.dataclass(frozen=True)
class Stacking:
    """The transformation of `stacked`: packs the arrays, updates the stacks, unpacks the result."""

    make: Callable[[Spheres], optax.GradientTransformation]
    spheres: Spheres
    below: int

    def init(self, params: Any) -> Any:
        if is_placeholder(params):
            raise ValueError(
                "stacked: optax.tree.map_params needs a state with the structure of the parameters, and "
                "this one holds stacks; map over the arrays of the state, or leave `stacked` out"
            )
        plan = self.make_plan(params)
        return self.make_optimizer(plan).init(self.pack(params, plan))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        plan = self.make_plan(updates if params is None else params, state)
        packed_params = None if params is None else self.pack(params, plan)
        tx, packed = self.make_optimizer(plan), self.pack(updates, plan)
        packed, state = tx.update(packed, state, packed_params, **extra_args)
        return self.unpack(packed, plan, updates), state

    def make_plan(self, tree: Any, state: Any = None) -> Plan:
        """Puts alike arrays into stacks: at first by what is seen of them, and later as the state says.

        Whether an array is sharded is not seen in every program: `jax.jit` hides it.
        """
        match(self.spheres, tree)
        specs = assign_specs(self.spheres, tree)
        before = _find_packed(state)
        alike: dict[Any, list[Path]] = collections.defaultdict(list)
        for path, box in _list_boxes(tree):
            x, sphere = open_box(box), specs[path]
            if before is not None:
                stays = _encode_path(path) in before.alone
            else:
                tied = sphere is not None and sphere.tie is not None
                stays = x is None or tied or jnp.size(x) >= self.below or _is_sharded(box)
            if x is not None and not stays:
                alike[jnp.shape(x), jnp.result_type(x), sphere].append(path)
        if before is None:
            alike = {key: paths for key, paths in alike.items() if len(paths) > 1}
        else:
            _check_stacks(before, alike)
        return Plan(dict(alike), specs)

    def make_optimizer(self, plan: Plan) -> optax.GradientTransformationExtraArgs:
        grouped = {path for paths in plan.stacks.values() for path in paths}
        alone = {_encode_path(p): spec for p, spec in plan.specs.items() if p not in grouped}
        stacks = [_add_stack_axis(sphere) for _, _, sphere in plan.stacks]
        tx = self.make(Packed(alone, stacks))
        return optax.with_extra_args_support(
            require_transformation("stacked: make(spheres)", tx, "is no optimizer")
        )

    def pack(self, tree: Any, plan: Plan) -> Packed:
        boxes = dict(_list_boxes(tree))
        grouped = plan.stacks.values()
        if missing := [path for paths in grouped for path in paths if boxes[path] is None]:
            raise ValueError(
                f"stacked: {'/'.join(missing[0])} has no update, but lies in a stack: give it zeros, "
                "or keep small arrays apart with below=0"
            )
        stacks = [jnp.stack([open_box(boxes.pop(path)) for path in paths]) for paths in grouped]
        return Packed({_encode_path(path): box for path, box in boxes.items()}, stacks)

    def unpack(self, packed: Any, plan: Plan, like: Any) -> Any:
        leaves, treedef = leaves_with_paths(like, lambda x: x is None)
        found = {
            path: stack[i]
            for stack, paths in zip(packed.stacks, plan.stacks.values(), strict=True)
            for i, path in enumerate(paths)
        }
        return jax.tree.unflatten(
            treedef,
            [
                found[p] if p in found else open_box(packed.alone[_encode_path(p)])
                for p, _ in leaves
            ],
        )


def _list_boxes(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths, in their boxes where they have one."""
    boxes = jax.tree.leaves(tree, is_leaf=is_end)
    leaves = list_leaves(tree)
    return [(path, box) for (path, _), box in zip(leaves, boxes, strict=True)]


def _is_sharded(box: Any) -> bool:
    """Whether an array is seen to be split over devices, by its box, its type or itself."""
    x = open_box(box)
    if is_sharded_by_box(box):
        return True
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return not x.sharding.is_fully_replicated
    return any(name is not None for name in jax.typeof(x).sharding.spec)


def _find_packed(state: Any) -> Packed | None:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Packed))
    return next((node for node in nodes if isinstance(node, Packed)), None)


def _check_stacks(packed: Packed, stacks: dict[Any, list[Path]]) -> None:
    """Raises if the stacks in the state hold other arrays: it was made with other spheres."""
    # There is no number for a stack off the spheres, or outside a mask.
    found = [x.shape[0] if getattr(x, "shape", ()) else None for x in packed.stacks]
    expected = [len(paths) for paths in stacks.values()]
    fits = [n is None or n == m for n, m in zip(found, expected, strict=False)]
    if len(found) != len(expected) or not all(fits):
        first = ["/".join(paths[0]) for paths in stacks.values()]
        raise ValueError(
            f"stacked: the state has stacks of {found} arrays, and the spheres give {expected}, which "
            f"begin with {', '.join(map(repr, first))}: {OTHER_SPHERES}"
        )


def _encode_path(path: Path) -> str:
    """Joins the names of a path, and escapes slashes inside a name as a JSON pointer does."""
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def _add_stack_axis(sphere: Sphere | None) -> Sphere | None:
    """Makes the sphere of a stack from that of its arrays: the new first axis tells groups apart."""
    if sphere is None:
        return None
    axes = (0, *(axis + 1 if axis >= 0 else axis for axis in sphere.index_axes))
    return dataclasses.replace(sphere, index_axes=axes)
