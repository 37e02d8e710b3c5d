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
from typing import Any, Literal, NamedTuple, cast

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefold.files import read_json, write_text
from prefold.reports import run_record as read
from prefold.reports.run_record import Number, RunRecord, Values, finite, interval, read_run, section
from prefold.reports.verdict import none_trained_on, overall, tasks_of

CARD = "README.md"

Part = Literal["merged", "adapter", "gguf"]

LIBRARIES: dict[Part, str] = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
TAGS = ("prefold", "preference-optimization")
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "batch_size",
    "num_train_epochs",
    "max_steps",
    "optim",
)
PACKAGES = ("torch", "transformers", "peft", "datasets", "bitsandbytes")


def write_card(run_folder: Path) -> Path:
    """Write the card of a run's merged model beside it, and return its path.

    Raises:
        UserError: the folder holds no recipe, or one of its files cannot be read.
    """
    path = run_folder / "merged" / CARD
    write_text(path, render_card(run_folder))
    return path


def render_card(run_folder: Path, parts: Sequence[Part] = ("merged",)) -> str:
    """The card of a repository that holds these parts of a run."""
    run = read_run(run_folder)
    recipe = portable(run.recipe)
    page = _environment().get_template("card.md.j2")
    tasks, average = run.tasks or {}, section(run.tasks, "average")
    body = page.render(
        run=run,
        parts=parts,
        title=_title(run),
        model_id=section(run.recipe, "publish").get("hub_model_id") or "PATH/OF/THIS/FOLDER",
        chats=_has_chat_template(run_folder),
        base=_base(run),
        licence=_licence(run),
        verdict=overall(run),
        comparisons=read.comparisons_of(run),
        columns=read.columns_of(run),
        held_out="prompts" if run.rewards and not run.heldout else "pairs",
        tasks=_task_rows(tasks),
        average=_task_row("Average", average) if (finite(average.get("tasks")) or 0) > 1 else None,
        none_trained_on=none_trained_on(tasks),
        settings=_settings(recipe),
        sources=_sources(run),
        tokens=_tokens(run),
        findings=_findings(run),
        merge=run.merge,
        checks=_gguf_checks(run_folder) if "gguf" in parts else [],
        recipe=fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100), "yaml"),
        versions=_versions(run),
    )
    return f"---\n{_head(run, parts, tasks)}---\n\n{body}"


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        finalize=literal,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


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

    A character reference never is punctuation to Markdown, so nothing can be closed, opened or linked with one.
    """
    if isinstance(value, Markup):
        return value
    text = value.text if isinstance(value, Number) else str(value)
    escaped = _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", lambda item: f"{item[1]}&#{ord(item[2])};", escaped)


def fenced(text: str, language: str = "") -> Markup:
    """A code block that no line of `text` can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def portable(value: Any) -> Any:
    """A copy of plain values in which every path of this machine is cut to its last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return last_part(value) if isinstance(value, str) else value


def last_part(text: str) -> str:
    """`text`, or what stands behind the last slash if it begins as a path of this machine does."""
    return text.rstrip("/").rpartition("/")[2] or "folder" if re.match(r"~?/|~[\w-]*/|\.\.?/", text) else text


# ---- the head ---------------------------------------------------------------------------------------------------


def _head(run: RunRecord, parts: Sequence[Part], tasks: Values) -> str:
    base = _base(run)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=str(task.get("metric") or "score"),
            metric_value=finite(task.get("after")),
        )
        for name, task in tasks_of(tasks).items()
        if finite(task.get("after")) is not None
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
    return yaml.safe_dump(_without_nothing(data.to_dict()), sort_keys=False, allow_unicode=True)


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    # A line break could end the head, or begin another key.
    return " ".join(value.split()) if isinstance(value, str) else value


# ---- what is said -----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    value: str


class TaskRow(NamedTuple):
    """A task's scores, in percent; `n` questions."""

    name: str
    metric: str
    before: Number
    after: Number
    change: Number
    interval: str
    n: Number


class SourceRow(NamedTuple):
    path: str
    shape: str
    rows: Number
    used: Number


def _title(run: RunRecord) -> str:
    name = section(run.recipe, "publish").get("hub_model_id")
    return str(name).rpartition("/")[2] if name else run.name


def _base(run: RunRecord) -> Values:
    """The base as it was found when the adapter was merged; `name` is what the recipe calls it."""
    known = section(section(run.merge, "provenance"), "base")
    return {"name": last_part(run.model), "hub_id": None, "revision": None, **known}


def _licence(run: RunRecord) -> str | None:
    base = _base(run)
    return base.get("license_name") or base.get("license")


def _has_chat_template(run_folder: Path) -> bool:
    config = run_folder / "merged" / "tokenizer_config.json"
    inside = config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
    return inside or (run_folder / "merged" / "chat_template.jinja").is_file()


def _task_rows(tasks: Values) -> list[TaskRow]:
    rows = [_task_row(name, task) for name, task in tasks_of(tasks).items()]
    return [row for row in rows if row is not None]


def _task_row(name: str, task: Values) -> TaskRow | None:
    if finite(task.get("after")) is None:
        return None
    low, high = interval(task.get("ci"))
    ends = "" if low is None else f"{read.points(low, 1).text} to {read.points(high, 1).text}"
    return TaskRow(
        name=name,
        metric=str(task.get("metric") or ""),
        before=read.percent(task.get("before"), 1),
        after=read.percent(task.get("after"), 1),
        change=read.points(task.get("difference"), 1),
        interval=ends,
        n=read.count(task.get("n")),
    )


def _settings(recipe: Values) -> list[Row]:
    """The fields that say most, in the recipe's own words; the whole recipe stands further down."""
    method, lora, train = str(recipe.get("method", "")), recipe.get("lora"), section(recipe, "train")
    shown = {name: value for name, value in section(recipe, method).items() if value is not None}
    rows = [Row(f"{method}.{name}", _value(value)) for name, value in shown.items()]
    if isinstance(lora, dict):
        rows += [
            Row(f"lora.{name}", _value(lora[name])) for name in ("r", "lora_alpha", "lora_dropout") if name in lora
        ]
    elif lora == "none":
        rows.append(Row("lora", "none: every weight was trained"))
    rows += [Row(f"train.{name}", _value(train[name])) for name in SETTINGS if train.get(name) is not None]
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if section(recipe, "model").get(name)]
    return rows + [Row(f"model.{name}", "true") for name in bits]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sources(run: RunRecord) -> list[SourceRow]:
    return [
        SourceRow(
            last_part(str(source.get("path", ""))),
            str(source.get("shape", "")),
            read.count(source.get("rows_in")),
            read.count(source.get("rows_used")),
        )
        for source in read.objects((run.data or {}).get("sources"))
    ]


def _tokens(run: RunRecord) -> list[tuple[str, Number, Number]]:
    """By split: examples and tokens."""
    tokens = section(run.data, "tokens")
    return [
        (label, read.count(section(tokens, split).get("trees")), read.count(section(tokens, split).get("packed")))
        for split, label in (("train", "trained on"), ("held_out", "held out"))
        if section(tokens, split)
    ]


def _findings(run: RunRecord) -> list[str]:
    kept = read.objects((run.data or {}).get("findings"))
    return [str(one.get("message", "")) for one in kept if one.get("severity") in ("warning", "error")]


def _gguf_checks(run_folder: Path) -> list[tuple[str, Number]]:
    path = run_folder / "gguf" / "checks.json"
    checks = cast("list[Values]", read_json(path)) if path.is_file() else []
    return [(str(one["file"]), read.scientific(one["relative_difference"])) for one in checks]


def _versions(run: RunRecord) -> list[Row]:
    environment = run.environment or {}
    packages = section(environment, "packages")
    known = {"prefold": environment.get("prefold"), "Python": environment.get("python")}
    known |= {name: packages.get(name) for name in PACKAGES}
    known["computed on"] = environment.get("device_name") or environment.get("device")
    return [Row(name, str(value)) for name, value in known.items() if value]
