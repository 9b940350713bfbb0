"""Sums over few columns, which NVIDIA's GPUs get in two stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spherical_optax._core import compiler_hints
from spherical_optax._core.array_groups import ArrayGroups

from .compiling import usual_jit

# Shape and summed axes, and the axis that is summed first and its parts.
CUT = {
    "few outputs": ((3072, 768), (0,), (0, 8)),
    "a long matrix": ((4096, 64), (0,), (0, 16)),
    "a stack": ((2, 512, 64), (1,), (1, 16)),
    "a convolution": ((3, 3, 64, 128), (0, 1, 2), (2, 1)),
    "of one pixel": ((1, 1, 256, 64), (0, 1, 2), (2, 8)),
}
WHOLE = {
    "many columns": ((768, 8192), (0,)),
    "rows": ((768, 768), (1,)),
    "a whole array": ((768, 768), (0, 1)),
    "few rows": ((40, 64), (0,)),
    "an odd number": ((50257, 768), (0,)),
    "a small convolution": ((3, 3, 16, 16), (0, 1, 2)),
    "axes that are apart": ((64, 64, 64), (0, 2)),
    "a vector": ((768,), ()),
}


def sum_of(shape, axes):
    index_axes = tuple(axis for axis in range(len(shape)) if axis not in axes)
    return ArrayGroups(shape, index_axes, tuple(shape[axis] for axis in index_axes)).sum


@pytest.mark.parametrize(("shape", "axes", "cut"), CUT.values(), ids=CUT)
def test_what_is_cut(shape, axes, cut):
    assert compiler_hints._find_cut(shape, axes) == cut
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
        found = compiler_hints._sum_in_two_stages(x, axes, *cut)
        np.testing.assert_allclose(found, jnp.sum(x, axes, keepdims=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "axes"), WHOLE.values(), ids=WHOLE)
def test_what_is_not_cut(shape, axes):
    assert compiler_hints._find_cut(shape, axes) is None


def test_arrays_of_one_shape_are_traced_once(monkeypatch):
    shape, axes, traced = (1024, 96), (0,), []  # a shape that no other test has

    def sum_in_two_stages(x, *options, original=compiler_hints._sum_in_two_stages):
        traced.append(x.shape)
        return original(x, *options)

    monkeypatch.setattr(compiler_hints, "_sum_in_two_stages", sum_in_two_stages)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    jax.make_jaxpr(lambda xs: list(map(sum_of(shape, axes), xs)))(arrays)
    assert traced == [shape]


@pytest.mark.parametrize(("platform", "sums"), [("cpu", 1), ("cuda", 2), ("tpu", 1)])
def test_only_for_gpus(platform, sums):
    shape, axes, _ = CUT["few outputs"]
    traced = jax.jit(sum_of(shape, axes)).trace(jax.ShapeDtypeStruct(shape, jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.reduce(") == sums
    assert text.count("optimization_barrier") == sums - 1


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("name", CUT)
def test_a_sharded_axis_is_not_gathered(name, shards):
    """Of the axis that is cut, every device sums its part."""
    shape, axes, cut = CUT[name]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((shards,), ("x",), auto, devices=jax.devices()[:shards])
    spec = PartitionSpec(*("x" if axis == cut[0] else None for axis in range(len(shape))))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    step = usual_jit(lambda x: compiler_hints._sum_in_two_stages(x, axes, *cut))
    text = step.lower(x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


def test_only_in_compiled_functions(monkeypatch):
    """Outside of one, every call would compile both forms anew."""
    shape, axes, _ = CUT["few outputs"]
    monkeypatch.setattr(compiler_hints, "_find_cut", lambda *_: pytest.fail("was asked"))
    np.testing.assert_array_equal(sum_of(shape, axes)(jnp.ones(shape)), np.full((1, 768), 3072.0))
