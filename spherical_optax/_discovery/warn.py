"""What `find_spheres` tells beside its answer, as warnings of the logger "spherical_optax"."""

import logging
import sys
from typing import Any

import jax

from spherical_optax._discovery.siblings import Finding
from spherical_optax._discovery.text_table import format_figure

_logger = logging.getLogger("spherical_optax")


def warn(findings: tuple[Finding, ...], changing: list[str]) -> None:
    """Logs every parameter without a clear verdict, and whether there are no spheres at all.

    Args:
      findings: of all arrays.
      changing: the paths of arrays on spheres under whose scale `fn` changes.
    """
    for f in findings:
        if f.verdict == "not finite":
            _logger.warning(
                "find_spheres: %r of shape %s is left off the spheres: its gradient is not finite at "
                "any of the random points",
                f.path,
                f.shape,
            )
        if f.verdict == "undecided":
            _logger.warning(
                "find_spheres: %r of shape %s is undecided and left off the spheres: its radial figure "
                "is %s at its radius, and %s at 10 times its radius. If you know that it is on a "
                "sphere, give it a so.Sphere; an L2 penalty in fn, a large eps, or a nonlinearity in "
                "front of the normalisation layer, such as GELU or tanh, also makes this",
                f.path,
                f.shape,
                format_figure(f.natural) or "not finite",
                format_figure(f.large) or "not finite",
            )
    if penalized := [f.path for f in findings if f.verdict == "L2 penalty"]:
        _logger.warning(
            "find_spheres: the gradient of %s has the same part along the parameters in all groups, as "
            "that of an L2 penalty has. Leave weight decay out of fn: return logits, or the loss "
            "without penalty",
            ", ".join(map(repr, penalized[:3])) + (", ..." if len(penalized) > 3 else ""),
        )
    elif all(f.sphere is None for f in findings):
        _logger.warning(
            "find_spheres: no parameter is on a sphere. If there is a normalisation layer: is it in "
            "training mode in fn, are the inputs other than constant, is its eps small beside the "
            "variance, and is there no L2 penalty in fn?"
        )
    for path in changing:
        _logger.warning(
            "find_spheres: %r is on a sphere by its gradient, but fn changes with its scale: there is a "
            "stop_gradient in a normalisation layer, as in batch renormalisation, and this is no "
            "invariance. Give it None; so.check_spheres shows the change",
            path,
        )


def warn_of_running_averages(params: Any) -> None:
    """Logs a warning if there is a BatchNorm of Equinox in a mode other than "batch".

    In its very first step it divides by the statistics of the batch, and is invariant; later it divides
    by running averages, and is not.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return

    def is_averaging(node: Any) -> bool:
        return isinstance(node, equinox.nn.BatchNorm) and getattr(node, "mode", "ema") != "batch"

    if any(map(is_averaging, jax.tree.leaves(params, is_leaf=is_averaging))):
        _logger.warning(
            "find_spheres: equinox.nn.BatchNorm divides by running averages from its second step on, "
            "and is invariant in the first alone. Take BatchNorm(..., mode='batch'), or measure with a "
            "state that has seen a step"
        )
