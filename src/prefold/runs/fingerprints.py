"""The files that the stages of a run read from outside its folder, and how they have changed since, in words.

A stage writes the digests of its inputs to `inputs.json` when it begins; `folder.py` decides what a change entails. A
model of the Hub is known by its commit; a changed data set of the Hub shows in the tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from prefold.data.mixture import Prepared
from prefold.data.preference import RowId
from prefold.data.sources import named_files, read_rows
from prefold.errors import UserError, counted, joined
from prefold.evaluation.task_files import task_files
from prefold.files import digest_of, read_json, without_home, write_json
from prefold.models.fetch import is_hub_id
from prefold.recipe import EndpointJudge, RecipeBase, RewardBase, Rows, load_recipe
from prefold.recipe.paths import INPUTS, run_folder, start_of_paths
from prefold.terminal import say
from prefold.user_code import files_of_code

OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Weights, configuration, tokenizer, template and generation settings; also of an adapter."""
COMMIT = "commit"
SHOWN = 5


@dataclass(frozen=True)
class Input:
    """An input of a stage: its name in the recipe, and the digest of each file by its path relative to `root`. `files`
    is empty if there are none any more, None if it cannot be known here (a data set of the Hub, an endpoint)."""

    name: str
    root: str
    files: dict[str, str] | None


@dataclass(frozen=True)
class Change:
    """A change of an input since a stage read it, in words."""

    stage: str
    text: str
    is_gone: bool
    has_failed: bool
    """Whether a stage stopped because of this input, a reward."""


def inputs_of(recipe: RecipeBase, start: Path | None = None) -> dict[str, dict[str, Input]]:
    """The inputs that each stage is the first to read, by stage and by the field that names them.

    Args:
        start: folder that relative paths in the user's own tasks start from; unset: the current folder.
    """
    model, data, settings = recipe.model, recipe.data, recipe.evaluate
    sources: dict[str, Sequence[Rows]]
    sources = {"train": data.train, "eval": data.eval, "decontaminate": data.decontaminate}
    rows = {f"data.{kind}.{i}": _rows(source) for kind, rows in sources.items() for i, source in enumerate(rows)}
    checked = {**rows, "model": _model(model.name, model.revision)}
    if model.adapter:
        checked["model.adapter"] = _model(model.adapter)
    if model.chat_template and model.chat_template != "chatml":
        checked["model.chat_template"] = _file(model.chat_template)
    if data.decisions:
        checked["data.decisions"] = _file(data.decisions)
    judges, tasks = {}, {}
    if win_rate := settings.win_rate:
        judges["evaluate.win_rate"] = _reward(win_rate.judge) if win_rate.judge else _file(str(win_rate.votes))
    if settings.include_path:
        root = Path(settings.include_path).expanduser()
        files = task_files(root, settings.tasks, start or Path.cwd()).values()
        tasks["evaluate.include_path"] = _input(settings.include_path, root, files)
    return {
        "check": checked,
        "train": {f"rewards.{index}": _reward(reward) for index, reward in enumerate(recipe.rewards)},
        "evaluate": tasks,
        "compare": {f"evaluate.compare_with.{index}": _model(name) for index, name in enumerate(settings.compare_with)},
        "judge": judges,
    }


def _input(name: str, root: Path, files: Iterable[Path]) -> Input:
    digests = {}
    for file in files:
        with suppress(OSError):
            digests[os.path.relpath(file, root)] = digest_of(file)
    return Input(without_home(name), without_home(str(root)), digests)


def _file(name: str) -> Input:
    path = Path(name).expanduser()
    return _input(name, path.parent, [path])


def _rows(source: Rows) -> Input:
    try:
        files = [Path(str(file)) for file in named_files(source).values()]
    except UserError:
        return Input(without_home(source.path), "", {})
    if not files:
        return Input(source.path, "", None)
    root = files[0].parent if ":" in source.path else Path(source.path).expanduser()
    while not root.is_dir():  # a file, or a pattern of files
        root = root.parent
    return _input(source.path, root, files)


def _model(name: str, revision: str | None = None) -> Input:
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        path /= "merged"
    if path.is_dir():
        return _input(name, path, sorted(file for pattern in OF_A_MODEL for file in path.glob(pattern)))
    if path.is_file():
        return _file(name)
    if name.startswith("pypi:"):  # a pinned version whose digest is known
        return Input(name, "", None)
    config = try_to_load_from_cache(name, "config.json", revision=revision) if is_hub_id(name) and "/" in name else None
    return Input(name, "", {COMMIT: Path(config).parent.name} if isinstance(config, str) else None)


def _reward(reward: RewardBase | EndpointJudge) -> Input:
    if isinstance(reward, EndpointJudge):
        return Input(reward.model, "", None)
    if reward.file:
        path = Path(reward.file).expanduser()
        return _input(reward.file, path.parent, files_of_code(path))
    is_local_model = "model" in reward.settings and "endpoint" not in reward.settings
    return _model(reward.settings["model"]) if is_local_model else Input(reward.name, "", None)


# ---- the record -------------------------------------------------------------------------------------------------


def record_inputs(folder: Path, recipe: RecipeBase, stage: str, ended: bool = False) -> None:
    """Record what a stage reads when it begins; once it has `ended`, also what it had to fetch first. A reward that
    failed is recorded anew, as it may have been mended."""
    record, inputs = _record(folder), inputs_of(recipe)
    known = {field: item.files for field, item in inputs.get(stage, {}).items() if item.files}
    read = {**record["read"], stage: {**known, **(record["read"].get(stage, {}) if ended else {})}}
    if not ended and record["failed"]:
        mended = {field: reward.files for field, reward in inputs["train"].items() if field in record["failed"]}
        read["train"] = {**read.get("train", {}), **mended}
        record["failed"] = []
    write_json(folder / INPUTS, {**record, "read": read})


def record_failure(folder: Path, recipe: RecipeBase, error: UserError) -> None:
    """Record which reward files the error of a stage names: those may be mended without starting over."""
    failed = [
        f"rewards.{index}"
        for index, reward in enumerate(recipe.rewards)
        if reward.file and error.where.startswith(without_home(reward.file))
    ]
    if failed:
        write_json(folder / INPUTS, {**_record(folder), "failed": failed})


def record_start(folder: Path) -> Path:
    """Record the folder that the run's relative paths start from, and return it."""
    start = start_of_paths(folder)
    where = {"paths_from": without_home(str(start)), "to_it": os.path.relpath(start, folder.resolve())}
    record = _record(folder)
    if record != {**record, **where}:
        write_json(folder / INPUTS, {**record, **where})
    return start


def files_read(folder: Path, stage: str, field: str) -> dict[str, str]:
    """Digests of the files that a stage has read for a field of the recipe; empty if not recorded."""
    read: dict[str, str] = _record(folder)["read"].get(stage, {}).get(field, {})
    return read


def is_commit_of(folder: Path, revision: Any) -> bool:
    """Whether `revision` is the commit of the base model that the run has read."""
    commit = files_read(folder, "check", "model").get(COMMIT)
    return commit is not None and bool(commit == revision)


def _record(folder: Path) -> dict[str, Any]:
    before = {}
    with suppress(OSError, ValueError):
        before = read_json(folder / INPUTS)
    return {"paths_from": "", "to_it": "", "read": {}, "failed": [], **before}


# ---- what has changed -------------------------------------------------------------------------------------------


def changes(recipe: RecipeBase, folder: Path) -> list[Change]:
    """The inputs that have changed since the stages read them."""
    record, changed = _record(folder), []
    for stage, inputs in inputs_of(recipe, start_of_paths(folder)).items():
        for field, now in inputs.items():
            was = record["read"].get(stage, {}).get(field)
            if not was or was == now.files or (now.files is None and COMMIT in was):
                continue
            is_gone = not now.files
            text = f"{now.name} is not there any more" if is_gone else _in_words(field, was, now, recipe, folder)
            changed.append(Change(stage, text, is_gone, field in record["failed"]))
    return changed


def _in_words(field: str, was: Mapping[str, str], now: Input, recipe: RecipeBase, folder: Path) -> str:
    files = now.files or {}
    if COMMIT in was and COMMIT in files:
        text = f"{now.name}: commit {was[COMMIT][:7]} when this run read it, {files[COMMIT][:7]} now"
        return f"{text}; `model.revision={was[COMMIT]}` names the former" if field == "model" else text
    if COMMIT in was or COMMIT in files:
        return f"{now.name} is another model than the one that this run read"
    if len(was) == len(files) == 1 and (rows := _rows_in_words(field, recipe, folder)):
        return f"{now.name}{rows}"
    by_fate = {
        ("has changed", "have changed"): [name for name in was if name in files and files[name] != was[name]],
        ("is gone", "are gone"): [name for name in was if name not in files],
        ("is new", "are new"): [name for name in files if name not in was],
    }
    parts = []
    for fate, names in by_fate.items():
        if paths := [os.path.normpath(os.path.join(now.root, name)) for name in names]:
            parts.append(f"{joined(paths, SHOWN)} {fate[len(paths) > 1]}")
    return "; ".join(parts)


def _rows_in_words(field: str, recipe: RecipeBase, folder: Path) -> str:
    """How many rows a source of data had and has now; empty for other inputs, and if unknown."""
    sources = {f"data.train.{index}": source for index, source in enumerate(recipe.data.train)}
    sources |= {f"data.eval.{index}": source for index, source in enumerate(recipe.data.eval)}
    if field not in sources:
        return ""
    with suppress(OSError, ValueError, LookupError, UserError):
        before = int(read_json(folder / "data.json")["sources"][list(sources).index(field)]["rows_in"])
        after = sum(1 for _ in read_rows(sources[field]))
        if before == after:
            return f" has other rows than when this run read it, {before:,} as before"
        return f": {counted(before, 'row')} when this run read it, {after:,} now"
    return ""


def require_unchanged(recipe: RecipeBase, folder: Path) -> None:
    """Raises UserError: an input is no longer what the check has read, e.g. a model of the Hub was fetched again."""
    texts = [change.text for change in changes(recipe, folder) if change.stage == "check" and not change.is_gone]
    if texts:
        what = "\n  ".join(["holds a run whose inputs have changed since it began:", *texts[:SHOWN]])
        advice = "restore them, take another `output_dir`, or `--fresh` to remove that run and start over"
        raise UserError(what, where=recipe.output_dir, advice=advice)


def require_same_tokens(began: Mapping[str, Any], prepared: Prepared, where: str) -> None:
    """Raises UserError: the same files give other examples than those recorded in `data.json`."""
    now = {"train": prepared.report.train.trees, "held_out": prepared.report.held_out.trees}
    for split, fingerprint in prepared.fingerprints.items():
        if fingerprint != began["fingerprint"].get(split):
            then = began["tokens"][split]["trees"]
            what = f"the {split.replace('_', '-')} examples are not those that this run began with, though no file of "
            what += f"theirs has changed: {then:,} then, {now[split]:,} now"
            advice = "a data set of the Hub has changed, or prefold or one of its libraries: go back to what it was, "
            raise UserError(what, where=where, advice=f"{advice}take another `output_dir`, or `--fresh` to start over")


def say_changes(recipe: RecipeBase, folder: Path) -> None:
    """Say which inputs of a run have changed: its results are those of the inputs as they were."""
    if changed := changes(recipe, folder):
        say(f"{without_home(str(folder))}: its inputs have changed since it was made")
    for change in changed[:SHOWN]:
        say(f"  {change.text}")


def say_changes_of(name: str) -> None:
    """The same for a model by its name, if that is a run folder."""
    if folder := run_folder(name):
        say_changes(load_recipe(name), folder)


def row_list(rows: Sequence[RowId]) -> str:
    """`pairs.jsonl 3, 7; more.jsonl 12`."""
    by_source: dict[str, list[int]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row.row)
    return "; ".join(f"{source} {', '.join(map(str, sorted(numbers)))}" for source, numbers in by_source.items())
