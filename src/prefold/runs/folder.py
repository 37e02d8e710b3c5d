"""The folder of a run, opened by one process at a time, with its log.

Changes of the recipe and its inputs are reported, and the stages that depend on them are performed again; but trained
weights are removed only on request (`--fresh`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from prefold.errors import Explained, UserError
from prefold.files import locked, remove, remove_left_over, require_writable, write_text
from prefold.recipe import RecipeBase, as_dict, dump_recipe
from prefold.recipe.paths import INPUTS, start_of_paths, with_paths_from
from prefold.runs.fingerprints import SHOWN, Change, changes, is_commit_of, record_start, say_changes
from prefold.runs.opened import TRAINED_LOGITS
from prefold.runs.stages import Stage, stages_of
from prefold.terminal import say
from prefold.training.checkpoints import checkpoints_in, step_of

# The recipe last: without it, the folder is no longer recognised as a run folder.
RECORDS = (
    *("checkpoints", "metrics.jsonl", "rollouts.jsonl", "guards.json", "gguf", "publish.json", "trackers.json"),
    *("timing.jsonl", "run.log", "served", "trained", "adapter", TRAINED_LOGITS, INPUTS, "recipe.yaml"),
)
"""What `--fresh` removes besides the outputs of the stages."""


@contextmanager
def open_run_folder(
    recipe: RecipeBase, fresh: bool = False, alone: bool = True, only: str | None = None
) -> Iterator[Path]:
    """The run folder, made ready for this recipe; meanwhile the log goes to its `run.log`.

    Args:
        fresh: remove what an earlier run left in it.
        alone: whether to lock the folder, so that no other process writes the same files.
        only: the single stage to perform. For `report` nothing is removed, even if the recipe or inputs have changed.

    Raises:
        UserError: the folder cannot be written to, another process is using it, it holds something else or was trained
            with other settings, or an earlier stage than `only` is out of date. A recipe that is refused leaves no new
            folder behind.
    """
    folder = recipe.run_folder
    if only == "report" and not (folder / "recipe.yaml").is_file():
        raise UserError("there is no run in this folder", where=recipe.output_dir, advice="`prefold run` makes it")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    before = set(folder.iterdir()) if folder.is_dir() else set()
    require_writable(folder, "change its permissions, or name a copy of it" if folder / "recipe.yaml" in before else "")
    try:
        with _opened(recipe, folder, fresh, alone, only):
            yield folder
    except Explained:
        if folder / "recipe.yaml" not in before and not (folder / "data.json").exists():
            # Refused at the first stage: leave nothing behind.
            for path in set(folder.iterdir()) - before:
                remove(path)
            for path in created:
                with suppress(OSError):
                    path.rmdir()
        raise


@contextmanager
def _opened(recipe: RecipeBase, folder: Path, fresh: bool, alone: bool, only: str | None) -> Iterator[None]:
    with locked(folder, recipe.output_dir) if alone else nullcontext():
        remove_left_over(folder)
        if any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
            what = "is neither empty nor a run folder"
            raise UserError(what, where=recipe.output_dir, advice="choose another `output_dir`")
        if only == "report":
            for difference in [*_differences(recipe, folder).values()][:SHOWN]:
                say(f"  {difference}; the report is of the run as it was")
            say_changes(recipe, folder)
        else:
            _make_ready(recipe, folder, fresh, only)
        logger = logging.getLogger("prefold")
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk has a message of its own
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()


def _make_ready(recipe: RecipeBase, folder: Path, fresh: bool, only: str | None) -> None:
    """Remove what is out of date, and write the recipe."""
    stages = stages_of(recipe)
    for stage in stages if fresh else ():
        stage.remove_outputs(folder)
    for name in RECORDS if fresh else ():
        remove(folder / name)
    changed = changes(recipe, folder)
    if only == "publish":  # the run is published as it was made
        say_changes(recipe, folder)
        changed = []
    outdated = _outdated(recipe, folder, changed)
    made = [stage for stage in outdated if any((folder / output).exists() for output in stage.outputs)]
    again = {stage.name: outdated[stage] for stage in made}
    before = list(takewhile(lambda name: name != only, (stage.name for stage in stages))) if only else []
    if earlier := next((name for name in before if name in again), None):
        what = f"`{only}` needs the output of `{earlier}`, which is out of date:{_listed(again[earlier])}"
        raise UserError(what, where=recipe.output_dir, advice="`prefold run` does it again")
    if names := [name for name in again if name != only]:
        say("\n  ".join([f"out of date: {', '.join(names)}", *again[names[-1]][:SHOWN]]))
    for stage in outdated:
        stage.remove_outputs(folder)
    for change in changed:
        if change.is_gone:
            say(f"  {change.text}; what was made of it is kept")
        elif change.has_failed:
            say(f"  {change.text}; that reward failed, and the run goes on with it as it is now")
    # The run's relative paths may start from another folder than the current one.
    start = None if record_start(folder) == Path.cwd() else Path.cwd()
    write_text(folder / "recipe.yaml", dump_recipe(recipe, start))


def outdated_stages(recipe: RecipeBase, folder: Path) -> list[Stage]:
    """The stages whose outputs would come out differently, because the recipe or its inputs have changed. Raises
    UserError: training, which has begun, is one of them."""
    return list(_outdated(recipe, folder, changes(recipe, folder)))


def _outdated(recipe: RecipeBase, folder: Path, changed: Sequence[Change]) -> dict[Stage, list[str]]:
    """The outdated stages, each with the changes that it depends on, in words."""
    different = _differences(recipe, folder)
    outdated: dict[Stage, list[str]] = {}
    settings: list[str] = []
    of_inputs: list[str] = []
    for stage in stages_of(recipe):
        read = [change for change in changed if change.stage == stage.name]
        of_inputs += [change.text for change in read if not (change.is_gone or change.has_failed)]
        settings += [text for field, text in different.items() if _section(field) in stage.sections]
        if not (settings or of_inputs):
            continue
        outdated[stage] = settings + of_inputs
        if stage.name != "train":
            continue
        is_done, at = stage.is_done(folder), max(map(step_of, checkpoints_in(folder / "checkpoints")), default=0)
        if is_done or at:
            advice = "take another `output_dir`, or `--fresh` to remove that run and start over"
            if settings:
                what = f"holds a run that was trained with other settings:{_listed(settings)}"
                raise UserError(what, where=recipe.output_dir, advice=advice)
            when = "it was trained" if is_done else f"it began; it is at step {at}"
            what = f"holds a run whose inputs have changed since {when}:{_listed(of_inputs)}"
            raise UserError(what, where=recipe.output_dir, advice=f"restore them, {advice}")
    return outdated


def _differences(recipe: RecipeBase, folder: Path) -> dict[str, str]:
    """The fields that differ from the recipe in the run folder, in words; paths to the same file do not differ."""
    if not (folder / "recipe.yaml").is_file():
        return {}
    was: Any = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    now, start = as_dict(recipe), start_of_paths(folder)
    old, new = by_dotted_path(was), by_dotted_path(now)
    old_paths = by_dotted_path(with_paths_from(start, was))
    new_paths = by_dotted_path(with_paths_from(Path.cwd(), now))
    # Of a section or source that only one of them has, only the fields that are set.
    names = [
        name for name in old.keys() | new.keys() if (name in old and name in new) or old.get(name) or new.get(name)
    ]
    return {
        name: f"`{name}` was {_shown(name, old)}, is {_shown(name, new)}"
        for name in sorted(names, key=lambda name: (name != "method", name))
        if old.get(name) != new.get(name)
        and old_paths.get(name) != new_paths.get(name)
        and name != "output_dir"
        and not (name == "model.revision" and is_commit_of(folder, new.get(name)))
    }


def _shown(name: str, values: Mapping[str, Any]) -> str:
    return repr(values[name]) if name in values else "not there"


def _section(field: str) -> str:
    # These have stages of their own: a change leaves the evaluation of the run's own models valid.
    apart = ("evaluate.compare_with", "evaluate.win_rate")
    return field.split(".")[1 if field.startswith(apart) else 0]


def _listed(reasons: Sequence[str]) -> str:
    if len(reasons) == 1:
        return f" {reasons[0]}"
    more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return "".join(f"\n  {reason}" for reason in [*reasons[:SHOWN], *more])


def by_dotted_path(values: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by dotted path; an empty mapping or list is a leaf."""
    if not isinstance(values, dict | list) or not values:
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    inner = [by_dotted_path(value, f"{path}.{key}".lstrip(".")) for key, value in items]
    return {name: leaf for leaves in inner for name, leaf in leaves.items()}
