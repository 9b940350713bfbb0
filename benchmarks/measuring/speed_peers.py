"""The optimizers that users of PyTorch have, on the same parameters; nothing where it is missing."""

import importlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax

import spherical_optax as so
from benchmarks.cli import to_one_line


class TorchStep:
    """One optimizer of PyTorch with parameters of its own; see `benchmarks.speed.Step`.

    `grads` are lists of gradients, one for each parameter, which take turns.
    """

    temporary_bytes = None  # neither is known
    compile_seconds = None

    def __init__(
        self,
        make: Callable[[list[Any]], Any],
        params: list[Any],
        grads: Sequence[list[Any]],
        every: int,
    ):
        self._params, self._grads, self._every = params, grads, every
        self._wait = find_synchronize(params[0].device)
        self._optimizer = make(params)
        self._step(grads[0])  # makes the state
        state = [x for of in self._optimizer.state.values() for x in of.values()]
        self.state_bytes = sum(x.nbytes for x in state if hasattr(x, "nbytes"))
        self.seconds: list[float] = []

    def _step(self, grads: list[Any]) -> None:
        for parameter, grad in zip(self._params, grads, strict=True):
            parameter.grad = grad
        self._optimizer.step()

    def run(self) -> None:
        self._wait()
        start = time.perf_counter()
        for grads in itertools.islice(itertools.cycle(self._grads), self._every):
            self._step(grads)
        self._wait()
        self.seconds.append((time.perf_counter() - start) / self._every)


def find_synchronize(device: Any) -> Callable[[], None]:
    """What waits for the work given to a device of PyTorch: a GPU's goes on after the call."""
    return _import_if_found("torch").cuda.synchronize if device.type == "cuda" else lambda: None


LIBRARIES = ("torch", "adamp", "pytorch_optimizer", "geoopt")


def describe_torch() -> dict[str, Any]:
    """Versions of the libraries that are installed, and PyTorch's threads."""
    torch = _import_if_found("torch")
    if torch is None:
        return {}
    versions = {name: version(name) for name in LIBRARIES if _import_if_found(name)}
    return versions | {"torch_threads": torch.get_num_threads()}


def make_torch_steps(
    params: Any, grads: Any, spheres: Any, rate: float, weight_decay: float, every: int
) -> dict[str, TorchStep]:
    """Of every library that is installed; `grads` holds gradients along a leading axis."""
    torch, adamp, other, geoopt = map(_import_if_found, LIBRARIES)
    if torch is None:
        return {}

    def plain(x: Any, sphere: so.Sphere | None = None) -> Any:
        """A copy in PyTorch's layout, on the device where JAX has it: both are timed there."""
        del sphere
        found = torch.from_dlpack(x)
        found = found.movedim((-1, -2), (0, 1)) if found.ndim > 1 else found
        return found.clone(memory_format=torch.contiguous_format)

    def rows(x: Any, sphere: so.Sphere | None) -> Any:
        """One filter is a point on a sphere: a row of a matrix."""
        return plain(x) if sphere is None else plain(x).flatten(1)

    def on_sphere(x: Any, sphere: so.Sphere | None) -> Any:
        found = rows(x, sphere)
        if sphere is None:
            return torch.nn.Parameter(found)
        found = found / found.norm(dim=1, keepdim=True)
        return geoopt.ManifoldParameter(found, manifold=geoopt.Sphere())

    def leaves_as(convert: Callable[..., Any], tree: Any) -> list[Any]:
        return [
            convert(*pair) for pair in zip(_list_leaves(tree), _list_leaves(spheres), strict=True)
        ]

    def gradients_as(convert: Callable[..., Any]) -> list[list[Any]]:
        steps = range(len(jax.tree.leaves(grads)[0]))
        return [leaves_as(convert, jax.tree.map(lambda g, i=i: g[i], grads)) for i in steps]

    gradients = gradients_as(plain)

    def step(make: Callable[[list[Any]], Any]) -> TorchStep:
        copies = [torch.nn.Parameter(x) for x in leaves_as(plain, params)]
        return TorchStep(make, copies, gradients, every)

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
        found["geoopt RiemannianAdam"] = TorchStep(
            lambda p: make(p, **options),
            leaves_as(on_sphere, params),
            gradients_as(rows),
            every,
        )
    return found


def _import_if_found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    except Exception as error:  # a library of CUDA that does not fit raises OSError, for example
        print(f"{name} cannot be imported: {to_one_line(error)}", file=sys.stderr)
        return None


def _list_leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None or isinstance(x, so.Sphere))
