"""What README, CONTRIBUTING and docs say of commands, recipes, files and other pages is true; no page is too long."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import prefold
from prefold.algorithms import ALGORITHMS
from prefold.cli import app
from prefold.recipe import Recipe, as_dict, builtin_recipes, load_recipe, make_recipe, parse_yaml
from prefold.recipe.section import all_fields
from prefold.recipe.text import apply_override
from prefold.runs.sweep import swept_fields

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = Path(prefold.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
REFERENCES = {"recipe.md", "layouts.md", "findings.md", "algorithms/README.md", "log.md", "scaling.md", "pairs.md"}
"""Pages to look things up in, which may have more than 1,000 words."""
COMMANDS: Any = vars(get_command(app))["commands"]
FIELDS = set(all_fields(Recipe))
BARE: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "runs/x"}
"""What a part of a recipe is completed with."""
EXAMPLES = {
    *("rewards.py", "mine.yaml", "config.yaml", "orpo/config.yaml", "MODULE.py", "FILE.py"),
    *("recipe.yaml", "merged/README.md", "dpo.yaml", "orpo.yaml", "grpo.yaml"),
}
"""Files that users or runs have."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# ---- commands ---------------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Commands in what is fenced, or indented by four spaces; with a line that ends in a backslash goes the next."""
    fenced = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in [*fenced, *re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]:
        yield from re.findall(r"^ *(?:torchrun .*-m )?(prefold \S.*)$", block.replace("\\\n", " "), re.MULTILINE)


@each_page
def test_a_command_can_be_given(page: Path) -> None:
    for line in command_lines(text_of(page)):
        _, name, *arguments = shlex.split(line, comments=True)
        arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
        command = COMMANDS[name]
        given, rest, _ = command.make_parser(command.context_class(command)).parse_args(list(arguments))
        missing = [part.name for part in command.params if part.required and given.get(part.name) in (None, ())]
        assert not rest and not missing, line
        if "recipe" in given:
            check_fields(given["recipe"], list(given.get("overrides") or ()), swept=name == "sweep")


def check_fields(name: str, overrides: list[str], swept: bool) -> None:
    """Load the recipe if it comes with prefold; else see whether the fields could be set in some recipe."""
    if swept:
        several, overrides = swept_fields(overrides)
        overrides += [f"{field}={json.dumps(value)}" for field, values in several.items() for value in values]
    if name in builtin_recipes():
        load_recipe(name, overrides)
        return
    values: dict[str, Any] = {}
    for override in overrides:
        assert override.partition("=")[0] in FIELDS, override
        apply_override(values, override)
    completed(values)


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A part of a recipe, checked with what it leaves out filled in."""
    methods = [name for name in values if name in ALGORITHMS]
    method = values.get("method") or (methods or ["grpo" if "rewards" in values else "dpo"])[0]
    rewards = {"rewards": [{"name": "length", "target": 50}]} if method == "grpo" else {}
    for section in ("model", "data"):
        if section in values:
            values[section] = {**BARE[section], **values[section]}
    return as_dict(make_recipe({"method": method, **BARE, **rewards, **values}))


@each_page
def test_a_command_in_a_sentence_exists(page: Path) -> None:
    for name, rest in re.findall(r"`prefold (\w+)([^`]*)`", text_of(page)):
        options = {option for part in COMMANDS[name].params for option in part.opts}
        assert {*re.findall(r"--[\w-]+", rest)} <= options | {"--help"}, name


@each_page
def test_targets_and_benchmarks_exist(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    for target in re.findall(r"(?:^ +|`)make ([a-z-]+)", text_of(page), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module, rest in re.findall(r"python -m (benchmarks\.\w+)([^\n`#]*)", text_of(page)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        source = "".join(text_of(path) for path in (ROOT / "benchmarks").glob("*.py"))
        assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", rest)), rest


# ---- recipes ----------------------------------------------------------------------------------------------------


@each_page
def test_a_recipe_is_one(page: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE):
        values = parse_yaml(block, str(page))
        if "output_type" not in values:  # a task of lm-evaluation-harness
            completed(values)


def test_the_page_of_all_fields_is_current() -> None:
    page = runpy.run_path(str(DOCS / "recipe_reference.py"))["page"]()
    assert text_of(DOCS / "recipe.md") == page, "run: python docs/recipe_reference.py > docs/recipe.md"
    assert not re.findall(r"^.*\|  \|$", page.replace("none |  |  |  |", ""), re.MULTILINE), "a field without a meaning"
    assert not [field for field in FIELDS if f"`{field.rpartition('.')[2]}`" not in page]


def test_the_runs_of_the_methods_are_current() -> None:
    for path, text in runpy.run_path(str(DOCS / "algorithms" / "curves.py"))["files"]().items():
        assert text_of(path) == text, "run: python docs/algorithms/curves.py"


# ---- files, names and links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        if not target.startswith("https://"):
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


@each_page
def test_a_file_exists(page: Path) -> None:
    named = {*re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|ipynb))\b", text_of(page))} - EXAMPLES
    folders = (page.parent, ROOT, PACKAGE, DOCS)
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


@each_page
def test_a_name_exists(page: Path) -> None:
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text_of(page))
    assert not [f"{file}: {name}" for file, name in named if name not in names_of(PACKAGE / file)]


@cache
def names_of(file: Path) -> set[str]:
    """Functions and classes of a file, and methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(text_of(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_the_page_of_a_step_names_its_functions() -> None:
    assert len(re.findall(r"`([\w/]+\.py): ([\w.]+)`", text_of(DOCS / "step.md"))) > 30


# ---- pages ------------------------------------------------------------------------------------------------------


def test_pages_are_short() -> None:
    long = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if len(text_of(page).split()) > 1000}
    assert long <= REFERENCES
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    ahead = [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)", text_of(page))
        linked = {(page.parent / target).resolve() for target in targets if not target.startswith("https")}
        ahead += [target for target in linked if target.exists() and target not in reached]
    assert not {*PAGES} - reached
