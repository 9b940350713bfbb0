"""Many small arrays of one shape as one: for the optimizer, not for the model."""

import collections
import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.matching import assign_specs, match
from spherical_optax._core.paths import Path, leaves_with_paths
from spherical_optax._core.sphere import Sphere, Spheres


class Packed(NamedTuple):
    """Arrays by shape: those that share one with others on a new first axis, and the rest by path."""

    stacks: list[Any]
    alone: dict[str, Any]


def stacked(
    make: Callable[[Spheres], optax.GradientTransformation],
    spheres: Spheres = None,
    *,
    below: int = 2**14,
) -> optax.GradientTransformationExtraArgs:
    """Hands the small arrays of equal shape to an optimizer in one stack, with a sphere each as before.

    A network of hundreds of small arrays spends a step of its optimizer on starting hundreds of tiny
    operations. In a stack they are one, and the steps are the same but for rounding. The state is
    stacked too: it is no longer shaped like the parameters.

    Args:
      make: from spheres to an optimizer, such as `lambda spheres: so.adamsrt(1e-3, spheres)`. What goes
        by the paths of parameters does not work inside, nor does what guesses from their shapes.
      spheres: how the leaves split into groups; tied leaves stay as they are.
      below: arrays with this many entries or more stay as they are.

    Returns:
      A `GradientTransformationExtraArgs`. State: that of the optimizer, for stacks.

    Raises:
      ValueError: if `make` is no function; in `init` and `update`, if `spheres` does not fit the
        parameters; in `update`, if a parameter in a stack has no update.

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

    def plan(tree: Any) -> tuple[dict[Any, list[Path]], dict[Path, Sphere | None]]:
        """The paths that go into one stack, and the spheres of all."""
        match(spheres, tree)
        chosen = assign_specs(spheres, tree)
        alike: dict[Any, list[Path]] = collections.defaultdict(list)
        for path, x in leaves_with_paths(tree, lambda x: x is None)[0]:
            sphere = chosen[path]
            tied = sphere is not None and sphere.tie is not None
            if x is not None and jnp.size(x) < below and not tied:
                alike[jnp.shape(x), jnp.result_type(x), sphere].append(path)
        return {key: paths for key, paths in alike.items() if len(paths) > 1}, chosen

    def pack(tree: Any, stacks: dict[Any, list[Path]]) -> Packed:
        leaves = dict(leaves_with_paths(tree, lambda x: x is None)[0])
        if missing := [path for paths in stacks.values() for path in paths if leaves[path] is None]:
            raise ValueError(
                f"stacked: {'/'.join(missing[0])} has no update, but lies in a stack: give it zeros, "
                "or keep small arrays apart with below=0"
            )
        together = [jnp.stack([leaves.pop(path) for path in paths]) for paths in stacks.values()]
        return Packed(together, {_name(path): x for path, x in leaves.items()})

    def unpack(packed: Any, stacks: dict[Any, list[Path]], like: Any) -> Any:
        paths, treedef = leaves_with_paths(like, lambda x: x is None)
        found = {
            path: stack[i]
            for stack, of in zip(packed.stacks, stacks.values(), strict=True)
            for i, path in enumerate(of)
        }
        return jax.tree.unflatten(
            treedef,
            [found[p] if p in found else packed.alone[_name(p)] for p, _ in paths],
        )

    def optimizer(stacks: Any, chosen: Any) -> optax.GradientTransformationExtraArgs:
        grouped = {path for paths in stacks.values() for path in paths}
        alone = {_name(p): sphere for p, sphere in chosen.items() if p not in grouped}
        return optax.with_extra_args_support(
            make(Packed([_stack_of(sphere) for _, _, sphere in stacks], alone))
        )

    def init(params):
        stacks, chosen = plan(params)
        return optimizer(stacks, chosen).init(pack(params, stacks))

    def update(updates, state, params=None, **extra_args):
        stacks, chosen = plan(updates if params is None else params)
        packed = None if params is None else pack(params, stacks)
        tx, found = optimizer(stacks, chosen), pack(updates, stacks)
        found, state = tx.update(found, state, packed, **extra_args)
        return unpack(found, stacks, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _name(path: Path) -> str:
    """One string per path, as in a JSON pointer: a name may have a slash of its own."""
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def _stack_of(sphere: Sphere | None) -> Sphere | None:
    """Of every array in a stack that was on this sphere."""
    if sphere is None:
        return None
    axes = (0, *(axis + 1 if axis >= 0 else axis for axis in sphere.index_axes))
    return dataclasses.replace(sphere, index_axes=axes)
