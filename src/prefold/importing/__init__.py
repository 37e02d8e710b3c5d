"""Recipes from the configuration files of other tools: TRL, Axolotl, LLaMA-Factory, ms-swift.

For each tool a YAML file of tables says what becomes of its keys, and a module does what a table cannot express. Every
key of a file ends up in a field or in a note, and the resulting recipe has passed the checks of all recipes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.files import new_file, without_home
from prefold.importing.axolotl import AXOLOTL
from prefold.importing.draft import Draft, Note
from prefold.importing.llamafactory import LLAMAFACTORY
from prefold.importing.llamafactory_v1 import LLAMAFACTORY_V1
from prefold.importing.output import account, nested, recipe_text
from prefold.importing.swift import SWIFT
from prefold.importing.trl import TRL
from prefold.importing.write import Tool, samples, write
from prefold.recipe import make_recipe, parse_yaml

_TOOLS = (TRL, AXOLOTL, LLAMAFACTORY, LLAMAFACTORY_V1, SWIFT)


@dataclass(frozen=True)
class Imported:
    """`text`: the recipe, as YAML with comments; `account`: what became of the file's keys; `notes`: the same, one by
    one; `files`: the contents of further files that the recipe refers to, by path."""

    tool: str
    text: str
    account: str
    notes: tuple[Note, ...]
    files: dict[Path, str]


def import_recipe(file: str, method: str | None = None, output: str | None = None) -> Imported:
    """Turn another tool's YAML file into a recipe. Nothing is written: see `write_imported`.

    Args:
        file: path of the file.
        method: TRL's command that the file is for (`dpo`, `orpo`, ...), if its keys do not tell.
        output: where the recipe is to be written.

    Raises:
        UserError: the file cannot be read, is of no known tool, does not align with preferences, or asks for a loss
            that prefold does not have.
    """
    given = _read(file)
    tool = _tool_of(given, file)
    draft = Draft(tool.name, given, Path(output) if output else None)
    write(draft, tool, file, method)
    _complete(draft, file)
    draft.finish()
    make_recipe(nested(draft), f"{file}, as a recipe")
    method = draft.values["method"]
    about = (ALGORITHMS[method].__doc__ or method).partition(":")[0].partition(";")[0]
    heading = [
        f"{about}, from {Path(file).name} of {draft.tool}.",
        "Fields that are not set here have prefold's defaults. `prefold check` shows what will be trained on.",
    ]
    return Imported(tool.name, recipe_text(draft, heading), account(draft), tuple(draft.notes), draft.files)


def write_imported(imported: Imported, file: str, output: str, force: bool = False) -> list[Path]:
    """Write the recipe, and the files that it names, all of them or none; returns their paths.

    Raises:
        UserError: there is a file already and `force` is not set, or the name is not that of a YAML file.
    """
    recipe = Path(output).expanduser()
    if recipe.suffix not in (".yaml", ".yml") or recipe.is_dir():
        raise UserError("a recipe is a YAML file", where=output, expected="a name that ends in .yaml")
    if recipe.resolve() == Path(file).expanduser().resolve():
        raise UserError("this is the file to import", where=output, advice="give the recipe a name of its own")
    texts = {recipe: imported.text} | {path.expanduser(): text for path, text in imported.files.items()}
    if (there := [path for path in texts if path.exists()]) and not force:
        advice = "choose another name, or overwrite it with `--force`"
        raise UserError("there is a file already", where=without_home(str(there[0])), advice=advice)
    with ExitStack() as files:
        for path, text in texts.items():
            files.enter_context(new_file(path)).write_text(text, encoding="utf-8")
    return list(texts)


def _read(file: str) -> dict[str, Any]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"cannot be read: {reason}", where=file, expected="a YAML file of another tool") from None
    # JSON is YAML, except for tabs between its tokens.
    values = parse_yaml(text.expandtabs() if file.endswith(".json") else text, file)
    if not isinstance(values, dict) or not values:
        raise UserError("not a mapping of settings", where=file, expected="a YAML file of another tool")
    return {str(key): value for key, value in values.items()}


def _tool_of(given: dict[str, Any], file: str) -> Tool:
    """The tool with the most `decides` keys in the file, and among equals the most `tells` keys. Raises UserError: none
    has any, or several have as many."""
    if "method" in given and isinstance(given.get("model"), dict):
        raise UserError("this is a recipe of prefold already", where=file, advice=f"`prefold check {file}`")
    hits = [[len({*tool.keys.get(kind, ())} & set(given)) for kind in ("decides", "tells")] for tool in _TOOLS]
    if hits.count(max(hits)) == 1:
        return _TOOLS[hits.index(max(hits))]
    if not any(max(hits)):
        tells = "; ".join(f"{tool.name}: {', '.join(sorted(tool.keys['tells'])[:6])}, ..." for tool in _TOOLS)
        what = "the file of no tool that prefold knows"
        raise UserError(what, where=file, expected=f"keys of one of these tools ({tells})")
    likely = [tool for tool, hit in zip(_TOOLS, hits, strict=True) if hit == max(hits)]
    seen = "; ".join(f"{tool.name}: {', '.join(sorted({*tool.keys['tells']} & set(given)))}" for tool in likely)
    raise UserError("keys of several tools", where=file, expected=f"keys of one ({seen})")


def _complete(draft: Draft, file: str) -> None:
    """Fill in what a recipe must have and the file lacks. Raises UserError: the file names no model."""
    if "model.name" not in draft.values:
        raise UserError("the file names no model", where=file, advice="add the key that names it, and import again")
    if "output_dir" not in draft.values:
        draft.carry("output_dir", f"runs/{Path(file).stem}", comment="prefold's choice: the file names none")
    if draft.values.get("lora") == "none" and (beta := draft.values.get("grpo.beta")):
        draft.carry("grpo.beta", 0.0, comment=f"not {beta}: full fine-tuning keeps no reference; see `lora`")
    if "data.max_prompt_length" in draft.values:
        draft.values.setdefault("data.overlong", "truncate_prompt")
    if draft.values.get("data.overlong") == "truncate_prompt":
        comment = "" if samples(draft) else f"{draft.tool} cuts answers as well, which prefold never does"
        draft.comments.setdefault("data.overlong", comment)
