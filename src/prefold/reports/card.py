"""The model card: what a model is, what it was made of, what was measured, how to use it and how to make it again.

It reads only the run folder. Every text from there is data that a model or a stranger wrote: each value of the
template is escaped so that neither Markdown nor HTML in it does anything, and what is shown as code stays inside its
block. Paths of this machine are cut to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from prefold.files import read_json, write_text
from prefold.reports.held_out import columns_of, rows_of
from prefold.reports.numbers import finite
from prefold.reports.run_files import RunRecord, Values, map_texts, read_run, section
from prefold.reports.tasks import averages, none_trained_on, tasks_of
from prefold.reports.templates import card_template
from prefold.reports.verdict import overall

CARD = "README.md"

Part = Literal["merged", "adapter", "gguf"]

LIBRARIES: dict[Part, str] = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
TAGS = ("prefold", "preference-optimization")
TRAIN = ("learning_rate", "lr_scheduler_type", "warmup_steps", "batch_size", "num_train_epochs", "max_steps", "optim")
LORA = ("r", "lora_alpha", "lora_dropout")
PACKAGES = ("torch", "transformers", "peft", "datasets", "bitsandbytes")


def write_card(run_folder: Path) -> Path:
    """Write the card of a run's merged model into its folder, and return its path. Raises UserError: see `read_run`."""
    path = run_folder / "merged" / CARD
    write_text(path, render_card(run_folder))
    return path


def render_card(run_folder: Path, parts: Sequence[Part] = ("merged",)) -> str:
    """The card of a repository that holds these parts of a run."""
    run = read_run(run_folder)
    recipe, base = map_texts(run.recipe, last_part), _base(run)
    gguf = run_folder / "gguf" / "checks.json"
    tasks, average = (
        {name: task for name, task in facts.items() if finite(task.get("after")) is not None}
        for facts in (tasks_of(run.tasks), averages(run.tasks))
    )
    environment = run.environment or {}
    packages = section(environment, "packages")
    versions = {"prefold": environment.get("prefold"), "Python": environment.get("python")}
    versions |= {name: packages.get(name) for name in PACKAGES}
    versions["computed on"] = environment.get("device_name") or environment.get("device")
    body = card_template("card.md.j2", literal, last_part)(
        run=run,
        parts=parts,
        title=_title(run),
        model_id=section(run.recipe, "publish").get("hub_model_id") or "PATH/OF/THIS/FOLDER",
        chats=(run_folder / "merged" / "chat_template.jinja").is_file(),
        base=base,
        licence=base.get("license_name") or base.get("license"),
        verdict=overall(run),
        rows=rows_of(run),
        columns=columns_of(run),
        tasks=tasks,
        average=average.get("Average"),
        none_trained_on=none_trained_on(run.tasks),
        settings=_settings(recipe),
        data=run.data or {},
        checks=read_json(gguf) if "gguf" in parts and gguf.is_file() else [],
        recipe=fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100), "yaml"),
        versions={name: value for name, value in versions.items() if value},
    )
    return f"---\n{_head(run, parts, tasks)}---\n\n{body}"


# ---- text that stays text ---------------------------------------------------------------------------------------

_PUNCTUATION = re.compile(
    r"[\\`*\[\]<>#|~@$]"
    r"|&(?=#?\w+;)"  # a character reference
    r"|:(?=//)|(?<=mailto):|(?<=xmpp):|:(?=[\w+-]+:)"  # an address, or an emoji by its name
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it does nothing
    r"|^[-=]|^\+(?=\s|$)"  # a list or a rule at the start of a line
    r"|(?<=\bwww)\.",
    re.IGNORECASE,
)


def literal(value: Any) -> Any:
    """A value as text on one line in which nothing is Markdown or HTML; `Markup` is left as it is.

    A character reference is never punctuation to Markdown, so nothing can be closed, opened or linked with one.
    """
    if isinstance(value, Markup):
        return value
    escaped = _PUNCTUATION.sub(lambda mark: f"&#{ord(mark[0])};", " ".join(str(value).split()))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", lambda item: f"{item[1]}&#{ord(item[2])};", escaped)


def fenced(text: str, language: str = "") -> Markup:
    """A code block that no line of `text` can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def last_part(text: str) -> str:
    """`text`; if it begins like a local path, only what follows the last slash."""
    return text.rstrip("/").rpartition("/")[2] or "folder" if re.match(r"~?/|~[\w-]*/|\.\.?/", text) else text


def _head(run: RunRecord, parts: Sequence[Part], tasks: dict[str, Values]) -> str:
    base = _base(run)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=str(task.get("metric") or "score"),
            metric_value=finite(task.get("after")),
        )
        for name, task in tasks.items()
    ]
    data = ModelCardData(
        base_model=base.get("hub_id"),
        datasets=section(run.merge, "provenance").get("data_sets") or None,
        library_name=LIBRARIES[parts[0]],
        pipeline_tag="text-classification" if run.scores else "text-generation",
        tags=[*TAGS, run.method, *section(run.recipe, "publish").get("tags", [])],
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        eval_results=results or None,
        model_name=_title(run) if results else None,
    )
    # A line break could end the head, or begin another key.
    values = map_texts(data.to_dict(), lambda text: " ".join(text.split()))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _title(run: RunRecord) -> str:
    name = section(run.recipe, "publish").get("hub_model_id")
    return str(name).rpartition("/")[2] if name else run.name


def _base(run: RunRecord) -> Values:
    """The base as recorded when the adapter was merged; `name` is what the recipe calls it."""
    known = section(section(run.merge, "provenance"), "base")
    return {"name": last_part(run.model), "hub_id": None, "revision": None, **known}


def _settings(recipe: Values) -> dict[str, str]:
    """The fields that say most, as the recipe names them; the whole recipe follows at the end of the card."""
    method, train, model = str(recipe.get("method", "")), section(recipe, "train"), section(recipe, "model")
    shown = {f"{method}.{name}": value for name, value in section(recipe, method).items()}
    if recipe.get("lora") == "none":
        shown["lora"] = "none: every weight was trained"
    shown |= {f"lora.{name}": section(recipe, "lora").get(name) for name in LORA}
    shown |= {f"train.{name}": train.get(name) for name in TRAIN}
    shown |= {f"model.{name}": True for name in ("load_in_4bit", "load_in_8bit") if model.get(name)}
    # A computed rate has sixteen digits.
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in shown.items()}
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in rounded.items()
        if value is not None
    }
