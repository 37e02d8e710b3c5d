"""The folder of a run: opened by one process at a time, with its log, for the recipe that it was begun with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml

from prefold.errors import UserError
from prefold.files import locked, remove, remove_left_over, require_writable, write_text
from prefold.recipe import RecipeBase, as_dict, dump_recipe
from prefold.runs.stages import Stage, stages_of

# The recipe last: without it a folder is not known for a run's any more.
RECORDS = (
    *("checkpoints", "metrics.jsonl", "rollouts.jsonl", "guards.json", "gguf", "publish.json", "trackers.json"),
    *("timing.jsonl", "run.log", "trained", "adapter", "recipe.yaml"),
)
"""What `--fresh` removes beside the outputs of the stages."""


@contextmanager
def open_run_folder(recipe: RecipeBase, fresh: bool = False, alone: bool = True) -> Iterator[Path]:
    """The run folder, ready for this recipe; the log goes to its `run.log` meanwhile.

    Args:
        fresh: remove what an earlier run left in it.
        alone: what is done in it cannot be done beside another process: two would write the same lines.

    Raises:
        UserError: it cannot be written to, another process is at work in it, or it holds something else. A recipe that
            is refused leaves no folder that was not there.
    """
    folder = recipe.run_folder
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    before = set(folder.iterdir()) if folder.is_dir() else set()
    require_writable(folder)
    try:
        with _opened(recipe, folder, fresh, alone):
            yield folder
    except UserError:
        if folder / "recipe.yaml" not in before and not (folder / "data.json").exists():
            # Refused at its first stage: nothing of it is to be left.
            for path in set(folder.iterdir()) - before:
                remove(path)
            for path in created:
                with suppress(OSError):
                    path.rmdir()
        raise


@contextmanager
def _opened(recipe: RecipeBase, folder: Path, fresh: bool, alone: bool) -> Iterator[None]:
    with locked(folder, recipe.output_dir) if alone else nullcontext():
        _make_ready(recipe, folder, fresh)
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk has a message of its own
        logger = logging.getLogger("prefold")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()


def _make_ready(recipe: RecipeBase, folder: Path, fresh: bool) -> None:
    remove_left_over(folder)
    if any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        what = "is neither empty nor a run folder"
        raise UserError(what, where=recipe.output_dir, advice="choose another `output_dir`")
    if fresh:
        for stage in stages_of(recipe):
            stage.remove_outputs(folder)
        for name in RECORDS:
            remove(folder / name)
    for stage in outdated_stages(recipe, folder):
        stage.remove_outputs(folder)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))


def outdated_stages(recipe: RecipeBase, folder: Path) -> list[Stage]:
    """The stages whose outputs in a run folder a changed recipe would make differently. Raises UserError: training has
    begun with other settings."""
    if not (folder / "recipe.yaml").is_file():
        return []
    old = _by_dotted_path(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    new = _by_dotted_path(as_dict(recipe))
    changed = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name != "output_dir"
    )
    # Who judges, or is asked beside them, is no part of the evaluation of the run's own models.
    apart = ("evaluate.compare_with", "evaluate.win_rate")
    sections = {name.split(".")[1 if name.startswith(apart) else 0] for name in changed}
    outdated: list[Stage] = []
    for stage in stages_of(recipe):
        if not (outdated or sections.intersection(stage.sections)):
            continue
        outdated.append(stage)
        has_checkpoints = any((folder / "checkpoints").glob("checkpoint-*"))
        if stage.name == "train" and (stage.is_done(folder) or has_checkpoints):
            shown = "; ".join(f"`{name}` was {old.get(name)!r}, is {new.get(name)!r}" for name in changed[:5])
            what = f"holds a run that was trained with other settings: {shown}"
            advice = "take another `output_dir`, or `--fresh` to remove that run and start over"
            raise UserError(what, where=recipe.output_dir, advice=advice)
    return outdated


def _by_dotted_path(values: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings."""
    if not isinstance(values, dict) or not values:
        return {path: values}
    inner = [_by_dotted_path(value, f"{path}.{key}".lstrip(".")) for key, value in values.items()]
    return {name: leaf for leaves in inner for name, leaf in leaves.items()}
