"""The page that walks through a step names what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import prefold

PACKAGE = Path(prefold.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "step.md").read_text(encoding="utf-8")


def names_of(file: Path) -> set[str]:
    """Functions and classes of a file, and methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_every_name_exists() -> None:
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", PAGE)
    assert len(named) > 30
    missing = [f"{file}: {name}" for file, name in named if name not in names_of(PACKAGE / file)]
    assert not missing


def test_every_file_exists() -> None:
    for file in re.findall(r"`((?:\w+/)*\w+\.py)", PAGE):
        assert (PACKAGE / file).is_file() or (PACKAGE.parents[1] / file).is_file(), file
