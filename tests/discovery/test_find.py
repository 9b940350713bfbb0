"""find_spheres: the traps, the limits, the cost, and what it says about bad input."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from spherical_optax._discovery.find import LINES

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 12))
FILTER = so.Sphere()


def batchnorm(y, eps=1e-5):
    return (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + eps)


def layernorm(y, eps=1e-6):
    y = y - y.mean(-1, keepdims=True)
    return y / jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


def two_layers(norm=batchnorm):
    params = {
        "first": {"kernel": normal(2, 12, 16)},
        "scale": jnp.zeros((1, 16)),  # hides the first layer
        "second": {"kernel": normal(3, 16, 8)},
        "head": {"kernel": normal(4, 8, 3)},
    }

    def fn(params, x=X):
        x = jax.nn.relu(params["scale"] * norm(x @ params["first"]["kernel"]))
        return norm(x @ params["second"]["kernel"]) @ params["head"]["kernel"]

    return fn, params


def found(survey):
    return {f.path: f.sphere for f in survey.findings if f.sphere is not None}


def verdicts(survey):
    return {f.path: f.verdict for f in survey.findings}


class TestOutputs:
    def test_a_loss_is_enough(self):
        fn, params = two_layers()
        spheres = so.find_spheres(lambda p: jnp.mean(jnp.square(fn(p) - 1)), params, key=KEY)
        assert spheres["first"] == spheres["second"] == {"kernel": FILTER}
        assert spheres["head"] == {"kernel": None}

    def test_any_tree_of_any_sizes(self):
        """An output that depends on the scale counts, however small it is next to the others."""
        fn, params = two_layers()

        def both(p):
            logits = 1e6 * fn(p)
            counts = {"class": logits.argmax(-1), "none": None, "empty": jnp.zeros((0, 3))}
            return logits, counts, 1e-6 * p["second"]["kernel"][0, 0]

        spheres = so.find_spheres(both, params, key=KEY)
        assert spheres["first"] == {"kernel": FILTER}
        assert spheres["second"] == {"kernel": None}

    def test_complex_outputs(self):
        fn, params = two_layers()
        spheres = so.find_spheres(lambda p: jnp.fft.fft(fn(p)), params, key=KEY)
        assert spheres["first"] == {"kernel": FILTER}

    def test_float64(self, x64):
        fn, params = two_layers()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        survey = so.survey_spheres(lambda p: fn(p, X.astype(jnp.float64)), params, key=KEY)
        assert found(survey) == {"first/kernel": FILTER, "second/kernel": FILTER}


class TestTraps:
    def test_zero_scales_hide_nothing(self):
        fn, params = two_layers()
        assert found(so.survey_spheres(fn, params, key=KEY)) == {
            "first/kernel": FILTER,
            "second/kernel": FILTER,
        }

    @pytest.mark.parametrize("shape", [(3, 3, 1, 16), (3, 3, 16, 16), (1, 1, 16, 16)])
    def test_axes_of_length_1_are_left_out(self, shape):
        x = jax.random.normal(KEY, (8, 6, 6, shape[2]))

        def fn(params):
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)
            y = y.reshape(-1, 16)
            return jax.nn.relu(batchnorm(y))

        assert so.find_spheres(fn, {"w": normal(5, *shape)}, key=KEY) == {"w": FILTER}

    def test_no_array_dimension_is_ever_too_large(self):
        """1 / sqrt(d) alone would bring the cosine of a random direction below any tolerance."""
        x = jax.random.normal(KEY, (4, 1000))
        params = {"w": normal(6, 1000, 1000)}
        survey = so.survey_spheres(lambda p: jnp.tanh(x @ p["w"]), params, key=KEY)
        assert verdicts(survey) == {"w": "no"}

    @pytest.mark.parametrize("size", [1.0, 0.1])
    def test_eps_with_weak_channels_is_not_per_layer(self, size):
        """One channel in eight is so weak that the eps is a tenth of its variance."""
        weak = np.where(np.arange(16) % 8 == 0, 1e-2, 1.0).astype(np.float32)
        x = size * X * np.tile(weak, 12 // 4)[None, :12]
        kernel = jnp.eye(12, 16) + 0.01 * normal(7, 12, 16)

        def fn(params):
            return jax.nn.relu(batchnorm(x @ params["kernel"])) @ params["head"]

        survey = so.survey_spheres(fn, {"kernel": kernel, "head": normal(8, 16, 3)}, key=KEY)
        assert found(survey) in ({"kernel": FILTER}, {})
        assert size < 1 or found(survey)

    def test_a_branch_that_drowns_its_shortcut(self):
        """At a larger radius alone, the branch would look invariant."""
        params = {"a": {"in": normal(2, 12, 16)}, "b": {"branch": 30.0 * normal(3, 16, 16)}}

        def fn(params):
            x = X @ params["a"]["in"]
            return layernorm(x + jax.nn.relu(layernorm(x)) @ params["b"]["branch"])

        for seed in range(5):
            survey = so.survey_spheres(fn, params, key=jax.random.key(seed))
            assert found(survey) == {}, f"\n{survey}"

    def test_a_small_bias_is_still_tied(self):
        """Next to inputs of 100, a bias of about 1 hardly shows in the kernel's figure."""
        params = {"d": {"kernel": normal(2, 12, 16), "bias": jnp.zeros((1, 16))}}

        def fn(params):
            return jax.nn.relu(layernorm(300 * X @ params["d"]["kernel"] + params["d"]["bias"]))

        tie = so.Sphere((), tie="d")
        assert found(so.survey_spheres(fn, params, key=KEY)) == {"d/kernel": tie, "d/bias": tie}

    def test_one_filter_in_sixteen_is_not_normalised(self):
        params = {"w": normal(2, 12, 16), "head": normal(3, 16, 5)}

        def fn(params):
            y = X @ params["w"]
            y = jnp.concatenate([batchnorm(y[:, :15]), y[:, 15:]], axis=1)
            return jax.nn.relu(y) @ params["head"]

        for seed in range(5):
            assert found(so.survey_spheres(fn, params, key=jax.random.key(seed))) == {}

    def test_unused_rows_and_dead_filters_do_not_matter(self):
        params = {"embedding": normal(2, 40, 8), "head": normal(3, 8, 4)}
        tokens = jnp.arange(30)

        def fn(params):
            return jax.nn.relu(layernorm(params["embedding"][tokens])) @ params["head"]

        assert found(so.survey_spheres(fn, params, key=KEY)) == {"embedding": so.Sphere((-2,))}

    def test_saturated_softmax(self):
        """Query and key, both scaled up, turn a softmax into an argmax, which is invariant."""
        params = {"query": normal(2, 12, 8), "key": normal(3, 12, 8), "value": normal(4, 12, 8)}

        def fn(params):
            q, k, v = (X @ params[name] for name in ("query", "key", "value"))
            return jax.nn.softmax(q @ k.T) @ v

        for seed in range(5):
            survey = so.survey_spheres(fn, params, key=jax.random.key(seed))
            assert found(survey) == {}, f"\n{survey}"

    @pytest.mark.parametrize("size", [30.0, 100.0, 300.0])
    def test_saturation_at_the_natural_radius(self, size):
        """Raw features drive a tanh to its limits, where it hardly sees the length of the weights."""
        params = {"kernel": normal(2, 12, 64), "bias": jnp.zeros((1, 64)), "head": normal(3, 64, 5)}
        x = size * jax.random.normal(KEY, (128, 12))

        def fn(params):
            return jnp.tanh(x @ params["kernel"] + params["bias"]) @ params["head"]

        for seed in range(3):
            survey = so.survey_spheres(fn, params, key=jax.random.key(seed))
            assert found(survey) == {}, f"\n{survey}"

    def test_a_shortcut_drowned_at_the_natural_radius(self):
        """Raw pixels in front of a residual block with LayerNorm in its branch."""
        params = {"stem": {"kernel": normal(2, 48, 32), "bias": jnp.zeros((1, 32))}}
        params |= {"branch": {"in": normal(3, 32, 64), "out": normal(4, 64, 32)}}
        x = 255 * jax.random.uniform(KEY, (64, 48))

        def fn(params):
            h = x @ params["stem"]["kernel"] + params["stem"]["bias"]
            h += jax.nn.gelu(layernorm(h) @ params["branch"]["in"]) @ params["branch"]["out"]
            return jax.nn.relu(layernorm(h))

        for seed in range(3):
            survey = so.survey_spheres(fn, params, key=jax.random.key(seed))
            assert found(survey) == {}, f"\n{survey}"

    @pytest.mark.parametrize("std", [2e-3, 5e-4])
    def test_a_bias_without_influence_dilutes_nothing(self, std):
        """Kernels so small that the eps matters, and a bias that does not."""
        params = {"kernel": std * jax.random.normal(KEY, (12, 64)), "bias": jnp.zeros((1, 64))}

        def fn(params):
            return jnp.tanh(batchnorm(X @ params["kernel"] + params["bias"]))

        for seed in range(3):
            survey = so.survey_spheres(fn, params, key=jax.random.key(seed))
            assert found(survey) == ({"kernel": FILTER} if std > 1e-3 else {}), f"\n{survey}"


class TestVerdicts:
    def test_no_influence(self):
        params = {
            "d": {"kernel": normal(2, 12, 16), "bias": jnp.ones((1, 16))},
            "unused": normal(3, 4, 4),
        }

        def fn(params):
            return jax.nn.relu(batchnorm(X @ params["d"]["kernel"] + params["d"]["bias"]))

        survey = so.survey_spheres(fn, params, key=KEY)
        assert verdicts(survey) == {
            "d/kernel": "sphere",
            "d/bias": "no influence",
            "unused": "no influence",
        }

    def test_undecided_is_said_and_left_off(self, caplog):
        """A BatchNorm that still lets the radius through, to the power of 0.05."""
        params = {"w": normal(2, 12, 64)}

        def fn(params):
            radius = jnp.linalg.norm(params["w"], axis=0, keepdims=True)
            return jax.nn.relu(batchnorm(X @ params["w"]) * radius**0.05)

        with caplog.at_level(logging.WARNING, "spherical_optax"):
            assert so.find_spheres(fn, params, key=KEY) == {"w": None}
        assert "'w' of shape (12, 64) is undecided" in caplog.text
        assert verdicts(so.survey_spheres(fn, params, key=KEY)) == {"w": "undecided"}

    def test_nothing_found_is_said(self, caplog):
        with caplog.at_level(logging.WARNING, "spherical_optax"):
            so.find_spheres(lambda p: jnp.tanh(X @ p["w"]), {"w": normal(2, 12, 16)}, key=KEY)
        assert "no parameter is on a sphere" in caplog.text

    def test_silent_when_all_is_clear(self, caplog):
        fn, params = two_layers()
        so.find_spheres(fn, params, key=KEY)
        assert caplog.text == ""

    def test_prints_as_a_table(self):
        fn, params = two_layers()
        lines = str(so.survey_spheres(fn, params, key=KEY)).splitlines()
        assert lines[0].split() == [
            "parameter",
            "shape",
            "sphere",
            "radial",
            "figure",
            "at",
            "10",
            "x",
            "radius",
            "verdict",
        ]
        assert [line.split()[0] for line in lines[2:]] == [
            "first/kernel",
            "head/kernel",
            "scale",
            "second/kernel",
        ]
        assert lines[2].endswith("sphere")
        assert lines[3].endswith("no")

    def test_a_gradient_that_is_not_finite_somewhere(self, caplog):
        def fn(params):
            bad = params["bad"] - params["bad"]  # exactly zero
            return batchnorm(X @ params["w"]) + jnp.sqrt(jnp.sum(jnp.square(bad)))

        params = {"w": normal(2, 12, 16), "bad": normal(3, 4, 4)}
        with caplog.at_level(logging.WARNING, "spherical_optax"):
            assert so.find_spheres(fn, params, key=KEY) == {"w": FILTER, "bad": None}
        assert (
            "'bad' of shape (4, 4) is left off the spheres: its gradient is not finite"
            in caplog.text
        )


class TestVectors:
    """Scale and bias of a BatchNorm that reach the next one through ReLU and a layer without bias."""

    def setup_method(self):
        self.params = {
            "norm": {"scale": jnp.ones((1, 16)), "bias": jnp.zeros((1, 16))},
            "first": {"kernel": normal(2, 12, 16)},
            "second": {"kernel": normal(3, 16, 8)},
        }

    def fn(self, params):
        x = batchnorm(X @ params["first"]["kernel"])
        x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
        return jnp.tanh(batchnorm(x @ params["second"]["kernel"]))

    def test_left_out(self):
        spheres = so.find_spheres(self.fn, self.params, key=KEY)
        assert spheres["norm"] == {"scale": None, "bias": None}

    def test_on_request(self):
        spheres = so.find_spheres(self.fn, self.params, key=KEY, vectors=True)
        tie = so.Sphere((), tie="norm")
        assert spheres["norm"] == {"scale": tie, "bias": tie}
        assert spheres["first"] == spheres["second"] == {"kernel": FILTER}
        so.check_spheres(self.fn, self.params, spheres, key=KEY).assert_ok()


class TestTrees:
    def test_flat_dict_with_dots(self):
        params = {"d1.weight": normal(2, 12, 16), "d1.bias": jnp.zeros(16)}
        params |= {"d2.weight": normal(3, 16, 8), "d2.bias": jnp.zeros(8)}

        def fn(params):
            x = jax.nn.relu(layernorm(X @ params["d1.weight"] + params["d1.bias"][None]))
            return layernorm(x @ params["d2.weight"] + params["d2.bias"][None])

        spheres = so.find_spheres(fn, params, key=KEY)
        assert {s.index_axes for s in spheres.values()} == {()}
        assert spheres["d1.weight"].tie == spheres["d1.bias"].tie != spheres["d2.weight"].tie
        so.check_spheres(fn, params, spheres, key=KEY).assert_ok()

    def test_several_ties_of_one_module(self):
        params = {"w1": normal(2, 12, 16), "b1": jnp.zeros((1, 16))}
        params |= {"w2": normal(3, 16, 8), "b2": jnp.zeros((1, 8))}

        def fn(params):
            x = jax.nn.relu(layernorm(X @ params["w1"] + params["b1"]))
            return layernorm(x @ params["w2"] + params["b2"])

        spheres = so.find_spheres(fn, params, key=KEY)
        assert spheres["w1"] == spheres["b1"] == so.Sphere((), tie="b1+w1")
        assert spheres["w2"] == spheres["b2"] == so.Sphere((), tie="b2+w2")

    def test_two_kernels_and_a_bias_of_one_cell(self):
        params = {"i": normal(2, 12, 16), "h": normal(3, 6, 16), "bias": jnp.zeros((1, 16))}
        h = jax.random.normal(jax.random.key(9), (32, 6))

        def fn(params):
            return jnp.tanh(layernorm(X @ params["i"] + h @ params["h"] + params["bias"]))

        spheres = so.find_spheres(fn, params, key=KEY)
        assert set(spheres.values()) == {so.Sphere((), tie="bias+h+i")}

    def test_a_cell_with_two_biases(self):
        """LayerNorm over each of its four gates."""
        params = {"wi": normal(2, 12, 32), "wh": normal(3, 6, 32)}
        params |= {"bi": jnp.zeros((1, 32)), "bh": jnp.zeros((1, 32))}
        h = jax.random.normal(jax.random.key(9), (32, 6))

        def fn(params):
            y = X @ params["wi"] + params["bi"] + h @ params["wh"] + params["bh"]
            return jnp.tanh(layernorm(y.reshape(32, 4, 8)))

        spheres = so.find_spheres(fn, params, key=KEY)
        assert set(spheres.values()) == {so.Sphere((-1,), blocks=4, tie="bh+bi+wh+wi")}

    def test_a_single_array(self):
        assert so.find_spheres(lambda w: batchnorm(X @ w), normal(2, 12, 16), key=KEY) == FILTER

    def test_output_channel_first(self):
        spheres = so.find_spheres(
            lambda p: batchnorm(X @ p["w"].T), {"w": normal(2, 16, 12)}, key=KEY
        )
        assert spheres == {"w": so.Sphere((-2,))}

    def test_blocks_of_the_first_axis(self):
        def fn(params):
            return jax.nn.relu(layernorm((X @ params["w"].T).reshape(32, 4, 4)))

        spheres = so.find_spheres(fn, {"w": normal(2, 16, 12)}, key=KEY)
        assert spheres == {"w": so.Sphere((-2,), blocks=4)}

    def test_other_leaves_are_handed_through(self):
        params = {"w": normal(2, 12, 16), "none": None, "n": 3, "key": KEY, "ids": jnp.arange(4)}

        def fn(params):
            assert params["n"] == 3
            assert params["none"] is None
            return batchnorm(X @ params["w"]) + jax.random.normal(params["key"], (1, 16))

        expected = {**dict.fromkeys(params), "w": FILTER}
        assert so.find_spheres(fn, params, key=KEY) == expected

    def test_parameters_are_left_alone(self):
        fn, params = two_layers()
        before = jax.tree.map(np.array, params)
        so.find_spheres(fn, params, key=KEY)
        jax.tree.map(np.testing.assert_array_equal, before, params)

    def test_same_key_same_answer(self):
        fn, params = two_layers()
        one, other = (so.survey_spheres(fn, params, key=KEY) for _ in range(2))
        assert one == other

    def test_legacy_keys(self):
        fn, params = two_layers()
        assert so.find_spheres(fn, params, key=jax.random.PRNGKey(0))["first"] == {"kernel": FILTER}


class TestPrecision:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision_parameters_of_a_promoting_model(self, dtype):
        fn, params = two_layers()
        low = jax.tree.map(lambda x: x.astype(dtype), params)
        survey = so.survey_spheres(fn, low, key=KEY)
        assert found(survey) == {"first/kernel": FILTER, "second/kernel": FILTER}
        assert max(f.large for f in survey.findings if f.sphere) < 1e-4  # computed in float32

    def test_low_precision_throughout(self):
        """A convolution takes no mixed dtypes: then in bfloat16."""
        x = jax.random.normal(KEY, (8, 6, 6, 3)).astype(jnp.bfloat16)
        params = {"w": normal(2, 3, 3, 3, 16).astype(jnp.bfloat16)}

        def fn(params):
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)
            return jax.nn.relu(batchnorm(y.reshape(-1, 16).astype(jnp.float32)))

        spheres = so.find_spheres(fn, params, key=KEY)
        assert spheres == {"w": FILTER}
        so.check_spheres(fn, params, spheres, key=KEY).assert_ok()
        assert not so.check_spheres(fn, params, {"w": so.Sphere((-2, -1))}, key=KEY).ok

    def test_bias_in_bfloat16(self):
        """GroupNorm after a layer with a bias, all of it in bfloat16."""
        params = {"kernel": normal(2, 12, 32), "bias": jnp.zeros((1, 32))}

        def fn(params):
            kernel, bias = (params[name].astype(jnp.bfloat16) for name in ("kernel", "bias"))
            y = X.astype(jnp.bfloat16) @ kernel + bias
            return jax.nn.relu(layernorm(y.reshape(32, 4, 8)))

        spheres = so.find_spheres(fn, params, key=KEY)
        assert set(spheres.values()) == {so.Sphere((-1,), blocks=4, tie="bias+kernel")}
        so.check_spheres(fn, params, spheres, key=KEY).assert_ok()

    def test_loss_in_float16(self):
        """The gradient of a mean over many outputs is tiny: not to vanish in float16."""
        params = {"kernel": normal(2, 12, 32), "head": normal(3, 32, 4)}
        x = jax.random.normal(KEY, (512, 12)).astype(jnp.float16)

        def fn(params):
            kernel, head = (params[name].astype(jnp.float16) for name in ("kernel", "head"))
            y = batchnorm((x @ kernel).astype(jnp.float32)).astype(jnp.float16)
            return jnp.mean(jnp.square((jax.nn.relu(y) @ head).astype(jnp.float32)))

        assert so.find_spheres(fn, params, key=KEY) == {"kernel": FILTER, "head": None}


class TestDesign:
    """The probes at the larger radius: which arrays are enlarged together."""

    def test_any_two_arrays_are_enlarged_together_exactly_once(self):
        together = LINES.T.astype(int) @ LINES
        np.testing.assert_array_equal(np.diag(together), 3)  # each array alone
        np.testing.assert_array_equal(together[~np.eye(7, dtype=bool)], 1)

    def test_three_of_seven_arrays_are_enlarged_in_each_probe(self):
        assert LINES.shape == (7, 7)
        np.testing.assert_array_equal(LINES.sum(axis=1), 3)


class TestCost:
    def test_ten_gradients_and_one_compilation(self):
        fn, params = two_layers()
        calls, traces = [], []

        def counted(params):
            traces.append(1)
            jax.debug.callback(lambda: calls.append(1))
            return fn(params)

        so.find_spheres(counted, params, key=KEY)
        jax.effects_barrier()
        assert len(calls) == 10
        assert len(traces) == 2  # one to look at the outputs, one to compile

    def test_three_gradients_when_nothing_is_invariant(self):
        calls = []

        def fn(params):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.tanh(X @ params["w"])

        so.find_spheres(fn, {"w": normal(2, 12, 16)}, key=KEY)
        jax.effects_barrier()
        assert len(calls) == 3

    def test_only_jittable_and_jitted_functions(self):
        fn, params = two_layers()

        def staged(params):
            if not isinstance(params["scale"], jax.core.Tracer):
                raise AssertionError("called outside of jit")
            return fn(params)

        for wrapped in (staged, jax.jit(fn)):
            assert so.find_spheres(wrapped, params, key=KEY)["first"] == {"kernel": FILTER}


class TestSharded:
    @pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
    def test_parameters(self, kind):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        _, params = two_layers()
        with jax.set_mesh(mesh):
            sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
            replicated = jax.sharding.NamedSharding(mesh, jax.P())
            del params["head"]  # its three classes cannot be shared among eight
            params = jax.device_put(params, sharding)
            x = jax.device_put(X, replicated)

            def together(y):
                return jax.reshard(y, replicated) if mesh.explicit_axes else y

            def fn(p):
                y = jax.nn.relu(p["scale"] * batchnorm(x @ p["first"]["kernel"]))
                return batchnorm(together(y) @ p["second"]["kernel"])

            spheres = so.find_spheres(fn, params, key=KEY)
            assert spheres["first"] == spheres["second"] == {"kernel": FILTER}
            so.check_spheres(fn, params, spheres, key=KEY).assert_ok()

    def test_batch_statistics_over_a_vmapped_axis(self):
        params = {"w": normal(2, 12, 16), "head": normal(3, 16, 3)}

        def one(params, x):
            y = x @ params["w"]
            mean = jax.lax.pmean(y, "batch")
            var = jax.lax.pmean(jnp.square(y - mean), "batch")
            return jax.nn.relu((y - mean) / jnp.sqrt(var + 1e-5)) @ params["head"]

        def fn(params):
            return jax.vmap(one, (None, 0), axis_name="batch")(params, X)

        assert so.find_spheres(fn, params, key=KEY) == {"w": FILTER, "head": None}


class TestErrors:
    def test_bad_input(self):
        fn, params = two_layers()
        cases = [
            ((fn, params), {"tol": 0.0}, "tol is 0.0, not a number in"),
            ((fn, params), {"tol": 2}, "tol is 2, not a number in"),
            ((fn, params), {"tol": "a"}, "tol is 'a', not a number in"),
            ((fn, params), {"key": jax.random.split(KEY)}, "not one jax.random.key"),
            ((fn, params), {"key": 0}, "key is 0, not one jax.random.key"),
            ((None, params), {}, "fn is a NoneType, not a function"),
            ((fn, {}), {}, "no real arrays among the parameters"),
            ((fn, {"n": jnp.arange(3)}), {}, "no real arrays among the parameters"),
            ((fn, jax.eval_shape(lambda: params)), {}, "'first/kernel' is a ShapeDtypeStruct"),
            ((lambda p: jnp.arange(3), params), {}, "returns no real array"),
            ((lambda p: None, params), {}, "returns no real array"),
            ((params, fn), {}, "fn is a dict, not a function"),
            ((lambda p: fn(p) / 0.0, params), {}, "finite at none of the random points"),
        ]
        for args, kwargs, message in cases:
            with pytest.raises(ValueError, match=message):
                so.find_spheres(*args, **{"key": KEY, **kwargs})

    def test_inside_of_jit(self):
        fn, params = two_layers()
        with pytest.raises(ValueError, match="'first/kernel' is traced; call find_spheres outside"):
            jax.jit(lambda p: fn(p) if so.find_spheres(fn, p, key=KEY) else 0)(params)

    def test_the_functions_own_errors_come_through(self):
        with pytest.raises(KeyError, match="other"):
            so.find_spheres(lambda p: p["other"], {"w": jnp.ones((2, 2))}, key=KEY)
