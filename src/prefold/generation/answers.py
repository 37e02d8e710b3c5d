"""Prompts from arguments or a file, answered by a model or by a run's merged model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from prefold.data.preference import Message
from prefold.errors import UserError
from prefold.generation.engine import answer
from prefold.generation.opening import open_model
from prefold.generation.sampling import Sampling
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Generate, Model, RecipeBase, load_recipe, make_section
from prefold.recipe.section import with_fields


@with_fields(Generate)
def generate(
    model: str | Path, prompts: str | Sequence[str] = (), *, file: str | Path | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Answer prompts by a model, in its chat format.

    Args:
        model: a run folder (its merged model), or a model by any name that `model.name` can have.
        prompts: messages of a user; each begins a conversation.
        file: more prompts, one a line, or .jsonl with a field `prompt`.
        **settings

    Returns:
        `{"prompt": ..., "answers": [...], "finish_reasons": [...]}` for each prompt; the reason is `stop` if the model
        ended the answer, `length` if `max_new_tokens` cut it off.

    Raises:
        UserError: there is no prompt, a value is out of its bounds, the file cannot be read, the model cannot be used.
    """
    wanted = make_section(Generate, settings)
    given = [prompts] if isinstance(prompts, str) else prompts
    texts = [*given, *(read_prompts(Path(file)) if file else [])]
    if not texts:
        raise UserError("no prompt", expected="a prompt as argument, or `--file prompts.txt`")
    before = [Message(role="system", content=wanted.system)] if wanted.system else []
    section = model_named(str(model))
    loaded, tokenizer = open_model(section, "`generate`"), tokenizer_of(section)
    conversations = [[*before, Message(role="user", content=text)] for text in texts]
    answers = answer(loaded, tokenizer, conversations, Sampling.of(wanted, wanted.num_answers))
    return [
        {
            "prompt": text,
            "answers": [completion.text for completion in group],
            "finish_reasons": [completion.finish_reason for completion in group],
        }
        for text, group in zip(texts, answers, strict=True)
    ]


def print_answers(answers: Sequence[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    for number, entry in enumerate(answers):
        console.print(f"[bold]{escape(entry['prompt'])}[/]", end="\n\n")
        for text, reason in zip(entry["answers"], entry["finish_reasons"], strict=True):
            console.print(Text(text))
            console.print("(cut off here; --max-new-tokens allows more)\n" if reason == "length" else "", style="dim")
        if number + 1 < len(answers):
            console.rule(style="dim")


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; from `.jsonl`, the field `prompt`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file)) from None
    if file.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    return [_prompt_of(line, f"{file}, row {row}") for row, line in enumerate(lines, 1) if line.strip()]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError("no prompt", where=where, expected='an object with a text field, {"prompt": "..."}') from None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("`prompt` is not text", where=where, expected='{"prompt": "..."}')
    return prompt


def model_named(name: str) -> Model:
    """The section that loads a model by its name, or the merged model of a run folder.

    Raises:
        UserError: the run has none yet.
    """
    recipe = run_recipe(name)
    if recipe is None:
        return Model(name=name)
    merged = Path(name).expanduser() / "merged"
    if not merged.is_dir():
        raise UserError("this run has no merged model yet", where=name, advice=f"`prefold run {name}` finishes it")
    return recipe.model.whole(merged)


def run_recipe(name: str) -> RecipeBase | None:
    """The recipe of a run folder; None if `name` is something else."""
    return load_recipe(name) if (Path(name).expanduser() / "recipe.yaml").is_file() else None
