"""One GPU, measured in ten minutes: whether the engine is right on it, and how fast and how large its steps are.

    python -m benchmarks.gpu                                  # everything
    python -m benchmarks.gpu checks dpo-4bit --minutes 4      # parts of it
    python -m benchmarks.gpu --device cpu --shape tiny        # a rehearsal

Nothing is downloaded: models of the tutorials' shapes get random weights on the device, and tokens are random. First
come the tests that need a GPU, then steps of each method by prefold, with each attention that the device has, and by
TRL where it is installed. A part that takes more than half of the time that is left is ended, and what it has sent
counts. GRPO runs as `prefold train`, from files; the others on models that are made in the process that trains them.

Prints a table and, as its last line, JSON; `results/gpu-cuda.json` is written after every result. Of each side:
`seconds` of the counted steps, `tokens_per_second` of different tokens in them (a prompt counts once), `product_share`:
the FLOPs of those tokens as a share of what matrix products reach, `peak_bytes` beside `planned_bytes`, and
`tutorial_minutes`: its median step, times the steps that the tutorial's rows take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import prefold_sides, trl_sides
from benchmarks.full_size import SHAPES, TINY
from benchmarks.limits import Work, matrix_product_rate
from benchmarks.results import RESULTS, quieten, save
from benchmarks.sides import DOES_NOT_FIT, ROOT, Side, SideFailed, TakenStep
from benchmarks.vs_trl import SIDES
from benchmarks.workloads import HELD_OUT, Workload, random_pairs
from prefold.device import choose_device
from prefold.plan.flops import Steps
from prefold.plan.machine import Machine
from prefold.plan.meta_model import MetaModel
from prefold.plan.planner import Planner
from prefold.plan.timing import with_random_weights
from prefold.recipe import make_recipe
from prefold.trees import scorer
from prefold.trees.attention import candidates, unwrapped
from prefold.trees.memory import free_memory
from prefold.trees.packing import TokenTree


@dataclass(frozen=True)
class Case:
    """Steps as a tutorial has them. `tokens`: means of a prompt and its two answers, or of a prompt and each of its
    `group` completions, about as the tutorial's data have them. `rows`: that the tutorial trains on."""

    method: str
    shape: str
    tokens: tuple[int, ...]
    batch: int
    rows: int
    bits: int = 16
    group: int = 0


MISTRAL, LLAMA, SMOL = "mistral-7b", "llama-3-8b", "smollm2-135m"
CASES = {
    "dpo-4bit": Case("dpo", MISTRAL, (300, 200, 300), batch=16, rows=3200, bits=4),
    "grpo": Case("grpo", SMOL, (400, 96), batch=16, rows=2000, group=8),
    "orpo-4bit": Case("orpo", LLAMA, (250, 350, 350), batch=8, rows=990, bits=4),
    "dpo-16bit": Case("dpo", MISTRAL, (300, 200, 300), batch=16, rows=3200),
}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMALL_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    MISTRAL: SHAPES[MISTRAL][1],
    LLAMA: SHAPES[LLAMA][1],
    SMOL: {"model_type": "llama", **SMALL, **SMALL_HEADS, "vocab_size": 49_152, "max_position_embeddings": 8192},
    "tiny": {"model_type": "llama", **TINY, "vocab_size": 512, "max_position_embeddings": 4096},
}
STEPS = 3
"""That are counted; one more warms up."""
CHECKS = "checks"
CHECKS_SECONDS = 180
"""Most that the tests may take."""


# ---- what there is to do ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    known = [CHECKS, *CASES]
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(known)}; all by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full", help="of the models (default full)")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which it ends (default 10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the result is written to")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.shape == "full":
            parser.error("--device cpu: models of full size take hours there; add --shape tiny")
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --shape tiny tries the benchmark itself")
    options.parts = options.parts or known
    return options


def workload_of(case: Case, is_tiny: bool, folder: Path) -> Workload:
    """With the files of its model in the folder: weights only where they are read from there."""
    batch, counted, tokens, group = case.batch, STEPS, case.tokens, case.group
    if is_tiny:
        batch, counted, tokens, group = 2, 1, tuple(max(4, mean // 20) for mean in tokens), min(group, 2)
    shape = "tiny" if is_tiny else case.shape
    write_model(MODELS[shape], folder, weights=bool(group))
    fields = {"attn_implementation": "trees", "load_in_4bit": case.bits == 4}
    rows: list[dict[str, str]] = []
    if group:
        prompts = [list(range(3 + i, 3 + i + tokens[0])) for i in range(batch * (counted + 1) + HELD_OUT)]
        rows = [{"prompt": " ".join(f"w{index}" for index in prompt)} for prompt in prompts]
        # Stand-ins for the completions that are to be sampled.
        trees = [TokenTree(tuple(prompt), ((0,) * tokens[1],) * group) for prompt in prompts[: batch * counted]]
    else:
        trees = random_pairs(folder, (tokens[0], tokens[1], tokens[2]), batch * counted)
    return Workload(case.method, folder, "bfloat16", not group, trees, rows, batch, model_fields=fields)


def write_model(shape: dict[str, Any], folder: Path, weights: bool) -> None:
    """A configuration, and a tokenizer with a word for each of its tokens; random weights too if so asked."""
    config = AutoConfig.for_model(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16")
    words = {f"w{index}": index for index in range(config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    if weights:
        with torch.device(choose_device()):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)


# ---- the sides, each in a process of its own --------------------------------------------------------------------


class Alone:
    """Stands in for the other end of a side's connection: every turn is its own."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, answer: Any) -> None:
        self.sent.append(answer)

    def recv(self) -> str:
        return "go"


def random_policy(workload: Workload) -> Any:
    """The model with LoRA that the workload trains, with random weights on the device."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(workload.recipe(Path(folder)))
    meta = MetaModel(recipe, AutoConfig.from_pretrained(workload.model), torch.bfloat16)
    return with_random_weights(meta, meta.policy(), choose_device())


def pefts_policy(workload: Workload) -> Any:
    """The same without what prefold changes of it: its LoRA layers, and the float32 stream."""
    policy = random_policy(workload)
    for module in policy.modules():
        vars(module).pop("forward", None)
    unwrapped(policy).get_input_embeddings()._forward_hooks.clear()
    return policy


def with_prefold(connection: Connection, workload: Workload) -> None:
    """Sends the bytes that are planned, and then of every attention its name and what its steps took, or why not."""
    quieten()
    connection.send(planned_bytes(workload))
    names = candidates(choose_device(), torch.bfloat16, AutoConfig.from_pretrained(workload.model))
    # GRPO loads its model from files, as `prefold train` does.
    policy = random_policy(workload) if workload.method != "grpo" else None
    for name in names:
        with (
            patch.object(scorer, "candidates", lambda *_, name=name: [name]),
            patch.object(prefold_sides, "policy_of", lambda recipe: policy),
        ):
            connection.send((name, taken(getattr(prefold_sides, SIDES[workload.method][1]), workload)))
        free_memory()
    connection.send(None)


def with_trl(connection: Connection, workload: Workload) -> None:
    """Sends what its steps took, or why not."""
    policy_of = pefts_policy if workload.method != "grpo" else trl_sides.policy_of
    with patch.object(trl_sides, "policy_of", policy_of):
        connection.send(("TRL", taken(getattr(trl_sides, SIDES[workload.method][0]), workload)))
    connection.send(None)


def taken(side: Any, workload: Workload) -> dict[str, Any]:
    """What the counted steps of a side took; `failed` says why it ended before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    alone = Alone()
    try:
        side(alone, workload)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    steps = [answer for answer in alone.sent if isinstance(answer, TakenStep)][1:]
    return {
        "seconds": [round(step.seconds, 3) for step in steps],
        "rollout_seconds": [round(step.rollout_seconds, 3) for step in steps],
        "peak_bytes": steps[-1].peak_bytes,
    }


def planned_bytes(workload: Workload) -> int:
    """At the peak of training, by the plan."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(workload.recipe(Path(folder)))
    lengths = [(len(tree.prompt), *map(len, tree.completions)) for tree in workload.trees]
    order = [range(step, step + workload.batch) for step in range(0, len(lengths), workload.batch)]
    config, machine = AutoConfig.from_pretrained(workload.model), Machine.planned(None)
    peaks = Planner(recipe, config, machine, Steps(lengths, order), lengths[:HELD_OUT]).plan().peaks
    return max(peaks[phase] for phase in ("self-check", "train", "rollouts") if phase in peaks)


# ---- the parts, one after the other -----------------------------------------------------------------------------


def checks(seconds: float) -> dict[str, Any]:
    """The tests that need a GPU, as far as they come: how many passed and were skipped, and which failed."""
    options = ["-v", "--color=no", "-p", "no:cacheprovider", "-m", "gpu", "tests/equality/test_gpu.py"]
    command, is_whole, started = [sys.executable, "-m", "pytest", *options], True, time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            is_whole = False
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    outcomes = [
        match.groups() for line in lines if (match := re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line))
    ]
    kinds = [kind for _, kind in outcomes]
    return {
        "passed": kinds.count("PASSED"),
        "skipped": kinds.count("SKIPPED"),
        "failed": [name for name, kind in outcomes if kind in ("FAILED", "ERROR")],
        "whole": is_whole,
        "seconds": round(time.monotonic() - started),
    }


def results_of(name: str, case: Case, workload: Workload, rate: float, until: float) -> Iterator[dict[str, Any]]:
    """A result for each attention of prefold, and for TRL. Each side is ended when half of the time that is left has
    passed."""
    work, planned = Work.of(workload), None
    environment = {"PREFOLD_CACHE": str(workload.model / "cache"), "HF_HUB_OFFLINE": "1"}
    for side_name, target in (("prefold", "with_prefold"), ("TRL", "with_trl")):
        if side_name == "TRL" and not find_spec("trl"):
            continue
        side = Side(side_name, f"benchmarks.gpu:{target}", workload, plain=side_name == "TRL", environment=environment)
        entry, ended = {"case": name, "side": side_name}, (until + time.monotonic()) / 2
        try:
            with side.running():
                while (answer := _next(side, ended)) is not None:
                    if isinstance(answer, int):
                        planned = answer
                        continue
                    attention, outcome = answer
                    found = figures(outcome, case, workload, work, rate) if "seconds" in outcome else {}
                    of_ours = {"attention": attention, "planned_bytes": planned} if side_name == "prefold" else {}
                    yield {**entry, **of_ours, **outcome, **found}
        except SideFailed as failed:
            yield {**entry, "failed": DOES_NOT_FIT if failed.out_of_memory else failed.why}
        except TimeoutError:
            yield {**entry, "failed": "out of time"}


def _next(side: Side, ended: float) -> Any:
    if not side.connection.poll(max(0.0, ended - time.monotonic())):
        raise TimeoutError
    return side.receive()


def figures(outcome: dict[str, Any], case: Case, workload: Workload, work: Work, rate: float) -> dict[str, float]:
    seconds = outcome["seconds"]
    flops = work.flops / sum(seconds)
    return {
        "tokens_per_second": round(work.unique_tokens / sum(seconds), 1),
        "tflops": float(f"{flops / 1e12:.3g}"),
        "product_share": float(f"{flops / rate:.3g}"),
        "tutorial_minutes": round(statistics.median(seconds) * case.rows / workload.batch / 60, 1),
    }


# ---- the table --------------------------------------------------------------------------------------------------


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("case", "side", "tokens/s", "TFLOP/s", "of products", "GB", "planned", "tutorial")
    for entry in results:
        side = entry.get("attention", entry["side"])
        if "failed" in entry:
            table.add_row(entry["case"], side, entry["failed"])
            continue
        peak, planned = (f"{entry[key] / 1e9:.1f}" if entry.get(key) else "" for key in ("peak_bytes", "planned_bytes"))
        speed = (f"{entry['tokens_per_second']:,.0f}", f"{entry['tflops']:.1f}", f"{entry['product_share']:.0%}")
        table.add_row(entry["case"], side, *speed, peak, planned, f"{entry['tutorial_minutes']:.1f} min")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    until = time.monotonic() + 60 * options.minutes
    console, is_tiny = Console(stderr=True), options.shape == "tiny"
    outcome: dict[str, Any] = {"products_tflops": None, CHECKS: None, "results": []}
    name = "gpu-tiny" if is_tiny else "gpu"
    if CHECKS in options.parts:
        outcome[CHECKS] = checks(min(CHECKS_SECONDS, (until - time.monotonic()) / 2))
        console.print(f"checks: {outcome[CHECKS]}", highlight=False, markup=False)
        save(name, options, outcome)
    rate = matrix_product_rate("bfloat16")
    free_memory()
    outcome["products_tflops"] = round(rate / 1e12, 3)
    for part in [part for part in CASES if part in options.parts]:
        with tempfile.TemporaryDirectory() as folder:
            workload = workload_of(CASES[part], is_tiny, Path(folder))
            for entry in results_of(part, CASES[part], workload, rate, until):
                outcome["results"].append(entry)
                console.print(json.dumps(entry), highlight=False, markup=False, soft_wrap=True)
                save(name, options, outcome)
    Console().print(table_of(outcome["results"]))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
