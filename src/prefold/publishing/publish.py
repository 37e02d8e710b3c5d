"""Publish a finished run: to a repository of the Hub, to a folder, or both, with GGUF files if wanted."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefold.errors import UserError
from prefold.files import new_folder, read_json, read_jsonl, without_home, write_json
from prefold.models.fetch import fetch
from prefold.models.tokenizer import tokenizer_of
from prefold.publishing.files import Item, items_of, require_whole, title_of
from prefold.publishing.gguf import export_gguf, require_exportable
from prefold.publishing.hub import push, require_token
from prefold.recipe import Publish, RecipeBase
from prefold.reports.card import CARD, last_part, write_card
from prefold.reports.run_files import read_run
from prefold.terminal import progress_bar, say

RECORD = "publish.json"
COMPARED, LONGEST = 3, 2000
"""Number of answered prompts on which a GGUF file is compared with the model, and the most characters of each."""


def require_section(recipe: RecipeBase) -> Publish:
    """Raises UserError if the recipe does not say where to publish."""
    if recipe.publish is None:
        what, expected = "the recipe does not say where to publish", "a section `publish`"
        advice = "add `publish.hub_model_id=NAME/MODEL` or `publish.to=FOLDER`"
        raise UserError(what, where=recipe.output_dir, expected=expected, advice=advice)
    return recipe.publish


def require_ready(recipe: RecipeBase) -> None:
    """Check before training what would stop publishing after it, without the network. Raises UserError: there is no
    token, the folder must not be replaced, or the model cannot become GGUF."""
    if (section := recipe.publish) is None:
        return
    if section.hub_model_id:
        require_token(section.hub_model_id)
    folder = Path(section.to).expanduser() if section.to else None
    if folder and not (folder / CARD).is_file():  # a card may be ours, which publishing knows
        _require_own(folder, str(section.to), ())
    if section.gguf:
        base = fetch(recipe.model.name, recipe.model.revision)
        require_exportable(base, tokenizer_of(recipe.model), section.gguf, recipe.model.name)


def planned(run_folder: Path, section: Publish) -> dict[str, Any]:
    """What publishing would do: `files` with `bytes`, and where they would go. The sizes of GGUF files that do not
    exist yet are estimates."""
    require_whole(run_folder)
    return _outcome(section, items_of(run_folder, section))


def publish_run(run_folder: Path, section: Publish) -> None:
    """Publish what the section says, and write `publish.json`.

    Raises:
        UserError: see `require_whole` and `push`; or the folder cannot be written to.
        StageError: the connection broke, or a GGUF file differs from the model.
    """
    if section.hub_model_id:
        require_token(section.hub_model_id)
    tokenizer = require_whole(run_folder)
    checks = []
    if section.gguf:
        title, texts = title_of(run_folder, section), compared_texts(run_folder, tokenizer)
        checks = export_gguf(run_folder / "merged", run_folder / "gguf", title, section.gguf, texts)
    write_card(run_folder)
    items = items_of(run_folder, section)
    outcome = {**_outcome(section, items), "gguf": checks}
    before = read_json(run_folder / RECORD) if (run_folder / RECORD).is_file() else {}
    if section.to:
        _copy(items, section.to, [file["name"] for file in before.get("files", [])])
    if section.hub_model_id:
        run = read_run(run_folder)
        message = f"{run.method.upper()} of {last_part(run.model)}, by prefold {version('prefold')}"
        outcome |= push(section, items, message, before)
    write_json(run_folder / RECORD, outcome)


def _outcome(section: Publish, items: Sequence[Item]) -> dict[str, Any]:
    return {
        "hub_model_id": section.hub_model_id,
        "folder": section.to and without_home(section.to),
        "files": [{"name": item.name, "bytes": item.size} for item in items],
    }


def compared_texts(run_folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts with the model's own answers, in its chat format if it has one; without any, a fixed text."""
    samples = run_folder / "samples.jsonl"
    texts = []
    for row in (read_jsonl(samples) if samples.is_file() else [])[:COMPARED]:
        answered = [*row["prompt"], {"role": "assistant", "content": row["after"][0]}]
        plain = "".join(message["content"] for message in answered)
        texts.append(str(tokenizer.apply_chat_template(answered, tokenize=False)) if tokenizer.chat_template else plain)
    kept = [text[:LONGEST] for text in texts if text.strip()]
    return kept or ["Why is the sky blue?\n\nAir scatters blue light more than red: about 5.5 times as much."]


def _copy(items: Sequence[Item], to: str, before: Sequence[str]) -> None:
    """Copy the files to a folder, which appears when it is complete. The files `before`, published there earlier, may
    be replaced. Raises UserError: it holds other files, or cannot be written to."""
    folder = Path(to).expanduser()
    _require_own(folder, to, {*before, *(item.name for item in items)})
    say(f"  to {without_home(to)}")
    try:
        with new_folder(folder) as aside, progress_bar("copy", len(items)) as advance:
            for item in items:
                target = aside / item.name
                target.parent.mkdir(parents=True, exist_ok=True)
                assert item.source is not None
                if isinstance(item.source, bytes):
                    target.write_bytes(item.source)
                else:
                    shutil.copyfile(item.source, target)
                advance(advance=1, text=item.name)
    except OSError as error:
        advice = "free some space, or choose another `publish.to`"
        raise UserError(f"cannot be written to ({error.strerror})", where=to, advice=advice) from None


def _require_own(folder: Path, shown: str, known: Collection[str]) -> None:
    """Raises UserError: it is a file, or holds files other than the `known` ones; it is replaced as a whole."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder", where=shown, advice="choose another `publish.to`")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    if foreign := [file for file in files if file.as_posix() not in known]:
        what = f"holds files that were not published there, e.g. {min(foreign)}"
        raise UserError(what, where=shown, advice="choose another `publish.to`, or empty it: it is replaced as a whole")
