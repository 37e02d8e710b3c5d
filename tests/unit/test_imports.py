"""Who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prefold

PACKAGE = Path(prefold.__file__).parent


def imported(path: Path) -> set[str]:
    """Modules that a file imports, those under `if TYPE_CHECKING:` left out."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        pending += ast.iter_child_nodes(node)
    return found


def files(*parts: str) -> list[Path]:
    found = sorted(path for part in parts for path in (PACKAGE / part).rglob("*.py"))
    assert found
    return found


STANDARD = {"__future__", "abc", "collections", "dataclasses", "typing", "math", "enum"}


@pytest.mark.parametrize("path", files("algorithms"), ids=lambda path: path.name)
def test_algorithms_import_only_torch(path: Path) -> None:
    outside = {name for name in imported(path) if name.split(".")[0] not in STANDARD | {"torch"}}
    assert all(name.startswith("prefold.algorithms") for name in outside)


@pytest.mark.parametrize(
    ("room", "barred"),
    [
        ("data", ("prefold.models", "prefold.trees.attention", "prefold.trees.logprobs", "prefold.training", "peft")),
        ("trees", ("prefold.algorithms", "prefold.training", "prefold.data", "prefold.models")),
        ("evaluation", ("prefold.training",)),
        ("reports", ("prefold.training", "prefold.models", "torch", "transformers")),
        ("", ("trl",)),
    ],
)
def test_borders(room: str, barred: tuple[str, ...]) -> None:
    for path in files(room):
        crossed = [name for name in imported(path) if any(name == bar or name.startswith(bar + ".") for bar in barred)]
        assert not crossed, f"{path.relative_to(PACKAGE)} imports {crossed}"


def test_importing_the_package_is_quick() -> None:
    import subprocess
    import sys

    code = "import sys, prefold, prefold.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
