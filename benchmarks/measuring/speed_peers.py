"""Steps of PyTorch's optimizers on the same parameters; none where PyTorch is not installed."""

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
    """One optimizer of PyTorch with parameters of its own; the peer of `optax_steps.Step`.

    `grads` are lists of gradients, one gradient for each parameter; the lists take turns.
    """

    temporary_bytes = None  # PyTorch tells neither
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
    """A function that waits until the device has done its work: a GPU works on after a call returns."""
    return _import_if_found("torch").cuda.synchronize if device.type == "cuda" else lambda: None


LIBRARIES = ("torch", "adamp", "pytorch_optimizer", "geoopt")


def describe_torch() -> dict[str, Any]:
    """Versions of the libraries that are installed, and PyTorch's threads."""
    torch = _import_if_found("torch")
    if torch is None:
        return {}
    versions = {name: version(name) for name in LIBRARIES if _import_if_found(name)}
    return versions | {"torch_threads": torch.get_num_threads()}


class Tensors:
    """JAX's parameters and gradients as tensors of PyTorch; `grads` have a leading axis."""

    def __init__(self, params: Any, grads: Any, spheres: Any):
        self._params, self._grads = _list_leaves(params), _list_leaves(grads)
        self._spheres = _list_leaves(spheres)

    def convert_params(self, convert: Callable[..., Any]) -> list[Any]:
        return [convert(*pair) for pair in zip(self._params, self._spheres, strict=True)]

    def convert_grads(self, convert: Callable[..., Any]) -> list[list[Any]]:
        pairs = list(zip(self._grads, self._spheres, strict=True))
        return [
            [convert(g[step], sphere) for g, sphere in pairs] for step in range(len(self._grads[0]))
        ]


def to_tensor(x: Any, sphere: so.Sphere | None = None) -> Any:
    """A copy in PyTorch's layout, on JAX's device: both libraries are timed there."""
    del sphere
    torch = _import_if_found("torch")
    tensor = torch.from_dlpack(x)
    tensor = tensor.movedim((-1, -2), (0, 1)) if tensor.ndim > 1 else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def to_parameter(x: Any, sphere: so.Sphere | None = None) -> Any:
    return _import_if_found("torch").nn.Parameter(to_tensor(x, sphere))


def to_rows(x: Any, sphere: so.Sphere | None) -> Any:
    """One filter is one point on a sphere, which is one row of a matrix."""
    return to_tensor(x) if sphere is None else to_tensor(x).flatten(1)


def to_manifold(x: Any, sphere: so.Sphere | None) -> Any:
    torch, geoopt = _import_if_found("torch"), _import_if_found("geoopt")
    rows = to_rows(x, sphere)
    if sphere is None:
        return torch.nn.Parameter(rows)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return geoopt.ManifoldParameter(rows, manifold=geoopt.Sphere())


def make_torch_steps(
    params: Any, grads: Any, spheres: Any, rate: float, weight_decay: float, every: int
) -> dict[str, TorchStep]:
    """Steps of every library that is installed; `grads` holds gradients along a leading axis."""
    torch, adamp, other, geoopt = map(_import_if_found, LIBRARIES)
    if torch is None:
        return {}
    tensors = Tensors(params, grads, spheres)
    gradients = tensors.convert_grads(to_tensor)
    options: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay}

    def make_step(optimizer: Callable[..., Any], **more: Any) -> TorchStep:
        def make(params: list[Any]) -> Any:
            return optimizer(params, **options, **more)

        return TorchStep(make, tensors.convert_params(to_parameter), gradients, every)

    steps = {
        "torch Adam, single": make_step(torch.optim.Adam, foreach=False, fused=False),
        "torch Adam, foreach": make_step(torch.optim.Adam, foreach=True),
        "torch Adam, fused": make_step(torch.optim.Adam, fused=True),
    }
    if adamp is not None:
        steps["adamp AdamP"] = make_step(adamp.AdamP)
    if other is not None:
        steps["pytorch_optimizer AdamP"] = make_step(other.AdamP)
    if geoopt is not None:
        steps["geoopt RiemannianAdam"] = TorchStep(
            lambda params: geoopt.optim.RiemannianAdam(params, **options),
            tensors.convert_params(to_manifold),
            tensors.convert_grads(to_rows),
            every,
        )
    return steps


def _import_if_found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    except Exception as error:  # OSError, for example, from a CUDA library of another version
        print(f"{name} cannot be imported: {to_one_line(error)}", file=sys.stderr)
        return None


def _list_leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None or isinstance(x, so.Sphere))
