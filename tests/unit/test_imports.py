"""Who may import whom."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import prefold

PACKAGE = Path(prefold.__file__).parent


MODULES = {
    ".".join(("prefold", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, those in functions too; those under `if TYPE_CHECKING:` left out."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else str(node.module) for module in names.values()}
        pending += ast.iter_child_nodes(node)
    return found


def files(*parts: str) -> list[Path]:
    found = sorted(path for part in parts for path in (PACKAGE / part).rglob("*.py"))
    assert found
    return found


STANDARD = {"__future__", "abc", "collections", "dataclasses", "functools", "typing", "math", "enum"}


@pytest.mark.parametrize("path", files("algorithms"), ids=lambda path: path.name)
def test_algorithms_import_only_torch(path: Path) -> None:
    outside = {name for name in imported(path) if name.split(".")[0] not in STANDARD | {"torch"}}
    assert all(name.startswith("prefold.algorithms") for name in outside)


@pytest.mark.parametrize(
    ("folder", "barred"),
    [
        ("data", ("prefold.models", "prefold.trees.attention", "prefold.trees.logprobs", "prefold.training", "peft")),
        ("trees", ("prefold.algorithms", "prefold.training", "prefold.data", "prefold.models")),
        ("evaluation", ("prefold.training",)),
        ("reports", ("prefold.training", "prefold.models", "torch", "transformers")),
        ("", ("trl",)),
    ],
)
def test_borders(folder: str, barred: tuple[str, ...]) -> None:
    for path in files(folder):
        crossed = [name for name in imported(path) if any(name == bar or name.startswith(bar + ".") for bar in barred)]
        assert not crossed, f"{path.relative_to(PACKAGE)} imports {crossed}"


@pytest.mark.parametrize("path", files("recipe"), ids=lambda path: path.name)
def test_the_recipe_imports_nothing_of_what_it_configures(path: Path) -> None:
    own = ("prefold.recipe", "prefold.recipes", "prefold.errors", "prefold.files", "prefold.algorithms")
    outside = [name for name in imported(path) if name.startswith("prefold")]
    assert [name for name in outside if not any(name == one or name.startswith(one + ".") for one in own)] == []


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: imported(path) & set(MODULES) for name, path in MODULES.items()}).prepare()


def reached_from(*starts: str) -> set[str]:
    """Modules that are imported with these, one by another."""
    reached: set[str] = set()
    pending = [name for name in MODULES if name.startswith(starts)]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += imported(MODULES[name]) & set(MODULES)
    return reached


def test_training_and_sampling_need_no_endpoint() -> None:
    sampling = reached_from("prefold.training", "prefold.generation.engine", "prefold.rewards.scoring")
    assert "prefold.generation.engine" in sampling and "prefold.training.served" in sampling
    assert not sampling & {"prefold.generation.endpoint", "prefold.generation.servers", "prefold.generation.http"}
    assert "prefold.generation.endpoint" not in imported(MODULES["prefold.runs.evaluate"])


def test_importing_the_package_is_quick() -> None:
    import subprocess
    import sys

    code = "import sys, prefold, prefold.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
