"""Strict JAX for every test: no silent promotion, eight fake devices, reproducible examples."""

import gc
import os

# Read when the backend starts, so they have to stand before anything touches a device. By default XLA
# has a thread per device, or core: a second program with collectives can take the thread that the first
# still needs, and both wait for ever. These are enough for all that may be under way.
os.environ.setdefault("PJRT_NPROC", "256")
# And XLA ends the process if one of the eight lets the others wait for 40 seconds, as when it is busy.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from .compiling import compile_quickly  # noqa: E402

compile_quickly()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For tests that run parts of Optax, or of Flax, which mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_collection_finish():
    """Collects garbage less often, which saves a tenth of the time: imported modules stay anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


# Linux ends a process that holds 65,530 memory mappings, and every compiled function holds some.
MANY_MAPPINGS = 5_000


def _count_mappings() -> int:
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:  # not on Linux
        return MANY_MAPPINGS


@pytest.fixture(autouse=True, scope="module")
def few_memory_mappings():
    """Forgets compiled functions after a module, where they hold many memory mappings."""
    yield
    if _count_mappings() >= MANY_MAPPINGS:
        jax.clear_caches()
