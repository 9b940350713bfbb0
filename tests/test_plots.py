"""The pictures of `so.analysis`: what is drawn, what is left out, and what is said when nothing is."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import spherical_optax as so

A = so.analysis
PLOTS = {"radius": A.plot_radii, "effective_lr": A.plot_effective_lr, "angle": A.plot_angles}
LABELS = {
    "radius": "radius ‖x‖",
    "effective_lr": "effective learning rate ηᵉ",
    "angle": "angle per step, rad",
}


def history(leaves, steps=(0, 1, 2, 3)):
    """Leaf i has radius (i + 1) (step + 1), and a tenth of it as rate and angle, 0 at step 0."""
    return [
        {"step": float(step)}
        | {
            f"{quantity}/Conv_{i}/kernel": (i + 1)
            * (step + 1)
            * (1.0 if quantity == "radius" else 0.1)
            if step or quantity == "radius"
            else 0.0
            for i in range(leaves)
            for quantity in PLOTS
        }
        for step in steps
    ]


def new_axes(**kwargs):
    return Figure(figsize=(8, 4.5), layout="constrained").add_subplot(**kwargs)


def labels(ax):
    return [line.get_label() for line in ax.lines]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def draw(ax):
    """Warnings are errors: glyphs that are missing, a legend that does not fit."""
    ax.figure.canvas.draw()
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize("quantity", PLOTS)
def test_one_line_per_leaf(quantity):
    ax = new_axes()
    assert PLOTS[quantity](history(3), ax) is ax
    assert labels(ax) == legend(ax) == [f"Conv_{i}/kernel" for i in range(3)]
    log = quantity != "radius"
    for i, line in enumerate(ax.lines):
        steps = [1, 2, 3] if log else [0, 1, 2, 3]
        expected = [(i + 1) * (t + 1) * (0.1 if log else 1.0) for t in steps]
        np.testing.assert_allclose(line.get_xydata(), np.stack([steps, expected], 1), rtol=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", LABELS[quantity])
    assert ax.get_yscale() == ("log" if log else "linear")
    draw(ax)


def test_few_leaves_differ_in_colour_and_dashes():
    ax = new_axes()
    A.plot_radii(history(7), ax)
    assert len({to_hex(line.get_color()) for line in ax.lines}) == 7
    # Black is the prediction's, also under names such as "k".
    assert all(to_hex(line.get_color()) != "#000000" for line in ax.lines)
    assert len({repr(line._unscaled_dash_pattern) for line in ax.lines}) == 7


def test_many_leaves_are_coloured_in_order_with_their_median():
    ax = new_axes()
    A.plot_angles(history(12), ax)
    *leaves, median = ax.lines
    assert labels(ax) == [*(f"Conv_{i}/kernel" for i in range(12)), "median of all 12"]
    # Viridis gets lighter from first to last.
    luminance = [np.dot(line.get_color()[:3], (0.2126, 0.7152, 0.0722)) for line in leaves]
    assert (np.diff(luminance) > 0).all()
    assert all(line.get_linewidth() < median.get_linewidth() / 2 for line in leaves)
    assert to_hex(median.get_color()) == "#000000"
    np.testing.assert_allclose(median.get_ydata(), 6.5 * 0.1 * np.array([2, 3, 4]))
    assert ax.get_legend().get_title().get_text() == "first to last parameter"
    assert legend(ax)[0] == "Conv_0/kernel"
    assert legend(ax)[-2:] == ["Conv_11/kernel", "median of all 12"]
    assert len(legend(ax)) == 6
    draw(ax)


def test_the_median_is_over_what_is_there():
    entries = history(9)
    for i in range(9):
        entries[2][f"angle/Conv_{i}/kernel"] = 0.0 if i else 7.0
        entries[3][f"angle/Conv_{i}/kernel"] = 0.0  # nothing moved
    ax = new_axes()
    A.plot_angles(entries, ax)
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), [[1, 1.0], [2, 7.0]])


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_log_axis_leaves_out_what_it_cannot_show(bad):
    entries = history(2)
    entries[2]["angle/Conv_0/kernel"] = bad
    entries[0]["angle/Conv_1/kernel"] = 5.0  # no step yet, whatever is there
    ax = new_axes()
    A.plot_angles(entries, ax)
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 3], [1, 2, 3]]


def test_radii_keep_zero_and_leave_out_what_is_not_finite():
    entries = history(1)
    entries[1]["radius/Conv_0/kernel"] = 0.0
    entries[2]["radius/Conv_0/kernel"] = np.nan
    ax = new_axes()
    A.plot_radii(entries, ax)
    assert ax.lines[0].get_xydata().tolist() == [[0, 1], [1, 0], [3, 4]]


def test_a_leaf_that_never_moves_is_named():
    entries = history(2)
    for entry in entries:
        entry["angle/Conv_1/kernel"] = 0.0
    ax = new_axes()
    A.plot_angles(entries, ax)
    assert legend(ax) == ["Conv_0/kernel", "Conv_1/kernel (no values)"]


def test_repeated_steps_are_drawn_once_and_in_order():
    ax = new_axes()
    A.plot_radii(history(1, steps=(0, 2, 2, 1, 3, 2)), ax)
    assert ax.lines[0].get_xydata().tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_a_single_point_is_seen():
    ax = new_axes()
    A.plot_radii(history(1, steps=(0,)), ax)
    assert ax.lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("predicted", "points"),
    [
        (0.5, [[1, 0.5], [2, 0.5], [3, 0.5]]),
        (jnp.asarray(0.5), [[1, 0.5], [2, 0.5], [3, 0.5]]),
        (
            [9.0, 0.5, 9.0, 0.25, 0.0],
            [[1, 0.5], [2, 0.25]],
        ),  # the first of the steps 2 is not drawn
    ],
)
def test_prediction(predicted, points):
    ax = new_axes()
    A.plot_angles(history(2, steps=(0, 1, 2, 2, 3)), ax, predicted=predicted)
    line = ax.lines[-1]
    assert line.get_label() == legend(ax)[-1] == "predicted at equilibrium"
    assert line.get_xydata().tolist() == points
    assert to_hex(line.get_color()) == "#000000"
    assert line.is_dashed()


def test_prediction_of_another_length():
    with pytest.raises(ValueError, match=r"^plot_angles: predicted has shape \(3,\); .* 4 entries"):
        A.plot_angles(history(1), new_axes(), predicted=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("paths", "which"),
    [
        ("Conv_1/kernel", [1]),
        ("Conv_1", [1, 10, 11]),
        (r"_[02]/", [0, 2]),
        (["Conv_3/kernel", "Conv_2/kernel"], [2, 3]),
        (["Conv_3/kernel", "_1$|_0/"], [0, 3]),
    ],
)
def test_paths(paths, which):
    ax = new_axes()
    A.plot_radii(history(12), ax, paths=paths)
    assert labels(ax) == [f"Conv_{i}/kernel" for i in which]


def test_predicted_radius():
    ax = new_axes()
    A.plot_radii(history(1), ax, predicted=2.0)
    assert legend(ax)[-1] == "predicted at equilibrium"
    assert set(ax.lines[-1].get_ydata()) == {2.0}


def test_paths_that_are_no_expression():
    with pytest.raises(ValueError, match=r"^plot_radii: '\(' is no regular expression: missing"):
        A.plot_radii(history(2), new_axes(), paths="(")


@pytest.mark.parametrize(("paths", "said"), [("Dense", "'Dense' matches"), ([], "paths is empty")])
def test_paths_that_match_nothing(paths, said):
    with pytest.raises(ValueError, match=rf"^plot_radii: {said}.*Conv_0/kernel, Conv_1/kernel$"):
        A.plot_radii(history(2), new_axes(), paths=paths)


def test_order():
    """Keys that JAX has sorted are put in the order of their numbers; any other order stays."""
    entry = {"step": 1.0}
    ax = new_axes()
    names = ["Conv_0", "Conv_1", "Conv_10", "Conv_2"]
    A.plot_radii([entry | {f"radius/{name}": 1.0 for name in names}], ax)
    assert labels(ax) == ["Conv_0", "Conv_1", "Conv_2", "Conv_10"]
    ax = new_axes()
    names = ["stem", "body_2", "body_10", "head", "body_1"]
    A.plot_radii([entry | {f"radius/{name}": 1.0 for name in names}], ax)
    assert labels(ax) == names


@pytest.mark.parametrize("quantity", PLOTS)
@pytest.mark.parametrize("nothing", [[], history(1)[0], [{"loss": 1.0}], "radius", None])
def test_no_history(quantity, nothing):
    with pytest.raises(
        ValueError, match=rf"^{PLOTS[quantity].__name__}: give a list of so.analysis"
    ):
        PLOTS[quantity](nothing, new_axes())


def test_nothing_on_the_spheres():
    with pytest.raises(ValueError, match=r"^plot_effective_lr: no effective_lr in the history; "):
        A.plot_effective_lr([{"step": 1.0}], new_axes())


def test_nothing_measured_yet():
    ax = new_axes()
    with pytest.raises(
        ValueError, match=r"^plot_angles: no finite positive angle .*after an update$"
    ):
        A.plot_angles(history(2, steps=(0,)), ax)
    assert not ax.lines


def trained(tx, steps=4):
    """The history of a network of two normalised layers."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {f"Dense_{i}": {"kernel": jax.random.normal(keys[i], (3, 3))} for i in range(2)}
    data = jax.random.normal(keys[2], (8, 3))

    def loss(params):
        x = data
        for layer in params.values():
            x = x @ layer["kernel"]
            x = jnp.tanh(x / jnp.sqrt(jnp.mean(x * x, axis=0, keepdims=True)))
        return jnp.sum(x[0])

    tracked = so.track(tx, so.Sphere())
    state = tracked.init(params)
    found = [A.summary(state)]

    @jax.jit
    def step(params, state):
        updates, state = tracked.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        found.append(A.summary(state))
    return found


@pytest.mark.usefixtures("standard_promotion")
def test_a_real_history():
    found = trained(optax.adamw(1e-2))
    for quantity, plot in PLOTS.items():
        ax = new_axes()
        plot(found, ax)
        assert labels(ax) == ["Dense_0/kernel", "Dense_1/kernel"]
        drawn = ax.lines[1].get_ydata()
        np.testing.assert_allclose(drawn[-4:], [e[f"{quantity}/Dense_1/kernel"] for e in found[1:]])
        draw(ax)


@pytest.mark.usefixtures("standard_promotion")
def test_an_effective_learning_rate_that_is_not_known():
    found = trained(optax.lion(1e-3), steps=1)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        A.plot_effective_lr(found, new_axes())
    assert str(error.value) == (
        "plot_effective_lr: the effective learning rate of this optimizer is not known; "
        "plot_angles shows its angles"
    )
    assert len(A.plot_angles(found, new_axes()).lines) == 2


def test_no_axes():
    """On the current ones; the legend gets its place, unless the figure has a layout of its own."""
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        plt.switch_backend("Agg")
        try:
            figure = plt.figure()
            assert A.plot_radii(history(1)) is figure.axes[0]
            assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
            draw(figure.axes[0])
            right = figure.axes[0].get_legend().get_window_extent().x1
            assert right <= figure.bbox.x1
            figure = plt.figure(layout="tight")
            A.plot_radii(history(1))
            assert type(figure.get_layout_engine()).__name__ == "TightLayoutEngine"
        finally:
            plt.close("all")


def test_long_paths_leave_room_for_the_lines():
    ax = new_axes()
    A.plot_radii([{"step": 1.0, "radius/" + "Block/" * 30 + "kernel": 1.0}], ax)
    draw(ax)
    assert legend(ax)[0].endswith("Block/kernel")
    assert ax.get_position().width > 0.4


def test_import_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import spherical_optax as so; "
        "so.analysis.plot_radii; so.analysis.plot_sphere"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The sphere. The camera of this view is on the positive x axis.


def sphere(trajectories, **kwargs):
    ax = new_axes(projection="3d")
    ax.view_init(elev=0, azim=0)
    return A.plot_sphere(trajectories, ax, **kwargs)


def lines_of(ax, label):
    """The near and the far piece of a trajectory, without holes."""
    found = []
    for name in (label, f"_{label}"):
        (line,) = (line for line in ax.lines if line.get_label() == name)
        points = np.stack(line.get_data_3d(), 1)
        found.append((line, points[~np.isnan(points).any(1)]))
    return found


def test_sphere_draws_directions_and_fades_the_far_side():
    ax = sphere({"SGD": [[3.0, 0.0, 1.0], [0.1, 5.0, 0.1], [-7.0, 1.0, 0.0]]})
    (near, front), (far, back) = lines_of(ax, "SGD")
    assert (front[:, 0] >= 0).all()
    assert (back[1:, 0] < 0).all()
    np.testing.assert_array_equal(back[0], front[-1])  # no gap
    for points in (front, back):
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.0)
        assert np.linalg.norm(np.diff(points, axis=0), axis=1).max() < 0.031
    np.testing.assert_allclose(front[0], np.array([3.0, 0.0, 1.0]) / 10**0.5)
    assert near.get_color() == far.get_color()
    assert far.get_alpha() <= near.get_alpha() / 2
    draw(ax)


@pytest.mark.parametrize(("elev", "azim", "roll"), [(30, -60, 0), (-20, 100, 0), (80, 10, 45)])
def test_the_far_side_is_that_of_the_view(elev, azim, roll):
    ax = new_axes(projection="3d")
    ax.view_init(elev, azim, roll)
    a, e = np.deg2rad([azim, elev])
    camera = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    points = np.random.default_rng(0).normal(size=(30, 3))
    A.plot_sphere({"x": points}, ax)
    (_, front), (_, back) = lines_of(ax, "x")
    assert (front @ camera > -1e-6).all()
    assert (back @ camera < 0.032).all()  # the pieces overlap by a point


def test_sphere_markers():
    ax = sphere({"a": [[1.0, 0.0, 0.0], [-1.0, 0.2, 0.0]]})
    found = {}
    for line in ax.lines:
        if line.get_marker() in "o*" and len(line.get_data_3d()[0]):
            found[line.get_marker()] = (np.stack(line.get_data_3d(), 1)[0], line.get_alpha())
    np.testing.assert_allclose(found["o"][0], [1, 0, 0])
    np.testing.assert_allclose(found["*"][0], np.array([-1, 0.2, 0]) / 1.04**0.5)
    assert found["*"][1] < found["o"][1] == 1.0


def test_sphere_is_round_and_without_clutter():
    ax = sphere({"a": np.eye(3), "b": -np.eye(3)})
    assert not ax.axison
    assert ax.get_xlim() == ax.get_ylim() == ax.get_zlim()
    lengths = np.linalg.norm(ax.get_proj()[:2, :3], axis=1)
    np.testing.assert_allclose(lengths[0], lengths[1])  # a circle stays one
    assert legend(ax) == ["a", "b", "start", "end"]
    assert lines_of(ax, "a")[0][0].get_color() != lines_of(ax, "b")[0][0].get_color()


def test_sphere_leaves_the_legend_its_place():
    ax = sphere({f"SGD with momentum {i}": np.eye(3) for i in range(4)}, loss=lambda u: u[:, 0])
    draw(ax)
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert ax.get_position().height > 0.6


def test_sphere_coloured_by_a_loss():
    seen = []

    def loss(u):
        seen.append(u)
        return jnp.asarray(u[:, 2])

    ax = sphere({"a": np.eye(3)}, loss=loss)
    (u,) = seen
    assert u.ndim == 2
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1.0)
    *_, bar = ax.figure.axes
    assert bar.get_ylabel() == "loss"
    np.testing.assert_allclose(bar.get_ylim(), [u[:, 2].min(), u[:, 2].max()])
    draw(ax)
    colors = ax.collections[0].get_facecolor()
    assert len(np.unique(colors[colors[:, 3] > 0], axis=0)) > 30


def test_sphere_loss_with_holes():
    draw(sphere({"a": np.eye(3)}, loss=lambda u: np.where(u[:, 2] > 0.5, np.inf, u[:, 0])))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda u: u, r"\(\d+, 3\)"),
        (lambda u: 1.0, r"\(\)"),
        (lambda u: np.full(len(u), np.nan), r"\(\d+,\), or no finite number"),
    ],
)
def test_sphere_loss_that_is_none(loss, shape):
    with pytest.raises(ValueError, match=rf"^plot_sphere: loss .*{shape}"):
        sphere({"a": np.eye(3)}, loss=loss)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (np.ones(3), r"'a' has shape \(3,\); needed is \(steps, 3\)"),
        (np.ones((4, 2)), r"'a' has shape \(4, 2\)"),
        (np.ones((0, 3)), r"'a' has shape \(0, 3\)"),
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "'a' has a point that is 0 or not finite"),
        ([[1.0, np.nan, 0.0]], "'a' has a point that is 0 or not finite"),
    ],
)
def test_sphere_errors(points, said):
    with pytest.raises(ValueError, match=f"^plot_sphere: {said}"):
        sphere({"a": points})


def test_sphere_without_labels():
    with pytest.raises(ValueError, match=r"^plot_sphere: give a dict"):
        sphere([np.eye(3)])


def test_sphere_on_flat_axes():
    with pytest.raises(ValueError, match=r'^plot_sphere: the Axes are not 3-D; .*projection="3d"'):
        A.plot_sphere({"a": np.eye(3)}, new_axes())


@pytest.mark.parametrize(
    "points", [[[1.0, 0, 0]], [[1e-200, 0, 0], [0, 1e200, 0]], [[1.0, 0, 0], [-1.0, 0, 0]]]
)
def test_sphere_of_extreme_trajectories(points):
    """A single point, radii whose squares are not floats, antipodes."""
    draw(sphere({"a": points}))
