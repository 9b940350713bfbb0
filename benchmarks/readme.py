"""Writes the numbers of README.md and benchmarks/README.md, and the figures, from benchmarks/results.

    python -m benchmarks.readme

Replaces the text between the two markers of every section and leaves all other text as it is.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import kernels, precision, speed, throughput
from benchmarks.gpu import predictions
from benchmarks.language import table as language
from benchmarks.plasticity import table as plasticity
from benchmarks.reporting import figures
from benchmarks.reporting.significance import write_verdict
from benchmarks.reporting.studies import (
    Study,
    list_studies,
    make_accuracy_table,
    make_claims_table,
    make_grid_table,
    write_heading,
)
from benchmarks.reporting.tables import to_markdown
from benchmarks.scale import table as scale
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.transfer import table as transfer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SINCE_THE_PAPER = RESULTS / "later"
OWN_COLUMN = "cifar10-16/resnet8"
SPEED = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "small": "300 small arrays"}


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


def write_since_the_paper(
    folder: Path = SINCE_THE_PAPER, beside: Path = RESULTS / "table2"
) -> Iterator[str]:
    """The methods published since the paper, and three of the paper's in the same setting."""
    for study in list_studies(folder):
        yield from write_heading(study)
        if study.results:
            rows = [
                (result, job)
                for other in list_studies(beside)
                if other.title == study.title
                for result, job in other.list_rows()
                if result.name in ("adam", "adamsrt", "sgd")
            ]
            yield make_accuracy_table(study, *rows)
            results = [*(result for result, _ in rows), *study.results]
            yield write_verdict(results).replace("\n", " ")
            yield embed_figure(study)
        if study.grid:
            yield make_grid_table(study)


def write_own_column() -> Iterator[str]:
    for study in list_studies(RESULTS / "table2"):
        if study.column == OWN_COLUMN:
            yield make_accuracy_table(study)


def embed_figure(study: Study) -> str:
    return f"![Training loss of the methods]({study.figure.relative_to(HERE).as_posix()})"


def write_plasticity(folder: Path = RESULTS) -> Iterator[str]:
    content = read_json(folder / "plasticity.json")
    methods = content["methods"]
    yield (
        f"`{content['command']}`; device: {content['environment']['device']}. "
        f"{content['tasks']} tasks of {content['steps_per_task']} steps, seeds: "
        f"{len(content['seeds'])}. Accuracy in per cent with 95 % intervals over the seeds; last tasks: "
        f"the mean of the last {content['last_tasks']}; minus Adam: of these, seed by seed, in points."
    )
    yield to_markdown(plasticity.ACCURACY_HEADER, plasticity.format_accuracies(methods))
    yield " ".join(content["verdict"])
    yield (
        "The second hidden layer: radius, angle per step and effective rate, means over the steps of "
        "the first task and of the last one; and the radius of the head after these tasks:"
    )
    yield to_markdown(plasticity.TURNS_HEADER, plasticity.format_turns(methods))
    yield "![Accuracy, radius and angle per step over the tasks](results/plasticity.png)"
    yield (
        f"The grid: every rate with the accuracy of the last tasks in per cent, seeds "
        f"{', '.join(map(str, content['grid_seeds']))}."
    )
    rows = plasticity.format_grid(methods)
    yield to_markdown(("method", "decay", *(" " for _ in rows[0][2:])), rows)


def write_transfer(folder: Path = RESULTS) -> Iterator[str]:
    content = read_json(folder / "transfer.json")
    methods = content["methods"]
    yield (
        f"`{content['command']}`; device: {content['environment']['device']}. {content['steps']} steps "
        f"of {content['batch_size']} images, seeds: {len(content['seeds'])}. log2 of the best rate at "
        "every width and its change per doubling of the width, with 95 % intervals over the seeds:"
    )
    yield to_markdown(transfer.make_rates_header(methods), transfer.format_rates(methods))
    yield " ".join(content["verdict"])
    yield "The training loss of the widest network at the narrow one's best rate, to that at its own:"
    yield to_markdown(transfer.PENALTY_HEADER, transfer.format_penalties(methods))
    yield "Training loss and, in brackets, validation accuracy in per cent at the best rate of the grid:"
    yield to_markdown(transfer.make_losses_header(methods), transfer.format_losses(methods))
    yield "![Training loss over the learning rate at every width](results/transfer.png)"


def write_language(folder: Path = RESULTS) -> Iterator[str]:
    content = read_json(folder / "language.json")
    methods, text, environment = content["methods"], content["text"], content["environment"]
    yield (
        f"`{content['command']}`; device: {environment['device']}, Python {environment['python']}. "
        f"{text['training_characters']:,} characters to train on, "
        f"{text['validation_characters']:,} held out, {text['different_characters']} different ones; "
        f"SHA-256 `{text['sha256'][:16]}…`. {content['parameters']:,} parameters, "
        f"{content['steps']} steps of {content['batch']} windows of {content['context']} characters, "
        f"seeds: {len(content['seeds'])}; {content['seconds_of_all_runs'] / 60:.0f} minutes of runs "
        "added up. Validation loss behind the last step in nats per character with 95 % intervals "
        "over the seeds, and of the differences from AdamW, seed by seed:"
    )
    yield to_markdown(language.LOSS_HEADER, language.format_losses(methods))
    yield " ".join(content["verdict"])
    yield (
        "Medians over the groups, means over the seeds and over the steps of a part of the run, from "
        "the part in which the warm-up ends to the last one:"
    )
    yield to_markdown(language.TURNS_HEADER, language.format_turns(methods))
    yield "![Validation loss, effective rate and angle per step](results/language.png)"
    seeds = ", ".join(map(str, content["grid_seeds"]))
    yield f"What was tried, with the validation loss behind the last step, seed {seeds}:"
    yield to_markdown(language.make_grid_header(methods), language.format_grid(methods))


def write_throughput(folder: Path = RESULTS) -> Iterator[str]:
    for path in sorted(folder.glob("throughput_*.json")):
        content = read_json(path)
        recipe, ways = content["recipe"], content["ways"]
        options = []
        for name, value in recipe.items():
            words = value if isinstance(value, list) else [value]
            options.append(f"--{name.replace('_', '-')} {' '.join(map(str, words))}")
        yield (
            f"{recipe['model']}, images of {recipe['dataset']}'s shape, batches of "
            f"{recipe['batch_size']} (`python -m benchmarks.throughput {' '.join(options)}`; device: "
            f"{ways[0]['device']}):"
        )
        yield to_markdown(throughput.HEADER, throughput.format_rows(ways))


def write_speed(folder: Path = RESULTS) -> Iterator[str]:
    for content in read_speeds(folder):
        yield from write_speed_of_one(content)


def write_speed_of_one(content: dict[str, Any]) -> Iterator[str]:
    yield describe_source(content)
    yield to_markdown(speed.HEADER, speed.format_rows(content["optimizers"]))
    if traces := content.get("traces"):
        yield "The kernels of these steps, by kind: how many, their microseconds, and TB/s."
        yield to_markdown(speed.TRACE_HEADER, speed.format_traces(traces))


def describe_source(content: dict[str, Any]) -> str:
    environment, command = content["environment"], content["command"]
    if flags := environment.get("xla_flags"):  # older results do not name them
        command = f"XLA_FLAGS={flags} {command}"
    return f"{content['title']} (`{command}`; device: {environment['device']}):"


def write_cost(folder: Path = RESULTS) -> Iterator[str]:
    """The networks side by side: times as ratios to that of optax.adam."""
    networks = [content["optimizers"] for content in read_speeds(folder)]
    rows = []
    for name, row in networks[0].items():
        if name != speed.FLOOR:
            memory = row["temporary_bytes"]
            rows.append(
                [
                    f"`{name}`" if "." in name.split()[0] else name,
                    *(f"{optimizers[name]['time_ratio']:.2f}" for optimizers in networks),
                    f"{row['state_ratio']:.3f}",
                    "-" if memory is None else f"{memory / 2**20:.1f} MiB",
                ]
            )
    yield to_markdown(("", *SPEED.values(), "state", "temporary memory"), rows)


def read_speeds(folder: Path) -> list[dict[str, Any]]:
    return [read_json(folder / f"speed_{model}.json") for model in SPEED]


def write_kernels(folder: Path = RESULTS) -> Iterator[str]:
    """Two tables with a row for every optimizer and a column for every network."""
    content = read_json(folder / "kernels.json")
    models = {name: model["optimizers"] for name, model in content["models"].items()}
    environment = content["environment"]
    yield (
        f"`{content['command']}`; device: {environment['device']}, JAX {environment['jax']}. Kernels "
        "of one step, and in brackets the bytes that they read and write, as a ratio to those of "
        "`optax.adam`:"
    )
    texts = {
        (model, row[0]): dict(zip(kernels.HEADER, row, strict=True))
        for model, optimizers in models.items()
        for row in kernels.format_rows(optimizers)
    }

    def format_kernels(model: str, name: str) -> str:
        moved = kernels.count_bytes_moved(models[model][name])
        reference = kernels.count_bytes_moved(models[model][speed.REFERENCE])
        return f"{texts[model, name]['kernels']} ({moved / reference:.2f})"

    header, names = ("optimizer", *models), list(next(iter(models.values())))
    yield to_markdown(header, [[n, *(format_kernels(model, n) for model in models)] for n in names])
    yield "Temporary memory in the same programs, MiB:"
    yield to_markdown(
        header, [[n, *(texts[model, n]["temp. MiB"] for model in models)] for n in names]
    )


def write_kernels_of_training(folder: Path = RESULTS) -> Iterator[str]:
    content = read_json(folder / "kernels_training.json")
    yield describe_source(content)
    reference = OPTIMIZERS["adam"].label
    yield to_markdown(kernels.HEADER, kernels.format_rows(content["optimizers"], reference))


def write_scale(folder: Path = RESULTS) -> Iterator[str]:
    content = read_json(folder / "scale.json")
    environment = content["environment"]
    parts = {name: part["cases"] for name, part in content["parts"].items()}
    yield (
        f"`{content['command']}`; device: {environment['device']}, JAX {environment['jax']}. Memory of "
        "one device in MiB. Collectives: the arrays that one device gets and their bytes; of the "
        "largest array KiB, and its ratio to the smallest shard of a matrix or of a stack:"
    )
    yield to_markdown(scale.SHARDED.header, scale.format_sharded(parts["sharded"]))
    yield (
        "Tracing and compiling a step on one device, in processor seconds, where every array is a "
        f"matrix on spheres. Per array: the ratio to {scale.BASE} arrays. x: the ratio to "
        f"`{scale.REFERENCE}`:"
    )
    yield to_markdown(scale.ARRAYS.header, scale.format_arrays(parts["arrays"]))
    yield (
        "`so.find_spheres` on transformers whose queries and keys are normalised per head, in processor "
        "seconds. The peak is what the process holds beyond its memory before the parameters, and in "
        "copies of the parameters:"
    )
    yield to_markdown(scale.DISCOVERY.header, scale.format_discovery(parts["discovery"]))
    yield scale.write_marginal_copies(parts["discovery"])


def write_precision(folder: Path = RESULTS) -> Iterator[str]:
    cpu = read_json(precision.CPU)
    measured = [read_json(path) for path in list_gpu_results("precision", folder)]
    recorded = f"recorded on a CPU with JAX {cpu['environment']['jax']}"
    if not measured:
        yield f"`{precision.COMMAND}`, {recorded}; no other device has been measured yet:"
        rows = [(row[0], row[1], row[3]) for row in precision.format_rows(cpu, cpu)]
        yield to_markdown(("what", "float32", "bfloat16"), rows)
    for content in measured:
        environment = content["environment"]
        yield (
            f"`{precision.COMMAND}`; device: {environment['device']}, float32 products in "
            f"{environment['float32_products']}, JAX {environment['jax']}; the CPU's: {recorded}:"
        )
        yield to_markdown(precision.HEADER, precision.format_rows(content, cpu))


def write_gpu(folder: Path = RESULTS) -> Iterator[str]:
    """The predictions beside the measurements that decide them; then every measurement."""
    yield to_markdown(predictions.HEADER, predictions.list_rows(folder / "gpu"))
    for path in list_gpu_results("speed_*", folder):
        yield from write_speed_of_one(read_json(path))
    for path in list_gpu_results("flags/speed_*", folder):
        yield from write_speed_of_one(read_json(path))
    for runs in sorted((folder / "gpu").glob("*/table2")):
        yield from write_table2(runs)


def list_gpu_results(pattern: str, folder: Path = RESULTS) -> list[Path]:
    """The files of all kinds of devices, each of which has a folder."""
    return sorted((folder / "gpu").glob(f"*/{pattern}.json"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


PAGES: dict[Path, dict[str, Callable[[], Iterator[str]]]] = {
    HERE / "README.md": {
        "table2": write_table2,
        "later": write_since_the_paper,
        "plasticity": write_plasticity,
        "transfer": write_transfer,
        "language": write_language,
        "throughput": write_throughput,
        "speed": write_speed,
        "kernels": write_kernels,
        "kernels of training": write_kernels_of_training,
        "scale": write_scale,
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
    folders = [RESULTS / "table2", SINCE_THE_PAPER, *(RESULTS / "gpu").glob("*/table2")]
    for study in (study for folder in folders for study in list_studies(folder)):
        if study.results:
            figures.draw_training_loss_twice(study.results, study.column, study.figure)
    for page in PAGES:
        page.write_text(render(page, page.read_text("utf-8")), encoding="utf-8")
        print(f"written: {page.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
