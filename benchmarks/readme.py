"""Writes the numbers of README.md and benchmarks/README.md, and the figures, from benchmarks/results.

    python -m benchmarks.readme

What stands between the markers of a section is replaced; the rest is left as it is.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from benchmarks import kernels, precision, speed, table2, throughput
from benchmarks.gpu import predictions
from benchmarks.reporting import claims, figures, report
from benchmarks.reporting.published import TABLE2
from benchmarks.reporting.significance import write_verdict
from benchmarks.runs.store import Job, Store
from benchmarks.training import recipes
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.trainer import Run

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OWN = "cifar10-16/resnet8"
SPEED = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "small": "300 small arrays"}


class Study:
    """All runs of one column in one setting."""

    def __init__(self, store: Store, jobs: Sequence[Job]):
        any_job = jobs[0]
        self.column, self.store = any_job.column, store
        args = SimpleNamespace(
            methods=[name for name in OPTIMIZERS if any(job.method == name for job in jobs)],
            seeds=1 + max((job.seed for job in jobs if job.seed != recipes.GRID_SEED), default=-1),
            **{
                name: getattr(any_job, name) for name in ("epochs", "batch_size", "images", "dtype")
            },
            grid=any(job.seed == recipes.GRID_SEED for job in jobs),
            rates=recipes.GRID_RATES,
            decays=recipes.GRID_DECAYS,
            stop_after=math.inf,
        )
        if args.grid:  # of what the grid has
            args.methods = [name for name in args.methods if is_in_grid(name, jobs)]
        sweep = table2.Sweep(args, store, Console())
        self.grid = [job for job in sweep.list_grid_jobs(self.column) if store.holds(job)]
        self.jobs = [job for job in sweep.list_jobs(self.column) if store.holds(job)]
        self.results = table2.collect_results(store, self.jobs)
        self.title = (
            f"{self.column}: "
            + ("all" if any_job.images is None else f"{any_job.images:,}")
            + f" training images, {any_job.epochs} epochs, batches of {any_job.batch_size}, "
            f"{any_job.dtype}"
        )
        self.figure = table2.locate_figure(store.folder, any_job)
        methods = [job.method for job in [*self.grid, *self.jobs]]
        methods = [] if set(methods) <= set(recipes.PAPER_METHODS) else list(dict.fromkeys(methods))
        seeds = f" --seeds {args.seeds}" if args.seeds else ""
        self.command = (
            f"python -m benchmarks.table2 --columns {self.column}"
            + (f" --methods {' '.join(methods)}" if methods else "")
            + f"{seeds} --epochs {args.epochs}"
            + ("" if args.images is None else f" --images {args.images}")
            + f" --batch-size {args.batch_size} --dtype {args.dtype}"
            + (" --grid" + self.describe_grid_options() if self.grid else "")
            + " --data-dir DIR --out OUT"
        )

    def describe_grid_options(self) -> str:
        """Of a grid that is only a part of the whole one."""
        cells = {(job.method, job.learning_rate, job.weight_decay) for job in self.grid}

        def tried(**axis: Sequence[float]) -> bool:
            return any(
                (method, cell.learning_rate, cell.weight_decay) in cells
                for method in {job.method for job in self.grid}
                for cell in recipes.list_grid(method, 0.99, **axis)
            )

        rates = [f"{rate:g}" for rate in recipes.GRID_RATES if tried(rates=[rate])]
        decays = [f"{decay:g}" for decay in recipes.GRID_DECAYS if tried(decays=[decay])]
        some = f" --rates {' '.join(rates)}" if len(rates) < len(recipes.GRID_RATES) else ""
        return some + (
            f" --decays {' '.join(decays)}" if len(decays) < len(recipes.GRID_DECAYS) else ""
        )

    def list_rows(self) -> list[tuple[report.Result, Job]]:
        """With a job each, for the values that all seeds share."""
        first = {job.method: job for job in reversed(self.jobs)}
        return [(result, first[result.name]) for result in self.results]

    def read_results(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        return [found for job in jobs if (found := self.store.read_result(job))]


def list_studies(folder: Path) -> list[Study]:
    store = Store(folder, print)
    settings: dict[tuple, list[Job]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text("utf-8"))
            job = Job(**content["recipe"])
            platform = report.read_platform(content["environment"])
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"error: {path}: no result of a run ({error})") from error
        key = (platform, job.column, job.epochs, job.batch_size, str(job.images), job.dtype)
        settings.setdefault(key, []).append(job)
    return [Study(store, jobs) for _, jobs in sorted(settings.items())]


def is_in_grid(method: str, jobs: Sequence[Job]) -> bool:
    return any(job.method == method and job.seed == recipes.GRID_SEED for job in jobs)


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_accuracy_table(study: Study, *more: tuple[report.Result, Job]) -> str:
    published = any(column == study.column for column, _ in TABLE2)
    rows = []
    for result, job in (*more, *study.list_rows()):
        rows.append(
            [
                result.label,
                f"{job.learning_rate:g}",
                f"{job.weight_decay:g}",
                table2.format_cell(result),
                *([table2.format_published(study.column, result.name)] if published else []),
                report.format_mean_std(result.train_losses, 4),
            ]
        )
    header = ["method", "rate", "decay", "test accuracy, % (seeds)"]
    header += ["paper"] if published else []
    return to_markdown([*header, "last training loss"], rows)


def make_claims_table(study: Study) -> str:
    runs: dict[str, dict[int, Run]] = {}
    for result in study.results:
        runs[result.name] = {run.seed: run for run in result.runs}
    rows = [
        [
            *(found.claim.words, found.claim.quantity, found.name_methods(), found.describe()),
            *(str(found.seeds), found.verdict),
        ]
        for found in claims.judge_claims(runs)
    ]
    return to_markdown(("the paper", "of", "what", "here (95 %)", "seeds", ""), rows)


def make_grid_table(study: Study) -> str:
    """The best validation accuracy of every cell; the chosen one in bold."""
    merits = {job: found for job in study.grid if (found := study.store.read_result(job))}
    rows = []
    for name in dict.fromkeys(job.method for job in merits):
        cells = {job: Run(**found["run"]) for job, found in merits.items() if job.method == name}
        best = max(cells, key=lambda job: table2.rank(merits[job]))
        texts = {}
        for job, run in cells.items():
            epoch = run.best_epoch
            text = "diverged" if epoch is None else f"{run.validation_accuracy[epoch]:.2f}"
            bold = f"**{text}**" if job == best else text
            texts[job.learning_rate, job.weight_decay] = bold
        row = [texts.get((rate, decay), "") for rate, _, decay in recipes.list_grid(name)]
        if len(row) == len(recipes.GRID_RATES):  # without decay
            row = [text for cell in row for text in (cell, "")]
        rows.append([OPTIMIZERS[name].label, f"{recipes.LEARNING_RATES[name]:g} x", *row])
    rates = [f"{rate:g}" for rate in recipes.GRID_RATES]
    cells = [f"{rate}, {decay:g}" for rate in rates for decay in recipes.GRID_DECAYS]
    return to_markdown(("method", "rate", *cells), rows)


def describe_cost(study: Study) -> str:
    found = study.read_results([*study.grid, *study.jobs])
    hours = sum(content["wall_seconds"] for content in found) / 3600
    devices = sorted({str(content["environment"]["device"]) for content in found})
    speed = statistics.median(
        content["recipe"]["batch_size"] / statistics.median(content["run"]["step_time"])
        for content in found
    )
    return (
        f"{len(found)} runs, {hours:.1f} hours of them added up, {speed:,.0f} images per second in "
        f"the median run; device: {', '.join(devices)}. Commits: "
        f"{', '.join(sorted({str(content['commit'])[:7] for content in found}))}."
    )


def write_heading(study: Study) -> Iterator[str]:
    yield f"### {study.title}"
    yield f"```\n{study.command}\n```"
    yield describe_cost(study)


def embed_figure(study: Study) -> str:
    return f"![Training loss of the methods]({study.figure.relative_to(HERE).as_posix()})"


def write_table2(folder: Path = RESULTS / "table2") -> Iterator[str]:
    for study in list_studies(folder):
        yield from write_heading(study)
        if study.results:
            yield make_accuracy_table(study)
            yield (
                "± is the standard deviation over the seeds (n - 1). "
                + write_verdict(study.results).replace("\n", " ")
            )
            yield embed_figure(study)
            yield (
                "What the paper says (Section 4.2), and the same differences here, seed by seed, with "
                "95 % intervals over the seeds (not corrected for their number). A claim about "
                "several methods is shown for the one that supports it least. Of the training loss: "
                "the ratio of the geometric means, over the epochs before the rate drops for the "
                "first time, which is how fast the methods are, and over all, where the levels after "
                "the drops weigh in."
            )
            yield make_claims_table(study)
        if study.grid:
            yield (
                "The grid: best validation accuracy in per cent, one seed; columns are multiples of "
                "the rate and L2 coefficients (of AdamW's decoupled decay: 20 times as much)."
            )
            yield make_grid_table(study)


def write_throughput(folder: Path = RESULTS) -> Iterator[str]:
    for path in sorted(folder.glob("throughput_*.json")):
        content = json.loads(path.read_text("utf-8"))
        recipe, ways = content["recipe"], content["ways"]
        options = [
            f"--{name.replace('_', '-')} {' '.join(map(str, value))}"
            if isinstance(value, list)
            else f"--{name.replace('_', '-')} {value}"
            for name, value in recipe.items()
        ]
        yield (
            f"{recipe['model']}, images of {recipe['dataset']}'s shape, batches of "
            f"{recipe['batch_size']} (`python -m benchmarks.throughput {' '.join(options)}`; device: "
            f"{ways[0]['device']}):"
        )
        yield to_markdown(throughput.HEADER, throughput.format_rows(ways))


def write_since_the_paper(
    folder: Path = RESULTS / "later", beside: Path = RESULTS / "table2"
) -> Iterator[str]:
    for study in list_studies(folder):
        yield from write_heading(study)
        if study.results:
            known = [
                row
                for other in list_studies(beside)
                if other.title == study.title
                for row in other.list_rows()
            ]
            rows = [row for row in known if row[0].name in ("adam", "adamsrt", "sgd")]
            yield make_accuracy_table(study, *rows)
            yield write_verdict([*(result for result, _ in rows), *study.results]).replace(
                "\n", " "
            )
            yield embed_figure(study)
        if study.grid:
            yield make_grid_table(study)


def read_speeds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"speed_{model}.json").read_text("utf-8")) for model in SPEED]


def write_speed(folder: Path = RESULTS) -> Iterator[str]:
    for content in read_speeds(folder):
        device = content["environment"]["device"]
        yield f"{content['title']} (`{content['command']}`; device: {device}):"
        yield to_markdown(speed.HEADER, speed.format_rows(content["optimizers"]))


def write_cost(folder: Path = RESULTS) -> Iterator[str]:
    """The networks side by side, as ratios to the time of optax.adam."""
    found = [content["optimizers"] for content in read_speeds(folder)]
    rows = []
    for name, row in found[0].items():
        if name != speed.FLOOR:
            state = f"{row['state_ratio']:.3f}"
            memory = row["temporary_bytes"]
            memory = "-" if memory is None else f"{memory / 2**20:.1f} MiB"
            times = [f"{optimizers[name]['time_ratio']:.2f}" for optimizers in found]
            rows.append([f"`{name}`" if "." in name.split()[0] else name, *times, state, memory])
    yield to_markdown(("", *SPEED.values(), "state", "temporary memory"), rows)


def write_kernels(folder: Path = RESULTS) -> Iterator[str]:
    """A row for every optimizer, a column for every network."""
    content = json.loads((folder / "kernels.json").read_text("utf-8"))
    models = {name: model["optimizers"] for name, model in content["models"].items()}
    places = {name: kernels.HEADER.index(name) for name in ("kernels", "temp. MiB")}
    found = {
        name: {row[0]: row for row in kernels.format_rows(rows)} for name, rows in models.items()
    }
    names = list(next(iter(models.values())))
    environment = content["environment"]
    yield (
        f"`{content['command']}`; device: {environment['device']}, JAX {environment['jax']}. Kernels "
        "of one step, and in brackets the bytes that they read and write, as a ratio to those of "
        "`optax.adam`:"
    )

    def cell(model: str, name: str) -> str:
        moved = {of: kernels.count_bytes_moved(models[model][of]) for of in (name, speed.REFERENCE)}
        ratio = moved[name] / moved[speed.REFERENCE]
        return f"{found[model][name][places['kernels']]} ({ratio:.2f})"

    header = ("optimizer", *models)
    yield to_markdown(header, [[name, *(cell(m, name) for m in models)] for name in names])
    yield "Temporary memory in the same programs, MiB:"
    memory = places["temp. MiB"]
    yield to_markdown(
        header,
        [[name, *(found[m][name][memory] for m in models)] for name in names],
    )


def write_kernels_of_training(folder: Path = RESULTS) -> Iterator[str]:
    content = json.loads((folder / "kernels_training.json").read_text("utf-8"))
    yield f"{content['title']} (`{content['command']}`; device: {content['environment']['device']}):"
    reference = OPTIMIZERS["adam"].label
    yield to_markdown(kernels.HEADER, kernels.format_rows(content["optimizers"], reference))


def write_precision(folder: Path = RESULTS) -> Iterator[str]:
    cpu = json.loads(precision.CPU.read_text("utf-8"))
    measured = [
        json.loads(path.read_text("utf-8")) for path in list_gpu_results("precision", folder)
    ]
    recorded = f"recorded on a CPU with JAX {cpu['environment']['jax']}"
    if not measured:
        yield f"`{precision.COMMAND}`, {recorded}; no other device has been measured yet:"
        rows = precision.format_rows(cpu, cpu)
        yield to_markdown(
            ("what", "float32", "bfloat16"), [(row[0], row[1], row[3]) for row in rows]
        )
    for content in measured:
        environment = content["environment"]
        yield (
            f"`{precision.COMMAND}`; device: {environment['device']}, float32 products in "
            f"{environment['float32_products']}, JAX {environment['jax']}; the CPU's: {recorded}:"
        )
        yield to_markdown(precision.HEADER, precision.format_rows(content, cpu))


def write_gpu(folder: Path = RESULTS) -> Iterator[str]:
    """What was expected, beside what was measured; then everything that was."""
    yield to_markdown(predictions.HEADER, predictions.list_rows(folder / "gpu"))
    for path in list_gpu_results("speed_*", folder):
        content = json.loads(path.read_text("utf-8"))
        device = content["environment"]["device"]
        yield f"{content['title']} (`{content['command']}`; device: {device}):"
        yield to_markdown(speed.HEADER, speed.format_rows(content["optimizers"]))
    for runs in sorted((folder / "gpu").glob("*/table2")):
        yield from write_table2(runs)


def list_gpu_results(pattern: str, folder: Path = RESULTS) -> list[Path]:
    """Of all kinds of devices, each of which has a folder."""
    return sorted((folder / "gpu").glob(f"*/{pattern}.json"))


def write_own_column() -> Iterator[str]:
    for study in list_studies(RESULTS / "table2"):
        if study.column == OWN:
            yield make_accuracy_table(study)


PAGES: dict[Path, dict[str, Callable[[], Iterator[str]]]] = {
    HERE / "README.md": {
        "table2": write_table2,
        "later": write_since_the_paper,
        "throughput": write_throughput,
        "speed": write_speed,
        "kernels": write_kernels,
        "kernels of training": write_kernels_of_training,
        "precision": write_precision,
        "gpu": write_gpu,
    },
    HERE.parent / "README.md": {"column": write_own_column, "cost": write_cost},
}


def render(page: Path, text: str) -> str:
    """`text` with the sections of `page` as the results have them now."""
    for name, section in PAGES[page].items():
        begin, end = f"<!-- {name}: written by benchmarks.readme -->", f"<!-- end of {name} -->"
        body = "\n\n".join((begin, *section(), end))
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        text, count = re.subn(pattern, lambda _, body=body: body, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"error: {page}: {count} places for the section {name}, not one")
    return text


def main() -> int:
    folders = [RESULTS / "table2", RESULTS / "later", *(RESULTS / "gpu").glob("*/table2")]
    for study in (study for folder in folders for study in list_studies(folder)):
        if study.results:
            figures.draw_training_loss_twice(study.results, study.column, study.figure)
    for page in PAGES:
        page.write_text(render(page, page.read_text("utf-8")), encoding="utf-8")
        print(f"written: {page.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
