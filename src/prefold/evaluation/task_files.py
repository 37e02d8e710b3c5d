"""The files that a user's own tasks are made of: their YAML, what that includes, code and data.

They are found from the text of the YAML alone, without the harness, which takes seconds to import. Data on the Hub are
not among them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from prefold.user_code import files_of_code


class _Function(str):
    """`module.name`, with the module next to the YAML file."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


def task_files(include_path: Path, names: Sequence[str], start: Path) -> dict[str, Path]:
    """The files of the tasks and groups of these names, by their paths relative to `include_path`.

    Args:
        start: folder that relative paths of data start from.
    """
    configs = {path: _read(path) for path in sorted(include_path.rglob("*.yaml"))}
    pending, files, seen = list(names), dict[str, Path](), set[str]()
    while pending:
        seen.add(name := pending.pop())
        for path, config in configs.items():
            members = config.get("task") if isinstance(config.get("task"), list) else None
            if name in _names({**config, "task": None if members else config.get("task")}):
                _add(files, path, include_path, start)
                pending += [member for member in _names(members) if member not in seen]
    return files


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        return config if isinstance(config, dict) else {}
    return {}


def _names(value: Any) -> list[str]:
    """The names of tasks and groups in a value of any type."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [name for key in ("task", "group", "tag", "task_list") for name in _names(value.get(key))]
    return [name for item in value for name in _names(item)] if isinstance(value, list) else []


def _add(files: dict[str, Path], path: Path, root: Path, start: Path) -> None:
    """Add a YAML file, and the files that it names."""
    if path in files.values():
        return
    files[os.path.relpath(path, root)] = path
    for key, value in _leaves(_read(path)):
        if isinstance(value, _Function):
            code = path.parent / f"{value.rpartition('.')[0].replace('.', '/')}.py"
            files |= {os.path.relpath(file, root): file for file in files_of_code(code)}
        elif key == "include" and (path.parent / value).is_file():
            _add(files, path.parent / value, root, start)
        elif key == "data_files":
            data = map(Path, glob.glob(str(start / Path(value).expanduser()), recursive=True))
            files |= {os.path.relpath(file, root): file for file in data}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in nested values, each with its key; everything below `data_files` has that key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, key if key == "data_files" else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    elif isinstance(value, str):
        yield key, value
