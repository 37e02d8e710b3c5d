"""What README, CONTRIBUTING and docs say of commands, recipes, files and other pages is true; no page is too long."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import prefold
from prefold.algorithms import ALGORITHMS
from prefold.cli import app
from prefold.recipe import as_dict, builtin_recipes, load_recipe, make_recipe, parse_yaml
from prefold.recipe.recipe import Recipe
from prefold.recipe.section import all_fields
from prefold.recipe.text import apply_override
from prefold.runs.sweep import swept_fields

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
REFERENCES = {"recipe.md", "layouts.md", "findings.md", "algorithms/README.md", "scaling.md", "pairs.md"}
"""Pages to look things up in, which may have more than 1,000 words."""
COMMANDS: Any = vars(get_command(app))["commands"]
FIELDS = set(all_fields(Recipe))
BARE: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "runs/x"}
"""What a part of a recipe is completed with."""


def of_pages(pattern: str, flags: int = 0) -> list[Any]:
    """Each match in each page, with the page and its line for a name."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(pattern, text, flags):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(page, match, id=f"{page.relative_to(ROOT)}:{line}"))
    return found


# ---- commands ---------------------------------------------------------------------------------------------------

LINE = r"^ *(?:torchrun .*-m )?(prefold \S(?:.*\\\n)*.*)$"


def in_blocks() -> list[Any]:
    """Commands in blocks of code, with a line that ends in a backslash goes the next."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for match in re.finditer(LINE, block, re.MULTILINE):
                found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}: {match[1][:50]}"))
    return found


def blocks(text: str) -> Iterator[str]:
    """What is fenced, or indented by four spaces."""
    yield from re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    yield from re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("line", in_blocks())
def test_a_command_can_be_given(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
    command = COMMANDS[name]
    given, rest, _ = command.make_parser(command.context_class(command)).parse_args(list(arguments))
    assert not rest
    missing = [part.name for part in command.params if part.required and given.get(part.name) in (None, ())]
    assert not missing
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
    methods = [name for name in Recipe.model_fields if name in values and name in ALGORITHMS]
    method = values.get("method") or (methods or ["grpo" if "rewards" in values else "dpo"])[0]
    rewards = {"rewards": [{"name": "length", "target": 50}]} if method == "grpo" else {}
    for section in ("model", "data"):
        if section in values:
            values[section] = {**BARE[section], **values[section]}
    return as_dict(make_recipe({"method": method, **BARE, **rewards, **values}))


INLINE = of_pages(r"`prefold (\w+)([^`]*)`")


@pytest.mark.parametrize(("page", "match"), INLINE)
def test_a_command_in_a_sentence_exists(page: Path, match: re.Match[str]) -> None:
    command = COMMANDS[match[1]]
    options = {option for part in command.params for option in part.opts}
    assert {word for word in re.findall(r"--[\w-]+", match[2])} <= options | {"--help"}


@pytest.mark.parametrize(("page", "match"), of_pages(r"^ +make ([\w-]+)|`make ([\w-]+)", re.MULTILINE))
def test_a_target_exists(page: Path, match: re.Match[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{match[1] or match[2]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(("page", "match"), of_pages(r"python -m (benchmarks\.\w+)([^\n`#]*)"))
def test_a_benchmark_has_these_options(page: Path, match: re.Match[str]) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    assert (ROOT / f"{match[1].replace('.', '/')}.py").is_file()
    assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", match[2]))


# ---- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "match"), of_pages(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE))
def test_a_recipe_is_one(page: Path, match: re.Match[str]) -> None:
    values = parse_yaml(match[1], str(page))
    if not {*values} <= {*Recipe.model_fields}:
        assert "output_type" in values, "neither a recipe nor a task"
        return
    completed(values)


def test_the_page_of_all_fields_is_current() -> None:
    page = runpy.run_path(str(DOCS / "recipe_reference.py"))["page"]()
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == page, (
        "run: python docs/recipe_reference.py > docs/recipe.md"
    )
    without_meaning = [line for line in page.splitlines() if line.endswith("|  |") and ": none" not in line]
    assert not without_meaning
    names = {field.rpartition(".")[2] for field in FIELDS}
    assert not [name for name in names if f"`{name}`" not in page]


# ---- pages ------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "match"), of_pages(r"\]\(([^)\s]+)\)"))
def test_a_link_leads_somewhere(page: Path, match: re.Match[str]) -> None:
    target, _, anchor = match[1].partition("#")
    if target.startswith(("https://", "http://")):
        return
    there = (page.parent / target).resolve() if target else page
    assert there.exists(), match[1]
    assert not anchor or anchor in anchors(there), match[1]


@pytest.mark.parametrize(("page", "match"), of_pages(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml|ipynb))\b"))
def test_a_file_exists(page: Path, match: re.Match[str]) -> None:
    if match[1] in OF_USERS:
        return
    package = Path(prefold.__file__).parent
    assert any((folder / match[1]).exists() for folder in (page.parent, ROOT, package, ROOT / "tests")), match[1]


OF_USERS = {
    "rewards.py",
    "mine.yaml",
    "dataset_info.json",
    "orpo/config.yaml",
    "README.md",
    "config.yaml",
    "recipe.yaml",
}
"""Files that pages take for an example."""


def test_pages_are_short() -> None:
    long = {
        str(page.relative_to(DOCS)): words
        for page in DOCS.rglob("*.md")
        if (words := len(page.read_text(encoding="utf-8").split())) > 1000
    }
    assert {*long} <= REFERENCES, long
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        linked = {(page.parent / target).resolve() for target in targets if not target.startswith("http")}
        ahead += [target for target in linked if target.exists() and target not in reached]
    assert not {*PAGES} - reached
