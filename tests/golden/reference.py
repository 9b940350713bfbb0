"""The optimizers of the paper, group by group, in float64 numpy.

Written from the equations alone and as plainly as possible: a group is a flat vector, the transport is
the explicit formula with the previous point at hand, nothing is vectorised over groups. It shares no
code with the package.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

ADAM_KINDS = ("adam", "adams", "adamst", "adamsrt", "adamg", "adamp", "adamh", "hyperball")
SGD_KINDS = ("sgd", "sgd_mrt", "adamg_star", "sgdp")
DECOUPLED = ("adamp", "sgdp", "adamh")  # whose weight decay is not in the gradient


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Hyper-parameters; `lr` and `l2` are functions of the step, counted from 0."""

    lr: Callable[[int], float]
    l2: Callable[[int], float] = lambda step: 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    wd_ratio: float = 0.1


def labels(shape, index_axes, blocks=None):
    """The number of each coordinate's group, in the order of the index axes as listed."""
    coordinates = np.indices(shape)
    index, extents = [], []
    for position, axis in enumerate(index_axes):
        coordinate, extent = coordinates[axis], shape[axis]
        if blocks is not None and position == len(index_axes) - 1:
            coordinate, extent = coordinate // (extent // blocks), blocks
        index.append(coordinate)
        extents.append(extent)
    if not index:
        return np.zeros(shape, int)
    return np.ravel_multi_index(tuple(index), tuple(extents))


def groups(shapes, specs):
    """Lists of [(leaf, flat indices), ...]: the groups; and the same for the remaining coordinates.

    Args:
      shapes: leaf name -> shape.
      specs: leaf name -> (index_axes, blocks, tie), or None for a leaf that is on no sphere.
    """
    members = {}
    for leaf, spec in specs.items():
        if spec is None:
            continue
        index_axes, blocks, tie = spec
        flat = labels(shapes[leaf], index_axes, blocks).ravel()
        for label in np.unique(flat):
            key = (("tie", tie) if tie is not None else ("leaf", leaf), label)
            members.setdefault(key, []).append((leaf, np.flatnonzero(flat == label)))
    spheres, rest = [], []
    for group in members.values():
        # One coordinate has no tangent space: it is treated like a leaf on no sphere.
        (spheres if sum(len(i) for _, i in group) > 1 else rest).append(group)
    for leaf, shape in shapes.items():
        if specs[leaf] is None:
            rest.append([(leaf, np.arange(int(np.prod(shape))))])
    return spheres, rest


def transport(u, w, m):
    """Parallel transport from u to w of the part of m that is tangent at u."""
    tangent = m - (m @ u) * u
    return tangent - (tangent @ w) / (1 + u @ w) * (u + w)


def gather(tree, group):
    return np.concatenate([tree[leaf].ravel()[index] for leaf, index in group])


def scatter(tree, group, vector):
    start = 0
    for leaf, index in group:
        flat = tree[leaf].ravel()
        flat[index] = vector[start : start + len(index)]
        tree[leaf] = flat.reshape(tree[leaf].shape)
        start += len(index)


def _element_step(kind, x, g, state, k, h):
    """Plain Adam or SGD with momentum, L2 inside the gradient or weight decay outside."""
    if kind in DECOUPLED:
        decay = h.lr(k) * h.l2(k) / (1 - h.momentum if kind == "sgdp" else 1)
        plain = dataclasses.replace(h, l2=lambda step: 0.0)
        return _element_step("sgd" if kind == "sgdp" else "adam", x, g, state, k, plain) - decay * x
    g = g + h.l2(k) * x
    if kind in SGD_KINDS:
        momentum = 0.0 if kind == "adamg_star" else h.momentum
        state["m"] = momentum * state.get("m", 0.0) + g
        return x - h.lr(k) * state["m"]
    state["m"] = h.b1 * state.get("m", 0.0) + (1 - h.b1) * g
    if kind == "hyperball":  # of the momentum alone
        return x - h.lr(k) * state["m"] / (1 - h.b1 ** (k + 1))
    state["v"] = h.b2 * state.get("v", 0.0) + (1 - h.b2) * g**2
    mhat = state["m"] / (1 - h.b1 ** (k + 1))
    vhat = state["v"] / (1 - h.b2 ** (k + 1))
    return x - h.lr(k) * mhat / (np.sqrt(vhat) + h.eps)


def _star_step(x, g, state, k, h):
    """AdamG*, with v written as r^4 / (2 lr^2 beta^(1/2)), r the radius of the SGD it mirrors."""
    r = np.linalg.norm(x)
    if k == 0:
        state["r4"] = r**4
    beta = (1 - h.lr(k) * h.l2(k)) ** 4
    v = state["r4"] / (2 * h.lr(k) ** 2 * np.sqrt(beta))
    u, at_u = x / r, r * g  # gradient of a radially-invariant loss at the direction (Lemma 1)
    y = u - (2 * beta) ** -0.5 * at_u / np.sqrt(v)
    state["r4"] = beta * state["r4"] + 2 * np.sqrt(beta) * h.lr(k) ** 2 * (at_u @ at_u)
    return y / np.linalg.norm(y)


def _tangential_step(kind, x, g, state, k, h):
    """AdamP and SGDP where the sphere is known."""
    u = x / np.linalg.norm(x)
    if kind == "sgdp":
        p = h.momentum * state.get("m", 0.0) + g
        p = state["m"] = p - (p @ u) * u
        return x - h.lr(k) * (p + h.wd_ratio * h.l2(k) / (1 - h.momentum) * x)
    no_decay = dataclasses.replace(h, l2=lambda step: 0.0, lr=lambda step: 1.0)
    p = x - _element_step("adam", x, g, state, k, no_decay)
    return x - h.lr(k) * (p - (p @ u) * u + h.wd_ratio * h.l2(k) * x)


def _hyperball_step(kind, x, g, state, k, h):
    """AdamH, and the hyperball of transported momentum, at the radius of the start."""
    r = np.linalg.norm(x)
    if kind == "adamh":
        no_decay = dataclasses.replace(h, l2=lambda step: 0.0, lr=lambda step: 1.0)
        q = x - _element_step("adam", x, g, state, k, no_decay)
    else:
        m = transport(state["u"], x / r, state["m"]) if k > 0 else np.zeros_like(x)
        q = state["m"] = h.b1 * m + (1 - h.b1) * (g + h.l2(k) * x)
        state["u"] = x / r
    y = x - h.lr(k) * r * q / (np.linalg.norm(q) or 1.0)
    return r * y / np.linalg.norm(y)


def _sphere_step(kind, x, g, state, k, h):
    """Eqs. 18-20 and their relatives; transport drops the radial part of the momentum."""
    if kind in ("adam", "sgd"):
        return _element_step(kind, x, g, state, k, h)
    if kind == "adamg_star":
        return _star_step(x, g, state, k, h)
    if kind in ("adamp", "sgdp"):
        return _tangential_step(kind, x, g, state, k, h)
    if kind in ("adamh", "hyperball"):
        return _hyperball_step(kind, x, g, state, k, h)
    r = np.linalg.norm(x)
    m, v = state.get("m", np.zeros_like(x)), state.get("v", 0.0)
    if k > 0:
        u_old, r_old = state["u"], state["r"]
        if kind in ("adamst", "adamsrt", "adamg", "sgd_mrt"):
            m = transport(u_old, x / r, m)
        if kind in ("adamsrt", "sgd_mrt"):
            m, v = (r_old / r) * m, (r_old / r) ** 2 * v
    state["u"], state["r"] = x / r, r
    if kind != "adamg":
        g = g + h.l2(k) * x
    if kind == "sgd_mrt":
        state["m"] = h.momentum * m + g
        return x - h.lr(k) * state["m"]
    square = g @ g if kind == "adamg" else g @ g / x.size
    state["m"] = h.b1 * m + (1 - h.b1) * g
    state["v"] = h.b2 * v + (1 - h.b2) * square
    mhat = state["m"] / (1 - h.b1 ** (k + 1))
    vhat = state["v"] / (1 - h.b2 ** (k + 1))
    y = x - h.lr(k) * mhat / (np.sqrt(vhat) + h.eps)
    return y / np.linalg.norm(y) if kind == "adamg" else y


def run(kind, start, specs, gradient, hyper, steps):
    """The trajectory: leaf -> (steps + 1, *shape).

    Args:
      kind: one of ADAM_KINDS or SGD_KINDS.
      start: leaf -> array.
      specs: leaf -> (index_axes, blocks, tie) or None.
      gradient: (step, params) -> gradients; steps count from 0.
      hyper: Hyper.
      steps: int.
    """
    params = {leaf: np.array(x, np.float64) for leaf, x in start.items()}
    spheres, rest = groups({leaf: x.shape for leaf, x in params.items()}, specs)
    todo = [(g, _sphere_step, {}) for g in spheres] + [(g, _element_step, {}) for g in rest]
    trajectory = {leaf: [x] for leaf, x in params.items()}
    for k in range(steps):
        grads = gradient(k, params)
        new = {leaf: x.copy() for leaf, x in params.items()}
        for group, step, state in todo:
            x, g = gather(params, group), gather(grads, group)
            scatter(new, group, step(kind, x, g, state, k, hyper))
        params = new
        for leaf, x in params.items():
            trajectory[leaf].append(x)
    return {leaf: np.stack(xs) for leaf, xs in trajectory.items()}
