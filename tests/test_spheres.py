"""Sphere, its validation, and spheres_where."""

import pickle
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so

from .optimizers import TABLE, random_tree

PARAMS = {
    "Conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "Dense_0": {"kernel": (5, 4), "bias": (4,)},
}


# These may ignore spheres, because they do not need them.
NO_SPHERES = ("adam", "sgd", "sgd_momentum", "adamp_guess", "sgdp_guess")


def _params():
    return random_tree(0, PARAMS)


def _specs(**changes):
    """No spheres, except at the leaves "Conv_0/kernel" and so on that are named."""
    specs = {module: dict.fromkeys(leaves) for module, leaves in PARAMS.items()}
    for path, spec in changes.items():
        module, leaf = path.split("/")
        specs[module][leaf] = spec
    return specs


def _all_of(names):
    """A pattern for texts in which each name occurs, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(name)})" for name in names)


class TestSphere:
    def test_defaults_are_one_group_per_output_channel(self):
        sphere = so.Sphere()
        assert (sphere.index_axes, sphere.blocks, sphere.tie) == ((-1,), None, None)
        assert so.Sphere((0, -1), 4, "x") == so.Sphere(index_axes=(0, -1), blocks=4, tie="x")

    def test_is_frozen_and_hashable(self):
        sphere = so.Sphere(tie="a")
        with pytest.raises(AttributeError):
            sphere.tie = "b"
        assert {sphere, so.Sphere(tie="a"), so.Sphere(tie="b")} == {sphere, so.Sphere(tie="b")}
        assert pickle.loads(pickle.dumps(sphere)) == sphere

    def test_index_axes_may_come_as_a_list(self):
        assert hash(so.Sphere(index_axes=[0, -1])) == hash(so.Sphere(index_axes=(0, -1)))

    def test_is_a_leaf(self):
        spheres = {"a": so.Sphere(), "b": [so.Sphere((0,))]}
        assert jax.tree.leaves(spheres) == [so.Sphere(), so.Sphere((0,))]

    def test_repr_can_be_read_back(self):
        sphere = so.Sphere((0, -1), blocks=2, tie="norm")
        assert eval(repr(sphere), {"Sphere": so.Sphere}) == sphere


# What is wrong -> (spheres, what the message has to name)
BAD = {
    "axis too large": (
        lambda: _specs(**{"Conv_0/kernel": so.Sphere((4,))}),
        ["Conv_0/kernel", "(3, 3, 2, 4)", "Sphere", "(4,)"],
    ),
    "axis too small": (
        lambda: _specs(**{"Dense_0/bias": so.Sphere((-2,))}),
        ["Dense_0/bias", "(4,)", "Sphere", "(-2,)"],
    ),
    "the same axis from both ends": (
        lambda: _specs(**{"Dense_0/kernel": so.Sphere((1, -1))}),
        ["Dense_0/kernel", "(5, 4)", "Sphere", "(1, -1)"],
    ),
    "blocks that do not divide": (
        lambda: _specs(**{"Conv_0/kernel": so.Sphere(blocks=3)}),
        ["Conv_0/kernel", "(3, 3, 2, 4)", "Sphere", "3"],
    ),
    "more blocks than channels": (
        lambda: _specs(**{"Dense_0/bias": so.Sphere(blocks=8)}),
        ["Dense_0/bias", "(4,)", "Sphere", "8"],
    ),
    "a tie of one filter each with one layer": (
        lambda: _specs(
            **{"Conv_0/kernel": so.Sphere(tie="t"), "Conv_0/bias": so.Sphere((), tie="t")}
        ),
        ["Conv_0/kernel", "Conv_0/bias", "(3, 3, 2, 4)", "(4,)", "Sphere", "'t'"],
    ),
    "a tie of different numbers of blocks": (
        lambda: _specs(
            **{
                "Conv_0/kernel": so.Sphere(blocks=2, tie="t"),
                "Conv_0/bias": so.Sphere(blocks=4, tie="t"),
            }
        ),
        ["Conv_0/kernel", "Conv_0/bias", "(3, 3, 2, 4)", "(4,)", "Sphere", "'t'"],
    ),
    "a mask": (lambda: _specs(**{"Conv_0/kernel": True}), ["Conv_0/kernel", "True"]),
    "a label": (lambda: _specs(**{"Conv_0/bias": "sphere"}), ["Conv_0/bias", "'sphere'"]),
    "a class": (lambda: _specs(**{"Conv_0/bias": so.Sphere}), ["Conv_0/bias", "Sphere"]),
    "a missing leaf": (
        lambda: {"Conv_0": {"kernel": so.Sphere()}, "Dense_0": None},
        ["Conv_0/bias"],
    ),
    "a missing module": (lambda: {"Conv_0": None}, ["Dense_0"]),
    "a leaf too many": (lambda: {**_specs(), "Dense_1": so.Sphere()}, ["Dense_1"]),
    "a leaf too deep": (
        lambda: _specs(**{"Conv_0/kernel": {"value": so.Sphere()}}),
        ["Conv_0/kernel"],
    ),
    "another container": (lambda: [so.Sphere(), None], []),
}


def _check(what, use):
    make, names = BAD[what]
    with pytest.raises(ValueError, match=_all_of(names)):
        use(make())


@pytest.mark.parametrize("what", BAD)
def test_spheres_that_do_not_fit(what):
    """The message of every mistake; one function of the package writes all of them."""
    _check(what, lambda spheres: so.geometry.norm(_params(), spheres))


# Whoever takes spheres -> how they are used. Transformations have to raise in `init` already.
USERS = {
    "geometry of one tree": lambda s: so.geometry.norm(_params(), s),
    "geometry of two trees": lambda s: so.geometry.project(_params(), _params(), s),
    "spheres as a callable": lambda s: so.adamsrt(0.01, lambda params: s).init(_params()),
    "ema": lambda s: so.ema(0.9, s, transport=True).init(_params()),
    "trace": lambda s: so.trace(0.9, s, transport=True, rescale=True).init(_params()),
    "rms": lambda s: so.rms(0.9, spheres=s).init(_params()),
    "project": lambda s: so.project(s).init(_params()),
    "normalize": lambda s: so.normalize(s).init(_params()),
    "retract": lambda s: so.retract(s).init(_params()),
} | {
    f"{name}, an optimizer": lambda s, row=row: row(0.01, s).init(_params())
    for name, row in TABLE.items()
    if name not in NO_SPHERES
}


@pytest.mark.parametrize("user", USERS)
def test_every_user_of_spheres_checks_them(user):
    """One mistake of each kind: in a spec, in a tie, in a leaf, and in the structure of the tree."""
    for what in (
        "axis too large",
        "a tie of different numbers of blocks",
        "a mask",
        "a missing leaf",
        "a leaf too many",
    ):
        _check(what, USERS[user])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"index_axes": (), "blocks": 2}, ["blocks", "2"]),
        ({"index_axes": (-1, -1)}, ["(-1, -1)"]),
        ({"blocks": 0}, ["blocks", "0"]),
        ({"blocks": -2}, ["blocks", "-2"]),
    ],
)
def test_never_meaningful(arguments, names):
    """Wrong for every leaf: refused when made or when used."""
    with pytest.raises(ValueError, match=_all_of(names)):
        so.geometry.norm(_params(), _specs(**{"Conv_0/kernel": so.Sphere(**arguments)}))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_only_floating_leaves_lie_on_spheres(dtype):
    params = {"table": {"ids": jnp.ones((3, 2), dtype), "weight": jnp.ones((3, 2))}}
    names = ["table/ids", jnp.dtype(dtype).name, "(3, 2)", "Sphere"]
    with pytest.raises(ValueError, match=_all_of(names)):
        so.adamsrt(0.01, so.Sphere()).init(params)


class TestSpheresWhere:
    def test_regex_finds_anywhere_in_the_path(self):
        sphere = so.Sphere((0, -1))
        spheres = so.spheres_where(_params(), "kernel$", sphere)
        assert spheres == _specs(**{"Conv_0/kernel": sphere, "Dense_0/kernel": sphere})
        assert so.spheres_where(_params(), r"^Conv_\d+/") == _specs(
            **{"Conv_0/kernel": so.Sphere(), "Conv_0/bias": so.Sphere()}
        )

    def test_compiled_regex(self):
        spheres = so.spheres_where(_params(), re.compile("conv.*KERNEL", re.IGNORECASE))
        assert spheres == _specs(**{"Conv_0/kernel": so.Sphere()})

    def test_predicate_of_the_path(self):
        spheres = so.spheres_where(_params(), lambda path: path == "Conv_0/kernel")
        assert spheres == _specs(**{"Conv_0/kernel": so.Sphere()})

    def test_predicate_of_path_and_leaf(self):
        spheres = so.spheres_where(_params(), lambda path, leaf: leaf.ndim == 4)
        assert spheres == _specs(**{"Conv_0/kernel": so.Sphere()})

    @pytest.mark.parametrize("pattern", ["Konv", "^kernel", lambda path: False])
    def test_a_pattern_that_matches_nothing_raises(self, pattern):
        # The message has what there would have been to match.
        names = ["Conv_0/kernel", *([pattern] if isinstance(pattern, str) else [])]
        with pytest.raises(ValueError, match=_all_of(names)):
            so.spheres_where(_params(), pattern)

    def test_abstract_parameters(self):
        abstract = jax.eval_shape(_params)
        assert so.spheres_where(abstract, "kernel") == so.spheres_where(_params(), "kernel")

    def test_lists_and_tuples(self):
        params = [{"w": jnp.ones((2, 2))}, ({"w": jnp.ones((2, 2))}, jnp.ones(2))]
        assert so.spheres_where(params, "^1/0/w$") == [{"w": None}, ({"w": so.Sphere()}, None)]

    def test_masked_nodes_stay(self):
        params = {**_params(), "Conv_0": optax.MaskedNode()}
        spheres = so.spheres_where(params, "kernel")
        assert spheres["Dense_0"] == {"kernel": so.Sphere(), "bias": None}
        so.geometry.norm(params, spheres)

    def test_as_the_callable_of_an_optimizer(self):
        tx = so.adamsrt(0.01, lambda params: so.spheres_where(params, "kernel"))
        params = _params()
        actual, _ = tx.update(params, tx.init(params), params)
        tx = so.adamsrt(0.01, so.spheres_where(params, "kernel"))
        expected, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.all(jax.tree.map(lambda a, e: bool(jnp.all(a == e)), actual, expected))
