"""Which YAML files of lm-evaluation-harness describe the tasks that are wanted.

The harness parses its 14,000 files before it knows any name, which takes most of a minute. Here only the folders that
matter are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefold.errors import UserError, did_you_mean
from prefold.evaluation.suites import SUITES
from prefold.files import without_home

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

WHERE = "evaluate.tasks"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
"""Tasks that come with prefold."""
_NAMED = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*(?:\n[ \t]*- )?["']?([\w.:-]+)""", re.MULTILINE)


def manager_of(names: Sequence[str], include_path: str | None) -> TaskManager:
    """The manager of these tasks and those that they refer to. Raises UserError: a name or the folder does not
    exist."""
    own = [] if include_path is None else [Path(include_path).expanduser()]
    if own and not own[0].is_dir():
        where = f"evaluate.include_path: {without_home(str(own[0]))}"
        raise UserError("there is no such folder", where=where, expected="a folder of YAML files")
    manager = _reading(own)
    folders: set[Path] = set()
    while more := {_folders()[name] for name in _missing(names, manager.task_index) if name in _folders()} - folders:
        folders |= more
        manager = _reading([*sorted(folders, reverse=True), *own])
    for name in names:
        if name not in manager.task_index:
            near = did_you_mean(name, sorted({*SUITES, *manager.task_index, *_folders()}), 3)
            raise UserError(f"there is no task `{name}`", where=WHERE, advice=near or "see docs/tasks.md")
    return manager


def everyday_facts(**_: Any) -> dict[str, Dataset]:
    """The questions of the built-in task of that name, as its YAML asks for them.

    A file that is named in YAML would be looked for in the working directory.
    """
    from datasets import Dataset

    lines = (BUILTIN_FOLDER / "everyday_facts" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def _reading(folders: Sequence[Path]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    # Of several folders with a task of the same name, the harness takes the last one.
    return TaskManager(include_path=[str(folder) for folder in (BUILTIN_FOLDER, *folders)], include_defaults=False)


def _missing(names: Sequence[str], known: Mapping[str, Any]) -> set[str]:
    """The names that are not known, including those that known groups refer to."""
    pending: list[str] = list(names)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        members = (known[name].cfg or {}).get("task") if name in known and name not in seen else None
        seen.add(name)
        for member in members if isinstance(members, list) else ():
            pending.append(member if isinstance(member, str) else str(member.get("task") or member.get("group")))
    return {name for name in seen if name not in known}


@lru_cache(maxsize=1)
def _folders() -> dict[str, Path]:
    """The folder of each name in the harness's own YAML files."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    folders: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in _NAMED.findall(path.read_text(encoding="utf-8")):
            folders.setdefault(name, root / path.relative_to(root).parts[0])
    return folders
