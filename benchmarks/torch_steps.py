"""The optimizers that users of PyTorch have, on the same parameters; nothing where it is missing."""

import importlib
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import spherical_optax as so


class TorchStep:
    """One optimizer of PyTorch with parameters of its own; see `benchmarks.speed.Step`."""

    temporary_bytes = None  # neither is known
    compile_seconds = None

    def __init__(self, make: Callable[[list[Any]], Any], params: list[Any], every: int):
        self._optimizer, self._every = make(params), every
        self._optimizer.step()  # makes the state
        state = [x for of in self._optimizer.state.values() for x in of.values()]
        self.state_bytes = sum(x.nbytes for x in state if hasattr(x, "nbytes"))
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        for _ in range(self._every):
            self._optimizer.step()
        self.seconds.append((time.perf_counter() - start) / self._every)


LIBRARIES = ("torch", "adamp", "pytorch_optimizer", "geoopt")


def torch_environment() -> dict[str, Any]:
    """Versions of the libraries that are installed, and PyTorch's threads."""
    torch = _found("torch")
    if torch is None:
        return {}
    versions = {name: version(name) for name in LIBRARIES if _found(name)}
    return versions | {"torch_threads": torch.get_num_threads()}


def torch_steps(
    params: Any, grads: Any, spheres: Any, rate: float, weight_decay: float, every: int
) -> dict[str, TorchStep]:
    """Of every library that is installed."""
    torch, adamp, other, geoopt = map(_found, LIBRARIES)
    if torch is None:
        return {}

    def tensor(x: Any) -> Any:
        return torch.from_numpy(np.array(x))

    def plain(x: Any, g: Any, sphere: so.Sphere | None) -> Any:
        del sphere
        made = torch.nn.Parameter(tensor(_channels_first(x)))
        made.grad = tensor(_channels_first(g))
        return made

    def on_sphere(x: Any, g: Any, sphere: so.Sphere | None) -> Any:
        """One filter is a point on a sphere: a row of a matrix."""
        if sphere is None:
            return plain(x, g, sphere)
        rows, slopes = (_channels_first(y).reshape(y.shape[-1], -1) for y in (x, g))
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        made = geoopt.ManifoldParameter(tensor(rows), manifold=geoopt.Sphere())
        made.grad = tensor(slopes)
        return made

    def step(make: Callable[[list[Any]], Any], parameter: Callable[..., Any] = plain) -> TorchStep:
        leaves = zip(*map(_leaves, (params, grads, spheres)), strict=True)
        return TorchStep(make, [parameter(*leaf) for leaf in leaves], every)

    options: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay}
    adam = torch.optim.Adam
    found = {
        "torch Adam, single": step(lambda p: adam(p, **options, foreach=False, fused=False)),
        "torch Adam, foreach": step(lambda p: adam(p, **options, foreach=True)),
        "torch Adam, fused": step(lambda p: adam(p, **options, fused=True)),
    }
    if adamp is not None:
        found["adamp AdamP"] = step(lambda p: adamp.AdamP(p, **options))
    if other is not None:
        found["pytorch_optimizer AdamP"] = step(lambda p: other.AdamP(p, **options))
    if geoopt is not None:
        make = geoopt.optim.RiemannianAdam
        found["geoopt RiemannianAdam"] = step(lambda p: make(p, **options), on_sphere)
    return found


def _found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None or isinstance(x, so.Sphere))


def _channels_first(x: Any) -> np.ndarray:
    """The layout of PyTorch, contiguous."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), (-1, -2), (0, 1)) if x.ndim > 1 else x)
