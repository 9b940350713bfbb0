"""The two settings of the calls: one for a GPU, and one for a rehearsal on a CPU."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.training import recipes

# Convolutions in CUDA graphs. On an H100 with JAX 0.11.2 no program with a convolution runs then: cuDNN
# reports 5003, or "No DNN support for stream". Put the flag into `flags` to try another version.
CONVOLUTIONS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"


class Setting(NamedTuple):
    """The measurements and runs of the two calls."""

    column: str = "cifar10/resnet20"
    epochs: int = 10
    dtype: str = "bfloat16"
    methods: Sequence[str] = recipes.PAPER_METHODS
    # 1 is there since the first grid on an H100: of 3, 10 and 30, 3 was best for six of seven methods.
    rates: Sequence[float] = (1.0, 3.0, 10.0, 30.0)
    decays: Sequence[float] = recipes.GRID_DECAYS
    seeds: int = 5
    more: Sequence[str] = ()  # options of benchmarks.table2
    models: Sequence[str] = ("gpt2", "resnet18", "small", "resnet50")
    contenders: Sequence[str] = (
        "optax.adamw",
        "so.adams",
        "so.adamst",
        "so.adamsrt",
        "so.adamg",
        "so.adamh",
        "so.stacked(so.adamsrt)",
        "so.track(optax.adam, every=10)",
    )
    rounds: int = 11
    flags: Sequence[str] = ("",)  # of XLA; the fastest is chosen
    other_dtypes: Sequence[str] = ("float32",)  # dtypes to time beside `dtype`
    patience: float = 1.0  # multiplies the limits of all stages
    platform: str = "gpu"


# The rehearsal on a CPU: the same stages and files, in minutes.
SMALL = Setting(
    column="cifar10-16/resnet8",
    epochs=1,
    dtype="float32",
    methods=("adam", "adamsrt"),
    rates=(3.0, 10.0),
    decays=(5e-4,),
    seeds=2,
    more=("--images", "128", "--batch-size", "64"),
    models=("small",),
    contenders=("so.adamsrt", "so.stacked(so.adamsrt)"),
    rounds=1,
    flags=("", "--xla_cpu_enable_fast_min_max=false"),
    other_dtypes=(),
    patience=6.0,
    platform="cpu",
)
