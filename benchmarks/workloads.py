"""What the sides of a benchmark are to do: a method, a model, and trees of tokens."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from prefold.data.chat import render
from prefold.data.preference import Message
from prefold.trees.packing import TokenTree

BATCH = 4
"""Pairs per optimizer step."""
HELD_OUT = 2
LORA_RANK = 16
LEARNING_RATE = 5e-5
TARGET_LENGTH = 200
"""Characters of a completion that GRPO rewards."""
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


@dataclass(frozen=True)
class Workload:
    """`trees` of all steps, for a side that takes tokens; `rows` for one that reads a file, with a step more to warm up
    and `HELD_OUT` more. `model_fields`: further ones of the recipe's `model`."""

    method: str
    model: Path
    dtype: str
    gradient_checkpointing: bool
    trees: list[TokenTree]
    rows: list[dict[str, str]] = field(default_factory=list)
    batch: int = BATCH
    natural_stops: bool = False
    model_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.trees) // self.batch

    @property
    def order(self) -> list[TokenTree]:
        """The trees of all steps; the first step comes twice, to warm up."""
        return self.trees[: self.batch] + self.trees

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method, on both sides. The completions of a group's tree stand in for those that will be sampled."""
        if self.method != "grpo":
            return {"beta": 0.1}
        group = self.trees[0].completions
        return {"beta": 0.04, "num_generations": len(group), "max_completion_length": len(group[0])}

    def recipe(self, folder: Path) -> dict[str, Any]:
        """Of `prefold train` on `rows`, which are written beside the run folder in `folder`."""
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return {
            "method": self.method,
            self.method: self.settings,
            "model": {"name": str(self.model), "dtype": self.dtype, **self.model_fields},
            "lora": lora_settings(),
            "data": {"train": [{"path": str(file)}], "eval_fraction": 0.001, "max_length": 4096},
            **({"rewards": [REWARD]} if self.method == "grpo" else {}),
            "train": {
                "batch_size": self.batch,
                "max_steps": self.steps + 1,
                "learning_rate": LEARNING_RATE,
                "gradient_checkpointing": self.gradient_checkpointing,
                "save_steps": self.steps + 1,
            },
            "output_dir": str(folder / "run"),
        }


REWARD = {"name": "length", "target": TARGET_LENGTH, "unit": "characters"}


def lora_settings() -> dict[str, Any]:
    return {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "lora_dropout": 0.0, "target_modules": "all-linear"}


def random_rows(means: tuple[int, int, int], count: int, spread: float = 0.6) -> list[dict[str, str]]:
    """Pairs of random words, about a token each; lengths are uniform within a share of their means."""
    draw = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(round(mean * (1 - spread)), round(mean * (1 + spread)))))

    return [dict(zip(("prompt", "chosen", "rejected"), map(text, means), strict=True)) for _ in range(count)]


def random_pairs(model: Path, means: tuple[int, int, int], count: int) -> list[TokenTree]:
    """Pairs of random tokens; prompt, chosen and rejected lengths are uniform within 60 % of their means."""
    draw = random.Random(0)
    vocabulary = AutoConfig.from_pretrained(model).vocab_size

    def ids(mean: int) -> tuple[int, ...]:
        length = draw.randint(round(mean * 0.4), round(mean * 1.6))
        return tuple(draw.randrange(3, vocabulary) for _ in range(length))

    return [TokenTree(ids(means[0]), (ids(means[1]), ids(means[2]))) for _ in range(count)]


def text_pairs(file: Path, model: Path, max_length: int, count: int) -> tuple[list[TokenTree], int]:
    """The first `count` pairs of a jsonl file whose sides fit, by the model's chat template, and how many did not."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    trees: list[TokenTree] = []
    skipped = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["prompt"]}]

        def ids(*answer: dict[str, str], prompt: list[dict[str, str]] = prompt) -> tuple[int, ...]:
            encoded: Any = tokenizer.apply_chat_template([*prompt, *answer], add_generation_prompt=not answer)
            return tuple(encoded["input_ids"])

        start = ids()
        sides = [ids({"role": "assistant", "content": row[side]}) for side in ("chosen", "rejected")]
        if max(map(len, sides)) > max_length or any(side[: len(start)] != start for side in sides):
            skipped += 1
            continue
        trees.append(TokenTree(start, tuple(side[len(start) :] for side in sides)))
        if len(trees) == count:
            return trees, skipped
    raise SystemExit(
        f"{file.name} holds {len(trees)} pairs of up to {max_length} tokens a side, {count} were asked for"
    )


def make_prompts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> list[str]:
    """Questions on notes about a house: by the chat template of nearly so many tokens, and never more."""
    draw = random.Random(0)
    colours, things = ("red", "blue", "green", "yellow"), ("lamp", "chair", "table", "clock", "vase", "carpet")

    def prompt(notes: list[str]) -> str:
        question = f"Where is the {things[len(notes) % len(things)]}? Answer in one short sentence."
        return " ".join([*notes, question])

    prompts = []
    for _ in range(count):
        notes: list[str] = []
        longest = prompt(notes)
        while len(render_prompt(longer := prompt(notes), tokenizer)) <= tokens:
            longest = longer
            notes.append(
                f"The {draw.choice(things)} in the {draw.choice(colours)} room cost {draw.randint(2, 99)} coins."
            )
        prompts.append(longest)
    return prompts


def render_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return render([Message(role="user", content=text)], tokenizer)
