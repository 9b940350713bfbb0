"""Twenty steps of every optimizer with everything sharded, and the same without."""

import jax
import numpy as np
import optax

import spherical_optax as so

from ..optimizers import TABLE

P = jax.sharding.PartitionSpec
STEPS = 20
# Every step of two processes sends its sums through sockets; in four, `track` has measured.
STEPS_OF_TWO_PROCESSES = 4
TOLERANCE = {"muonh": 1e-5}  # its iteration multiplies rounding errors; 1e-6 for the others
# leaf -> shape, sphere, partition
LEAVES = {
    "reduced": ((3, 3, 16, 24), so.Sphere(), P(None, None, "x")),
    "indexed": ((32, 64), so.Sphere(), P(None, "x")),
    "layer": ((48, 40), so.Sphere(()), P("x")),
    "experts": ((4, 32, 24), so.Sphere((0,)), P(None, "x")),
    "heads": ((48, 4, 16), so.Sphere((1,)), P("x")),
    "blocks": ((64, 24), so.Sphere(blocks=4), P("x")),
    "kernel": ((40, 64), so.Sphere((), tie="norm"), P("x")),
    "bias": ((64,), so.Sphere((), tie="norm"), P()),
    "free": ((1024,), None, P("x")),
}
SPHERES = {name: sphere for name, (_, sphere, _) in LEAVES.items()}
# What there is most of in one array that has one number per group, and less than any shard.
GROUPS = 64

OPTIMIZERS = {
    name: lambda row=row: row(0.01, SPHERES, weight_decay=0.1) for name, row in TABLE.items()
}
OPTIMIZERS["track"] = lambda: so.track(optax.adamw(0.01), SPHERES)
OPTIMIZERS["track, ours"] = lambda: so.track(so.adamsrt(0.01, SPHERES), SPHERES, every=3)
# One for each kind of sum over groups or layers that they make.
IN_TWO_PROCESSES = ("adamg", "adamst", "adamsrt", "adamp_guess", "adamh", "muonh", "track, ours")


def values(seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, (shape, _, _) in LEAVES.items()
    }


def sharded(seed, mesh):
    """The same on every process, which makes its own part of each array."""
    return {
        name: jax.make_array_from_callback(
            array.shape, jax.NamedSharding(mesh, LEAVES[name][2]), lambda where, x=array: x[where]
        )
        for name, array in values(seed).items()
    }


def run(name, place, steps=STEPS):
    """The compiled step, and the parameters before each step and after the last."""
    tx = OPTIMIZERS[name]()
    params = place(0)
    sharding = {x.shape: x.sharding for x in params.values()}  # the shapes tell the arrays apart

    def shardings(tree):
        """What is shaped like a parameter is sharded like it."""
        return jax.tree.map(lambda x: sharding.get(x.shape, params["bias"].sharding), tree)

    def once(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # parts of Optax
        like = jax.eval_shape(tx.init, params)
        state = jax.jit(tx.init, out_shardings=shardings(like))(params)
        step = jax.jit(once, out_shardings=(shardings(params), shardings(like)))
        compiled = step.lower(params, state, params).compile()
    path = [params]
    for seed in range(1, steps + 1):
        params, state = compiled(params, state, place(seed))
        path.append(params)
    return compiled, path
