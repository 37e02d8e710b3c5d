"""The tutorials' models at full size: random weights, the shipped recipes, every stage from check to publishing.

    python -m benchmarks.full_size mistral-7b                    # `neuralhermes-dpo` over a model of that shape
    python -m benchmarks.full_size llama-3-8b                    # `orpollama-orpo`
    python -m benchmarks.full_size mistral-7b --limit-gb 12      # with less memory: what does not fit is refused

Nothing of the recipe is changed but the model's path, rows, steps and lengths; a GRPO step of the same model comes
last. Each stage is a process of its own, whose memory is sampled: its own pages, without those that are mapped from
files. Beside it stands what the plan says, likewise without mapped files. About 65 GB on disk for an hour, below
TMPDIR; they are removed at the end, also where this is killed. Prints a table and, as its last line, JSON; writes
`results/full-size-SHAPE-cpu.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.results import parser_for, save
from benchmarks.sides import ROOT, SOURCE
from benchmarks.workloads import random_rows
from prefold.memory import held
from prefold.models.fetch import fetch
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import read_text
from prefold.runs.limits import PHASES

WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b": (
        "neuralhermes-dpo",
        {"model_type": "mistral", **WIDE, "vocab_size": 32_002, "max_position_embeddings": 32_768},
    ),
    "llama-3-8b": (
        "orpollama-orpo",
        {"model_type": "llama", **WIDE, "vocab_size": 128_256, "max_position_embeddings": 8192},
    ),
    "tiny": (
        "neuralhermes-dpo",
        {"model_type": "mistral", **TINY, "vocab_size": 0, "max_position_embeddings": 4096},
    ),
    "tiny-llama": (
        "orpollama-orpo",
        {"model_type": "llama", **TINY, "vocab_size": 1024, "max_position_embeddings": 4096},
    ),
}
"""The recipe, and the configuration; the vocabulary grows where the tokenizer has more tokens."""
FILE_BYTES = 1_600_000_000
"""Of a file of weights, as the models are published."""
POOL = 2**24 - 3
"""Random numbers that the weights are cut from. Rows of a matrix differ, since no power of two divides it."""
SPREAD = 0.02
WORDS = (16, 8, 8)
"""Of a prompt and its two answers."""
BETWEEN_SAMPLES = 0.05


# ---- the model, rows and recipe ---------------------------------------------------------------------------------


def make_model(shape: str, tokenizer_folder: Path, folder: Path) -> None:
    """Write a model of random weights, in bfloat16, a file at a time."""
    tokenizer = load_tokenizer(tokenizer_folder)
    values = dict(SHAPES[shape][1])
    values["vocab_size"] = max(values["vocab_size"], len(tokenizer))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**values, **ends, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()
    files = _in_files(model.state_dict())
    for number, names in enumerate(files, 1):
        tensors = {name: _weight(name, shape, pool) for name, shape in names.items()}
        save_file(tensors, folder / _file_name(number, len(files)), metadata={"format": "pt"})
    index = {name: _file_name(number, len(files)) for number, names in enumerate(files, 1) for name in names}
    total = sum(2 * shape.numel() for names in files for shape in names.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def _in_files(weights: dict[str, Tensor]) -> list[dict[str, torch.Size]]:
    files: list[dict[str, torch.Size]] = [{}]
    left = FILE_BYTES
    for name, weight in weights.items():
        if weight.nbytes > left and files[-1]:
            files.append({})
            left = FILE_BYTES
        files[-1][name] = weight.shape
        left -= weight.nbytes
    return files


def _file_name(number: int, files: int) -> str:
    return f"model-{number:05}-of-{files:05}.safetensors"


def _weight(name: str, shape: torch.Size, pool: Tensor) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    weight, start = torch.empty(shape.numel(), dtype=pool.dtype), sum(name.encode()) * 7919 % (POOL // 2)
    written = 0
    while written < len(weight):
        piece = pool[start : start + len(weight) - written]
        weight[written : written + len(piece)] = piece
        written, start = written + len(piece), 0
    return weight.view(shape)


def write_recipes(shape: str, folder: Path, rows: int, steps: int) -> tuple[Path, Path]:
    """The shipped recipe over the model, rows and steps here, and that of a GRPO step."""
    count, held_out = rows, max(2, rows // 8)
    pairs = random_rows(WORDS, count + held_out, spread=0.3)
    for name, some in (("pairs", pairs[:count]), ("held_out", pairs[count:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs[:4]))
    recipe = yaml.safe_load(read_text(SHAPES[shape][0])[0])
    recipe["model"]["name"] = str(folder / "model")
    recipe["data"] |= {
        "train": [{"path": str(folder / "pairs.jsonl")}],
        "eval": [{"path": str(folder / "held_out.jsonl")}],
        "eval_fraction": 0,
    }
    recipe["train"]["max_steps"] = steps
    recipe["train"].pop("num_train_epochs", None)
    recipe["evaluate"] = {"prompts": 2, "max_new_tokens": 8}
    recipe["publish"] = {"to": str(folder / "published"), "what": ["gguf"], "gguf": ["F16"]}
    recipe["output_dir"] = str(folder / "run")
    grpo = {
        "method": "grpo",
        "model": recipe["model"],
        "lora": recipe["lora"],
        "data": {"train": [{"path": str(folder / "prompts.jsonl")}]},
        "train": {"batch_size": 1, "max_steps": 1, "gradient_checkpointing": True},
        "grpo": {"num_generations": 2, "max_completion_length": 8},
        "rewards": [{"name": "length", "target": 4}],
        "output_dir": str(folder / "grpo-run"),
    }
    for name, values in (("recipe", recipe), ("grpo", grpo)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "recipe.yaml", folder / "grpo.yaml"


# ---- stages, each in a process of its own -----------------------------------------------------------------------


@dataclass
class Performed:
    """A stage: exit code (negative: the signal that killed it), bytes that the process needed at most and those that
    are planned, and what it said last where it failed."""

    stage: str
    code: int
    seconds: float
    peak: int | None
    planned: int | None = None
    said: str = ""
    output: str = ""


Perform = Callable[[str, Sequence[str]], Performed]


def performing(folder: Path, enter_limit: Callable[[], None]) -> Perform:
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "PREFOLD_CACHE": str(folder / "cache"),
        "WANDB_MODE": "disabled",
    }

    def begin() -> None:
        if sys.platform.startswith("linux"):
            # As soon as this benchmark is killed, so is the stage.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        enter_limit()

    def perform(stage: str, arguments: Sequence[str]) -> Performed:
        started, peak = time.perf_counter(), 0
        with (folder / "out").open("w+b") as out, (folder / "err").open("w+b") as err:
            command = [sys.executable, "-m", "prefold", *arguments]
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, preexec_fn=begin)
            try:
                while child.poll() is None:
                    peak = max(peak, held(child.pid) or 0)
                    time.sleep(BETWEEN_SAMPLES)
            finally:
                child.kill()
                child.wait()
            seconds = time.perf_counter() - started
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        said = " ".join(texts[1][texts[1].rfind("prefold: ") :].split())[:600] if child.returncode else ""
        return Performed(stage, child.returncode, round(seconds, 1), peak or None, None, said, texts[0])

    return perform


def stages_of(recipe: Path, grpo: Path, run: Path) -> Iterator[tuple[str, list[str]]]:
    for stage in ("check", "train", "merge", "evaluate"):
        yield stage, [stage, str(recipe), *(["--json"] if stage == "check" else [])]
    yield "generate", ["generate", str(run), "Why is the sky blue?", "--max-new-tokens", "8"]
    yield "report", ["report", str(run)]
    yield "GGUF, publish", ["publish", str(run)]
    yield "grpo: check", ["check", str(grpo), "--json"]
    yield "grpo: train", ["train", str(grpo)]


def perform_all(perform: Perform, recipe: Path, grpo: Path, run: Path) -> Iterator[Performed]:
    plan: dict[str, Any] = {}
    for stage, arguments in stages_of(recipe, grpo, run):
        done = perform(stage, arguments)
        name = stage.removeprefix("grpo: ")
        if name == "check" and done.code in (0, 1) and done.output:
            plan = json.loads(done.output)["plan"]
        phases = [parts for phase, parts in plan.get("memory", {}).items() if phase in PHASES.get(name, ())]
        sizes = [sum(parts.values()) - parts.get("mapped", 0) for parts in phases]
        done.planned = max(sizes, default=None)
        yield done


# ---- what bounds the stages, and what is left behind -------------------------------------------------------------


@contextmanager
def limited(gigabytes: float | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """What kind of limit it is, and what a process does to come under it: a control group where one can be made, else
    the limit on data of `ulimit -d`, which counts files that are mapped."""
    if gigabytes is None:
        yield "none", lambda: None
        return
    size = int(gigabytes * 1e9)
    if group := _new_group(size):
        try:
            yield "cgroup", lambda: _write(group / "cgroup.procs", os.getpid())
        finally:
            group.rmdir()
    else:
        yield "ulimit -d", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _new_group(size: int) -> Path | None:
    """None where this process may make none."""
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", root, f"prefold-{os.getpid()}")
        try:
            if not (group.parent / "cgroup.procs").is_file():
                continue
            group.mkdir()
            _write(group / limit, size)
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def _write(file: Path, value: int) -> None:
    file.write_text(str(value), encoding="ascii")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that another process removes as soon as this one has ended, in whatever way."""
    folder = Path(tempfile.mkdtemp(prefix="prefold-full-size-"))
    command = ["sh", "-c", 'cat > /dev/null; sleep 1; rm -rf "$1"', "sh", str(folder)]
    remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        assert remover.stdin is not None
        remover.stdin.close()
        remover.wait()


# ---- the table --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("full_size", __doc__)
    parser.add_argument("shape", nargs="?", default="mistral-7b", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=16, help="pairs to train on (default 16)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default 1)")
    parser.add_argument("--limit-gb", type=float, help="memory of each stage; what does not fit is to be refused")
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace, folder: Path, perform: Perform) -> list[Performed]:
    console, started = Console(stderr=True), time.perf_counter()
    model = folder / "model"
    model.mkdir()
    make_model(options.shape, fetch(options.model), model)
    console.print(f"model made in {time.perf_counter() - started:.0f} s", highlight=False)
    recipe, grpo = write_recipes(options.shape, folder, options.rows, options.steps)
    stages = []
    for done in perform_all(perform, recipe, grpo, folder / "run"):
        said = f": {done.said}" if done.said else ""
        peak = f", {done.peak / 1e9:.2f} GB" if done.peak else ""
        console.print(
            f"{done.stage}: exit {done.code}, {done.seconds:.0f} s{peak}{said}", highlight=False, markup=False
        )
        stages.append(done)
    return stages


def table_of(stages: Sequence[Performed]) -> Table:
    table = Table("stage", "exit", "seconds", "peak GB", "planned GB", "off by")
    for done in stages:
        peak, planned = (f"{size / 1e9:.2f}" if size else "" for size in (done.peak, done.planned))
        off = f"{done.planned / done.peak - 1:+.0%}" if done.peak and done.planned and not done.code else ""
        table.add_row(done.stage, str(done.code), f"{done.seconds:.0f}", peak, planned, off)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # Ended by a signal as by an error, so that what was begun is tidied up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with scratch_folder() as folder, limited(options.limit_gb) as (limit, enter):
        stages = measured(options, folder, performing(folder, enter))
    Console().print(table_of(stages))
    shown = [{name: value for name, value in asdict(done).items() if name != "output"} for done in stages]
    outcome = {"shape": options.shape, "limit": limit, "stages": shown}
    save(f"full-size-{options.shape}{f'-{options.limit_gb:g}gb' if options.limit_gb else ''}", options, outcome)
    print(json.dumps(outcome))
    refused = 2 if options.limit_gb else 0
    sys.exit(any(done.code not in (0, refused) for done in stages))


if __name__ == "__main__":
    main()
