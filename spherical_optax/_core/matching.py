"""Matches every `spheres` argument with a tree of arrays, by path."""

import dataclasses
import inspect
import re
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._core.boxes import is_end, to_dictionaries
from spherical_optax._core.groups import Groups
from spherical_optax._core.paths import Path, join_paths, leaves_with_paths, list_leaves
from spherical_optax._core.sphere import Sphere, Spheres


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, Sphere)


def spheres_where(
    params: Any, pattern: str | Callable[..., bool], sphere: Sphere = Sphere()
) -> Spheres:
    r"""Puts the leaves whose path matches on spheres, and no others.

    Use this when the names of the parameters tell which are normalised, as in `"Conv_0/kernel"`.

    Args:
      params: the parameters; `jax.ShapeDtypeStruct`s will do.
      pattern: a regular expression, searched in paths like `"Block_0/Conv_1/kernel"`; or a function of
        the path, or of the path and the leaf, that returns whether the leaf is on spheres.
      sphere: the `Sphere` of every leaf that matches.

    Returns:
      A tree shaped like `params` with `sphere` where the path matches and None elsewhere.

    Raises:
      ValueError: if `sphere` is not a `Sphere` or does not fit a leaf that matches, or if no leaf
        matches (the message lists the paths).

    >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.zeros(8)}}
    >>> so.spheres_where(params, r"Conv_\d+/kernel")
    {'Conv_0': {'bias': None, 'kernel': Sphere(index_axes=(-1,), blocks=None, tie=None)}}

    Source: section 2.1 of "A spherical analysis of Adam with Batch Normalization" for the spheres.
    """
    if not isinstance(sphere, Sphere):
        raise ValueError(f"spheres_where: sphere is {sphere!r}, not a Sphere")
    leaves, treedef = leaves_with_paths(params, lambda x: x is None)
    if not callable(pattern):
        regex = re.compile(pattern)
        chosen = [bool(regex.search("/".join(path))) for path, _ in leaves]
    elif _count_required_arguments(pattern) == 2:
        chosen = [bool(pattern("/".join(path), leaf)) for path, leaf in leaves]
    else:
        chosen = [bool(pattern("/".join(path))) for path, _ in leaves]
    specs = [
        sphere if take and leaf is not None else None
        for take, (_, leaf) in zip(chosen, leaves, strict=True)
    ]
    if not any(specs):
        raise ValueError(
            f"spheres_where: {pattern!r} matches no parameter; the paths are: "
            f"{join_paths(path for path, _ in leaves) or 'none, there are no parameters'}"
        )
    spheres = jax.tree.unflatten(treedef, specs)
    match(spheres, params)
    return spheres


def on_spheres(spheres: Spheres) -> Callable[[Any], Any]:
    """Makes a mask: a function of the parameters that says of every leaf whether it is on spheres.

    Use this when something should happen on the spheres only, or off them only: in `optax.masked`, as
    the mask of `optax.add_decayed_weights`, or as labels of `optax.partition`.

    Args:
      spheres: how the leaves split into groups.

    Returns:
      A function that takes a tree of parameters, or of updates, and returns a tree of bool. A leaf whose
      groups have one coordinate counts as off the spheres, because optimizers treat it so.

    Raises:
      ValueError: when called, if `spheres` does not fit.

    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    >>> mask = so.on_spheres({"kernel": so.Sphere(), "bias": None})
    >>> mask(params)
    {'bias': False, 'kernel': True}
    >>> tx = optax.add_decayed_weights(1e-4, mask)

    Source: section 2.1 of "A spherical analysis of Adam with Batch Normalization" for the spheres.
    """

    def mask(tree: Any) -> Any:
        groups = match(spheres, tree).with_tangent_space()
        return groups.label(tree, lambda leaf: leaf is not None)

    return mask


def _count_required_arguments(function: Callable[..., bool]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of C have no signature, such as "conv".startswith
        return 1
    return sum(p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)


def match(spheres: Spheres, tree: Any) -> Groups:
    """Matches a `spheres` argument with a tree, by path, and checks every spec against its leaf.

    Because paths are compared and not containers, a dict of spheres serves a FrozenDict, an `nnx.State`
    or a dataclass with the same names. `spheres` may have entries for leaves that `optax.masked` or
    Equinox has taken out of `tree`. A `Groups` is returned as it is, unchecked.

    Raises:
      ValueError: naming path, shape and spec, if structure, axes, blocks or ties do not fit.
    """
    if isinstance(spheres, Groups):
        return spheres
    leaves = list_leaves(tree)
    chosen = assign_specs(spheres, tree)
    split = [
        None if (spec := chosen[path]) is None else _split_array("/".join(path), spec, leaf)
        for path, leaf in leaves
    ]
    tied, ties = _tie_arrays(chosen, split)
    treedef = jax.tree.structure(to_dictionaries(tree), is_leaf=is_end)
    shapes = [None if leaf is None else jnp.shape(leaf) for _, leaf in leaves]
    return Groups(treedef, [path for path, _ in leaves], shapes, tied, ties)


def match_updates(spheres: Spheres, updates: Any, params: Any) -> Groups:
    """Matches `spheres` with the updates of a step, which have to fit the parameters if these are given.

    An update may be None, as Equinox leaves parameters out; its entry then has no spheres.

    Raises:
      ValueError: as `match`; or naming the path, if a parameter has no update, or one of another shape.
    """
    if params is not None:
        given = dict(list_leaves(updates))
        for path, x in list_leaves(params):
            if path not in given:
                raise ValueError(
                    f"the updates have no entry {'/'.join(path)!r}; give it zeros or None"
                )
            g = given[path]
            if g is not None and x is not None and jnp.shape(g) != jnp.shape(x):
                raise ValueError(
                    f"the update of {'/'.join(path)!r} has shape {jnp.shape(g)}, and the parameter "
                    f"{jnp.shape(x)}"
                )
    return match(spheres, updates)


def assign_specs(spheres: Spheres, tree: Any) -> dict[Path, Sphere | None]:
    """The spec of every leaf of a tree, None included, by path; raises if the structure does not fit."""
    if spheres is Sphere:
        raise ValueError("spheres is the class Sphere; write Sphere(), with parentheses")
    leaves = list_leaves(tree)
    # There are no arrays: the tree is empty, or the placeholder of `optax.tree.map_params`.
    if all(leaf is None for _, leaf in leaves):
        return {path: None for path, _ in leaves}
    # An Equinox module of spheres is callable too, but it is a tree and no leaf.
    if callable(spheres) and jax.tree_util.all_leaves([spheres]):
        spheres = spheres(tree)
    specs = dict(list_leaves(spheres, _is_spec))
    for path, spec in specs.items():
        if not _is_spec(spec):
            where = repr("/".join(path)) if path else "the whole tree"
            raise ValueError(f"spheres: {where} is {reprlib.repr(spec)}, neither a Sphere nor None")
    chosen: dict[Path, Sphere | None] = {}
    used: set[Path] = set()
    for path, leaf in leaves:
        where = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in specs), None)
        if where is not None:
            used.add(where)
        elif leaf is not None:
            raise ValueError(
                f"spheres: no entry for the parameter {'/'.join(path)!r} of shape "
                f"{jnp.shape(leaf)}; the entries are {join_paths(specs)}. Give every parameter, or a "
                "node above it, a Sphere or None"
            )
        chosen[path] = None if where is None or leaf is None else specs[where]
    if extra := [path for path in specs if path not in used]:
        _check_holes(specs, extra, tree, chosen)
    return chosen


def _split_array(where: str, sphere: Sphere, array: Any) -> ArrayGroups:
    """The groups of one array; raises if the axes or blocks do not fit it."""
    shape, ndim = jnp.shape(array), jnp.ndim(array)
    what = f"{sphere} does not fit the parameter {where!r} of shape {shape}"
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{what}: it is {jnp.result_type(array)}, not real; give it None")
    for axis in sphere.index_axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{what}: axis {axis} is out of range for {ndim} dimensions")
    axes = tuple(axis % ndim for axis in sphere.index_axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{what}: index_axes name an axis twice")
    counts = tuple(shape[axis] for axis in axes)
    if sphere.blocks is not None:
        if counts[-1] % sphere.blocks:
            raise ValueError(
                f"{what}: {sphere.blocks} blocks do not divide axis {sphere.index_axes[-1]} of "
                f"length {counts[-1]}; give a divisor of it"
            )
        counts = (*counts[:-1], sphere.blocks)
    return ArrayGroups(shape, axes, counts)


def _check_holes(specs: dict[Path, Any], extra: list[Path], tree: Any, paths: Any) -> None:
    """Raises unless the `extra` specs, which met no parameter, are where the tree has no arrays.

    Such a hole is a None, an `optax.MaskedNode` or an empty container.
    """

    def is_hole(x: Any) -> bool:
        return not jax.tree.leaves(x)

    # Sets of beginnings, because there may be thousands of holes: `optax.masked` makes one per array.
    holes = {path for path, x in list_leaves(tree, is_hole) if is_hole(x)}
    above = {hole[:n] for hole in holes for n in range(len(hole) + 1)}
    for path in extra:
        if path not in above and not any(path[:n] in holes for n in range(len(path) + 1)):
            raise ValueError(
                f"spheres: {specs[path]} at {'/'.join(path)!r}, where there is no parameter; the "
                f"parameters are {join_paths(paths)}"
            )


def _tie_arrays(
    chosen: dict[Path, Sphere | None], leaves: list[ArrayGroups | None]
) -> tuple[list[ArrayGroups | None], list[list[int]]]:
    """The leaves, each with the coordinates that its groups have in tied leaves, and the ties."""
    ties: dict[str, list[tuple[int, ArrayGroups, str]]] = {}
    for i, ((path, sphere), leaf) in enumerate(zip(chosen.items(), leaves, strict=True)):
        if leaf is not None and sphere is not None and sphere.tie is not None:
            what = f"{'/'.join(path)!r} of shape {leaf.shape} with {sphere} has {leaf.counts}"
            ties.setdefault(sphere.tie, []).append((i, leaf, what))
    leaves = list(leaves)
    for tied in ties.values():
        if len({leaf.counts for _, leaf, _ in tied}) > 1:
            raise ValueError(
                "tied leaves must split into the same groups, but "
                + "; ".join(what for _, _, what in tied)
                + ". Choose index_axes and blocks that agree, or another tie"
            )
        size = sum(leaf.own_size for _, leaf, _ in tied)
        for i, leaf, _ in tied:
            leaves[i] = dataclasses.replace(leaf, tied_size=size - leaf.own_size)
    return leaves, [[i for i, _, _ in tied] for tied in ties.values() if len(tied) > 1]
