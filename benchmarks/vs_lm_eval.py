"""prefold against lm-evaluation-harness's own model for transformers: the same questions, model and dtype.

    python -m benchmarks.vs_lm_eval
    python -m benchmarks.vs_lm_eval --questions 16 --batch-sizes 1 4 16

ARC-Challenge with 25 examples before each question, by the harness's definition of the task. Its data are the files
`arc_challenge_dev.jsonl` and `arc_challenge_test.jsonl` of `--data` where they are at hand, else the Hub's. The
requests are built once; each side answers them in a process of its own, one repeat after the other in turn, tokenizing
included. The other side runs with the best of the batch sizes, as measured on two questions. Prints a table and, as its
last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import yaml
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

from benchmarks.limits import Shape, matrix_product_rate
from benchmarks.lm_eval_sides import Answered, Request, Task
from benchmarks.results import Ratio, parser_for, save
from benchmarks.sides import Side, running
from prefold.models.fetch import fetch
from prefold.models.tokenizer import load_tokenizer
from prefold.trees.forest import Text, pack_forest
from prefold.trees.packing import Node

DATA = Path(os.environ.get("PREFOLD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "choices"


class Sides(NamedTuple):
    """The repeats of each side, the batch size that the other side took, and the matrix-product rate in FLOP/s."""

    theirs: list[Answered]
    ours: list[Answered]
    batch_size: int
    rate: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    folder = fetch(options.model)
    questions = requests_of(options.questions, options.shots, options.data)
    measured = alternate(options, folder, questions)
    summary = summarise(folder, [pair for question in questions for pair in question], measured)
    say(options, measured, summary)
    sides = {
        "lm_eval": {**shown(measured.theirs), "batch_size": measured.batch_size},
        "prefold": shown(measured.ours),
    }
    save(f"arc-{options.shots}-{options.dtype}", options, {**summary, **sides}, peer="lm_eval")
    print(json.dumps(summary))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("vs_lm_eval", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two files; without them, the Hub's data")
    parser.add_argument("--questions", type=int, default=8, help="the first ones (default 8)")
    parser.add_argument("--shots", type=int, default=25, help="examples before each question (default 25)")
    parser.add_argument("--repeats", type=int, default=3, help="of all questions, on each side (default 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8], help="that the other side tries")
    return parser.parse_args(arguments)


def requests_of(questions: int, shots: int, data: Path) -> list[list[Request]]:
    """What the harness asks of a model, question by question."""
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), shots, data)
        manager = TaskManager(include_path=folder, include_defaults=False)
        task: Any = manager.load(["arc"])["tasks"]["arc"]
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=questions)
    requests: dict[int, list[Request]] = {}
    for instance in task.instances:
        requests.setdefault(instance.doc_id, []).append(instance.args)
    return list(requests.values())


def write_task(folder: Path, shots: int, data: Path) -> None:
    task: dict[str, Any] = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_challenge.yaml"),
        "task": "arc",
        "num_fewshot": shots,
    }
    files = {"train": data / "arc_challenge_dev.jsonl", "test": data / "arc_challenge_test.jsonl"}
    if all(file.is_file() for file in files.values()):
        task["dataset_path"], task["dataset_name"] = "json", None
        task["dataset_kwargs"] = {"data_files": {split: str(file.resolve()) for split, file in files.items()}}
        task["validation_split"] = None
    (folder / "arc.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


# ---- the two sides ----------------------------------------------------------------------------------------------


def alternate(options: argparse.Namespace, folder: Path, questions: Sequence[Sequence[Request]]) -> Sides:
    """Both sides' repeats in turn, with the matrix-product rate measured in between."""
    requests = [pair for question in questions for pair in question]
    work, rates = Task(folder, options.dtype), []
    theirs = Side("lm_eval", "benchmarks.lm_eval_sides:harness", work, plain=True)
    ours = Side("prefold", "benchmarks.lm_eval_sides:prefold", work)
    answered: dict[str, list[Answered]] = {theirs.name: [], ours.name: []}
    with running(theirs, ours), Console(stderr=True).status("loading the model on both sides") as status:
        for side in (ours, theirs):
            side.receive()
            side.ask((questions[0], 1))
        few = [pair for question in questions[:2] for pair in question]
        tried = {size: theirs.ask((few, size)).seconds for size in options.batch_sizes}
        batch_size = min(tried, key=lambda size: tried[size])
        for repeat in range(options.repeats):
            for side in (theirs, ours):
                status.update(f"repeat {repeat + 1} of {options.repeats}, {side.name}")
                answered[side.name].append(side.ask((requests, batch_size)))
            rates.append(matrix_product_rate(options.dtype))
    return Sides(answered[theirs.name], answered[ours.name], batch_size, statistics.median(rates))


# ---- what came of it --------------------------------------------------------------------------------------------


def summarise(folder: Path, requests: Sequence[Request], measured: Sides) -> dict[str, Any]:
    texts = texts_of(folder, requests)
    row = pack_forest(texts)
    ratio = Ratio.of(*(seconds_of(side) for side in measured[:2]))
    theirs, ours = measured.theirs[-1], measured.ours[-1]
    needed = flops(folder, row.nodes, len(row.targets))
    return {
        "ratio": ratio.median,
        "limit_share": round(needed / measured.rate / statistics.median(seconds_of(measured.ours)), 3),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "token_ceiling": round(sum(len(text.read) for text in texts) / row.tokens, 3),
        "spread": ratio.spread,
        "loss_difference": max(abs(t - o) for t, o in zip(theirs.logprobs, ours.logprobs, strict=True)),
        "matrix_product_gflops": round(measured.rate / 1e9),
    }


def seconds_of(side: Sequence[Answered]) -> list[float]:
    return [answered.seconds for answered in side]


def shown(side: Sequence[Answered]) -> dict[str, Any]:
    return {"seconds": [round(seconds, 3) for seconds in seconds_of(side)], "peak_bytes": side[-1].peak_bytes}


def texts_of(folder: Path, requests: Sequence[Request]) -> list[Text]:
    tokenizer = load_tokenizer(folder)
    whole = [tuple(tokenizer.encode(context + answer)) for context, answer in requests]
    contexts = [tokenizer.encode(context) for context, _ in requests]
    return [Text(ids, len(ids) - len(context)) for ids, context in zip(whole, contexts, strict=True)]


def flops(folder: Path, nodes: Sequence[Node], scored: int) -> float:
    """Of the matrix products of a forward pass in which every token is computed once, and only scored ones meet the
    vocabulary."""
    shape = Shape.of(folder)
    lengths = [(own[1] - own[0], sum(stop - start for start, stop in above)) for own, above, _ in nodes]
    attended = sum(own * above + own * (own + 1) // 2 for own, above in lengths) * shape.queries * shape.layers
    tokens = sum(own for own, _ in lengths)
    return 2.0 * tokens * shape.weights + 2.0 * scored * shape.width * shape.vocabulary + 4.0 * attended


def say(options: argparse.Namespace, measured: Sides, summary: dict[str, Any]) -> None:
    table = Table("repeat", "lm_eval s", "prefold s", "ratio")
    theirs, ours = seconds_of(measured.theirs), seconds_of(measured.ours)
    for repeat, (t, o) in enumerate(zip(theirs, ours, strict=True), start=1):
        table.add_row(str(repeat), f"{t:.2f}", f"{o:.2f}", f"{t / o:.2f}")
    table.add_section()
    medians = (f"{statistics.median(seconds):.2f}" for seconds in (theirs, ours))
    table.add_row("median", *medians, str(Ratio.of(theirs, ours)))
    peaks = (f"{side[-1].peak_bytes / 1e9:.2f}" for side in measured[:2])
    table.add_row("peak GB", *peaks, f"{summary['memory_ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"ARC-Challenge, {options.shots} shots, {options.questions} questions, {options.dtype}; "
        f"lm_eval with the best batch size of {options.batch_sizes}, {measured.batch_size}"
    )
    console.print(
        f"{summary['limit_share']:.0%} of what {summary['matrix_product_gflops']} GFLOP/s of matrix products allow; "
        f"sharing contexts alone could give {summary['token_ceiling']:.2f}x; log-likelihoods differ by at most "
        f"{summary['loss_difference']:.1e} nats"
    )


if __name__ == "__main__":
    main()
