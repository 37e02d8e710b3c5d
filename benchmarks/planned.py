"""What `prefold check` plans against what a run takes: peak memory, and the time of training.

    python -m benchmarks.planned                 # every setting
    python -m benchmarks.planned dpo-1024 grpo   # those named

Each setting is a run in a process of its own, which plans, trains and, where the setting says so, merges and evaluates
in further processes. Memory is that of the process on a CPU (interpreter and libraries included, and neither here nor
in the plan what is mapped from files), and what torch has allocated on a GPU, which nobody has run yet. Prints a table
and, as its last line, JSON; writes `results/planned-cpu.json` (`planned-cuda.json` on a GPU).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prefold
from benchmarks.results import parser_for, quieten, write
from benchmarks.sides import Side, running
from benchmarks.workloads import HELD_OUT, random_rows
from prefold.models.fetch import fetch
from prefold.runs.limits import PHASES

SHORT, LONG = (128, 96, 80), (700, 500, 450)
"""Words of a prompt and its two answers."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-12m": {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6},
    "qwen3-35m": {"model_type": "qwen3", "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8},
    "gemma2-30m": {"model_type": "gemma2", "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6},
}
"""Models with random weights, made where SmolLM2's size or family is not what is wanted."""


@dataclass(frozen=True)
class Setting:
    """A recipe's fields by dotted path; `model` is SmolLM2-135M or one of FAMILIES; `timed` and `later`: whether time,
    and the stages after training, are compared too."""

    name: str
    method: str = "dpo"
    model: str = "smollm2"
    budget: int = 1024
    words: tuple[int, int, int] = SHORT
    fields: dict[str, Any] = field(default_factory=dict)
    timed: bool = False
    later: bool = False


BF16 = {"model.dtype": "bfloat16"}
QWEN3 = "qwen3-35m"
CHECKPOINTING = {"train.gradient_checkpointing": True}
SETTINGS = [
    Setting("dpo-512", budget=512),
    Setting("dpo-1024", timed=True, later=True),
    Setting("dpo-bf16", fields=BF16, timed=True),
    Setting("dpo-4bit", budget=512, fields={**BF16, "model.load_in_4bit": True}),
    Setting("dpo-checkpointing", fields=CHECKPOINTING),
    Setting("grpo", method="grpo", timed=True, fields={"grpo.num_generations": 8, "grpo.max_completion_length": 48}),
    Setting("dpo-long", model=QWEN3, budget=4096, words=LONG),
    Setting("dpo-8bit", model=QWEN3, fields={"model.load_in_8bit": True}),
    Setting("dpo-4bit-checkpointing", model=QWEN3, budget=2048, fields={"model.load_in_4bit": True, **CHECKPOINTING}),
    Setting("dpo-plain", model=QWEN3, fields={"model.attn_implementation": "sdpa"}),
    Setting("dpo-full", model=QWEN3, fields={"lora": "none"}, later=True),
    Setting("dpo-full-bf16", model=QWEN3, fields={"lora": "none", "train.optim": "adamw_8bit", **BF16}),
    Setting("dpo-r128", model=QWEN3, fields={"lora.r": 128, "lora.use_rslora": True}),
    Setting("dpo-dora", model=QWEN3, fields={"lora.use_dora": True, "lora.r": 8}),
    Setting("orpo", model=QWEN3, method="orpo"),
    Setting("kto", model=QWEN3, method="kto"),
    Setting("simpo-llama", method="simpo", model="llama-12m", budget=4096),
    Setting("dpo-gemma2", model="gemma2-30m"),
]


# ---- the runs, each in a process of its own ---------------------------------------------------------------------


def recipe_of(setting: Setting, folder: Path, model: str) -> dict[str, Any]:
    tokens = sum(setting.words) * 1.3
    batch = max(2, round(setting.budget / tokens) + 1)  # more than a row holds
    values: dict[str, Any] = {
        "method": setting.method,
        "model": {"name": model, "dtype": "float32"},
        "lora": {"r": 16},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "eval_fraction": 0.001, "max_length": 4096},
        "train": {
            "batch_size": batch,
            "max_steps": 3 if setting.timed else 2,
            "max_tokens": setting.budget,
            "save_steps": 100,
        },
        "evaluate": {"prompts": 4, "max_new_tokens": 32},
        "output_dir": str(folder / "run"),
    }
    if setting.method == "grpo":
        values["rewards"] = [{"name": "length", "target": 20}]
        values["train"]["batch_size"] = 4
    for dotted, value in setting.fields.items():
        *parents, last = dotted.split(".")
        here = values
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return values


def write_rows(setting: Setting, batch: int, to: Path) -> None:
    rows = random_rows(setting.words, batch + HELD_OUT, spread=0.3)
    if setting.method == "grpo":
        rows = [{"prompt": row["prompt"]} for row in rows]
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(name: str, smollm2: Path, folder: Path) -> str:
    """SmolLM2, or a folder with a model of random weights and SmolLM2's tokenizer."""
    if name == "smollm2":
        return str(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": FAMILIES[name]["hidden_size"] // 8}
    config = AutoConfig.for_model(
        **FAMILIES[name], **heads, **ends, vocab_size=len(tokenizer), tie_word_embeddings=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def perform(connection: Connection, work: tuple[str, bool, Path]) -> None:
    """A side that performs a stage of a recipe, its step timed first or not; sends what the plan says that takes."""
    stage, timed, recipe = work
    quieten()
    seconds = prefold.check(recipe, measure=True).plan.seconds if timed else None
    getattr(prefold, stage)(recipe)
    connection.send(seconds)


def measured(setting: Setting, smollm2: Path) -> list[dict[str, Any]]:
    """For each phase that was run: planned and measured bytes, the planned ones by part; for training the seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = recipe_of(setting, folder, make_model(setting.model, smollm2, folder))
        write_rows(setting, values["train"]["batch_size"], folder / "rows.jsonl")
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values, sort_keys=False))
        stages, seconds = ["train", *(["merge", "evaluate"] if setting.later else [])], {}
        for stage in stages:
            work = (stage, setting.timed and stage == "train", recipe)
            side = Side(f"{setting.name}, {stage}", "benchmarks.planned:perform", work)
            with running(side):
                seconds[stage] = side.receive()
        plan = json.loads((folder / "run" / "data.json").read_text())["plan"]
        lines = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    peaks = {line["stage"]: line["peak_memory_mb"] * 2**20 for line in lines if "stage" in line}
    entries = []
    for stage in stages:
        own = {
            phase: sum(parts.values()) - parts["mapped"]
            for phase, parts in plan["memory"].items()
            if phase in PHASES[stage]
        }
        phase = max(own, key=own.__getitem__)
        entry = {
            "setting": setting.name,
            "phase": phase,
            "planned_mb": round(own[phase] / 1e6),
            "measured_mb": round(peaks[stage] / 1e6),
            "parts_mb": {part: round(size / 1e6) for part, size in plan["memory"][phase].items()},
        }
        if seconds[stage]:
            steps = [line["seconds"] for line in lines if "step" in line]
            planned = sum(seconds[stage].get(phase, 0) for phase in ("train", "rollouts"))
            # The first step warms up.
            entry["planned_step_s"] = round(planned / plan["optimizer_steps"], 2)
            entry["measured_step_s"] = round(sum(steps[1:]) / len(steps[1:]), 2)
        entries.append(entry)
    return entries


# ---- the table --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("planned", __doc__)
    parser.add_argument("settings", nargs="*", metavar="setting", help="names of settings; all by default")
    options = parser.parse_args(arguments)
    known = {setting.name: setting for setting in SETTINGS}
    if unknown := set(options.settings) - set(known):
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    console, smollm2 = Console(), fetch(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    entries = []
    for name in options.settings or known:
        entries += measured(known[name], smollm2)
        print(json.dumps(entries[-1]), flush=True)
    table = Table("setting", "phase", "planned MB", "measured MB", "off by", "without the process")
    for entry in entries:
        base = entry["parts_mb"].get("process", 0)
        whole, rest = ((entry["planned_mb"] - less) / max(entry["measured_mb"] - less, 1) - 1 for less in (0, base))
        entry["off_by"], entry["off_by_without_process"] = round(whole, 3), round(rest, 3)
        numbers = (str(entry["planned_mb"]), str(entry["measured_mb"]), f"{whole:+.0%}", f"{rest:+.0%}")
        table.add_row(entry["setting"], entry["phase"], *numbers)
    console.print(table)
    outcome = {"device": device, "settings": entries}
    if not options.settings:
        write(f"planned-{device}", options, outcome)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
