"""A finished run goes out: to a repository of the Hub by the Hub's own client, to a folder, or both.

What goes is listed once, as items, and listed, copied or pushed from there. A push is one commit, so that a repository
never holds half a model; what a broken connection had already brought there is not sent again. The token is the
client's business: it is never read into a value that could be written down.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked so
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from prefold.errors import StageError, UserError, first_line
from prefold.files import new_folder, read_json, read_jsonl, without_home, write_json
from prefold.models.fetch import fetch
from prefold.models.load import load_tokenizer, tokenizer_of
from prefold.publishing.gguf import expected_bytes, export_gguf, file_name, require_exportable
from prefold.recipe import Publish, RecipeBase
from prefold.reports.card import CARD, last_part, render_card, write_card
from prefold.reports.run_record import read_run
from prefold.terminal import progress_bar, say

RECORD = "publish.json"
OF_THE_MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", CARD)
"""What lies in `merged/` beside the tokenizer and its template."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CHECKPOINTS = "checkpoints"
"""The branch that checkpoints are pushed to."""
OF_A_CHECKPOINT = ("config.json", "generation_config.json", "adapter_config.json", *WEIGHTS)
COMPARED = 3
"""Answered prompts on which a GGUF file is compared with the model."""
LONGEST = 2000
"""Characters of each."""


@dataclass(frozen=True)
class Item:
    """A file to publish: where its bytes are (None: made when it is published), what it is called there, its size."""

    source: Path | bytes | None
    name: str
    size: int


# ---- before ------------------------------------------------------------------------------------------------------


def require_section(recipe: RecipeBase) -> Publish:
    """Raises UserError if the recipe does not say where to publish."""
    if recipe.publish is None:
        raise UserError(
            "the recipe does not say where to publish",
            where=recipe.output_dir,
            expected="a section `publish`",
            advice="add `publish.hub_model_id=NAME/MODEL` or `publish.to=FOLDER`",
        )
    return recipe.publish


def require_ready(recipe: RecipeBase) -> None:
    """What would stop publishing after hours of training and can be told before it; asks nothing of the network.

    Raises:
        UserError: no token, no room in the folder, or a model that cannot become GGUF.
    """
    if (section := recipe.publish) is None:
        return
    if section.hub_model_id:
        _require_token(section.hub_model_id)
    folder = Path(section.to).expanduser() if section.to else None
    if folder and not (folder / CARD).is_file():  # what has a card may be of an earlier publishing, which is known then
        _require_own(folder, str(section.to), ())
    if section.gguf:
        base = fetch(recipe.model.name, recipe.model.revision)
        require_exportable(base, tokenizer_of(recipe.model), section.gguf, recipe.model.name)


def _require_token(hub_model_id: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and the model is to be pushed", where=hub_model_id, advice="unset it")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "there is no token for the Hub, and the model is to be pushed there",
            where=hub_model_id,
            advice="`hf auth login`, or set HF_TOKEN to one that may write; `publish.to` needs none",
        )


def _require_own(folder: Path, shown: str, known: Collection[str]) -> None:
    """A folder that is there already is replaced as a whole, so it may hold no file but the `known` ones."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder", where=shown, advice="choose another `publish.to`")
    foreign = [
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in known
    ]
    if foreign:
        raise UserError(
            f"holds files that were not published there, e.g. {min(foreign).relative_to(folder)}",
            where=shown,
            advice="choose another `publish.to`, or empty it: it is replaced as a whole",
        )


def _published_before(run_folder: Path) -> dict[str, Any]:
    record = run_folder / RECORD
    return dict(read_json(record)) if record.is_file() else {}


def _names(record: dict[str, Any]) -> list[str]:
    return [file["name"] for file in record.get("files", [])]


def require_whole(run_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run's merged model, if the model is fit to be published.

    Raises:
        UserError: its merge check failed or was not made, or a file is missing or cut short.
    """
    merged, where = run_folder / "merged", without_home(str(run_folder / "merged"))
    redo = "`prefold merge` makes it again"
    record = run_folder / "merge.json"
    result = read_json(record) if record.is_file() else {}
    found, allowed = result.get("relative_difference"), result.get("tolerance")
    if found is None or allowed is None or not (math.isfinite(found) and found <= allowed):
        what = "was not checked" if found is None else f"failed its check: logits differ by {found:.2g} of their size"
        raise UserError(f"the merged model {what}; it is not published", where=where, advice=redo)
    try:
        for file in sorted(fetch(str(merged)).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                opened.keys()
        tokenizer = load_tokenizer(merged)
    except SafetensorError as error:
        raise UserError(f"{file.name} is damaged ({first_line(error)})", where=where, advice=redo) from None
    return tokenizer


# ---- what goes out -----------------------------------------------------------------------------------------------


def planned(run_folder: Path, section: Publish) -> dict[str, Any]:
    """What publishing would do: `files` with `bytes`, and where they would go. GGUF files that are yet to be made have
    sizes to go by."""
    require_whole(run_folder)
    return _outcome(section, items_of(run_folder, section))


def items_of(run_folder: Path, section: Publish) -> list[Item]:
    """Every file with its name there: the model at the root, the adapter beside it in a folder of its own."""
    merged = run_folder / "merged"
    text = render_card(run_folder, tuple(section.what)).encode()
    items = [Item(text, CARD, len(text))]
    if "merged" in section.what:
        items += [_item(file, file.relative_to(merged).as_posix()) for file in _files(merged) if file.name != CARD]
    if "adapter" in section.what:
        items += _adapter_items(run_folder, "" if section.what == ["adapter"] else "adapter/")
    title = title_of(run_folder, section)
    for kind in section.gguf or []:
        file = run_folder / "gguf" / file_name(title, kind)
        items.append(_item(file, file.name) if file.is_file() else Item(None, file.name, expected_bytes(merged, kind)))
    return items


def _adapter_items(run_folder: Path, prefix: str) -> list[Item]:
    """With the tokenizer and its template, which a chat format that was learnt has changed."""
    adapter, merged = run_folder / "adapter", run_folder / "merged"
    own = {file.relative_to(adapter).as_posix(): file for file in _files(adapter)}
    tokenizer = {file.name: file for file in _files(merged) if not any(file.match(name) for name in OF_THE_MODEL)}
    together = {name: file for name, file in {**tokenizer, **own}.items() if name != CARD}
    return [_item(file, prefix + name) for name, file in sorted(together.items())]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _item(file: Path, name: str) -> Item:
    return Item(file, name, file.stat().st_size)


def title_of(run_folder: Path, section: Publish) -> str:
    return section.hub_model_id.rpartition("/")[2] if section.hub_model_id else run_folder.resolve().name


def _outcome(section: Publish, items: Sequence[Item]) -> dict[str, Any]:
    return {
        "hub_model_id": section.hub_model_id,
        "folder": section.to and without_home(section.to),
        "files": [{"name": item.name, "bytes": item.size} for item in items],
    }


# ---- publishing --------------------------------------------------------------------------------------------------


def publish_run(run_folder: Path, section: Publish) -> None:
    """Publish what the section says and leave `publish.json`.

    Raises:
        UserError: see `require_whole` and `push`; or the folder cannot be written to.
        StageError: the connection broke, or a GGUF file is not the model.
    """
    if section.hub_model_id:
        _require_token(section.hub_model_id)
    tokenizer = require_whole(run_folder)
    checks = []
    if section.gguf:
        title, texts = title_of(run_folder, section), compared_texts(run_folder, tokenizer)
        checks = export_gguf(run_folder / "merged", run_folder / "gguf", title, section.gguf, texts)
    write_card(run_folder)
    items = items_of(run_folder, section)
    outcome, before = {**_outcome(section, items), "gguf": checks}, _published_before(run_folder)
    if section.to:
        copy_to(Path(section.to).expanduser(), section.to, items, _names(before))
    if section.hub_model_id:
        outcome |= push(section, items, message_of(run_folder), before)
    write_json(run_folder / RECORD, outcome)


def compared_texts(run_folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts with the model's own answers, as it reads them."""
    samples = run_folder / "samples.jsonl"
    texts = []
    for row in (read_jsonl(samples) if samples.is_file() else [])[:COMPARED]:
        answered = [*row["prompt"], {"role": "assistant", "content": row["after"][0]}]
        if tokenizer.chat_template:
            texts.append(str(tokenizer.apply_chat_template(answered, tokenize=False)))
        else:
            texts.append("".join(message["content"] for message in answered))
    kept = [text[:LONGEST] for text in texts if text.strip()]
    return kept or ["Why is the sky blue?\n\nAir scatters blue light more than red: about 5.5 times as much."]


def copy_to(folder: Path, shown: str, items: Sequence[Item], before: Sequence[str]) -> None:
    """Put the files into a folder, which appears when it is whole.

    Args:
        before: names of what was published there earlier, which may be replaced.

    Raises:
        UserError: it holds other files, or cannot be written to.
    """
    _require_own(folder, shown, {*before, *(item.name for item in items)})
    say(f"  to {without_home(shown)}")
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
                advance(1, item.name)
    except OSError as error:
        advice = "free some space, or choose another `publish.to`"
        raise UserError(f"cannot be written to ({error.strerror})", where=shown, advice=advice) from None


# ---- the Hub -----------------------------------------------------------------------------------------------------


def push(section: Publish, items: Sequence[Item], message: str, before: dict[str, Any]) -> dict[str, Any]:
    """Push the files in one commit, and say where they are.

    Args:
        message: of the commit, unless the section has one.
        before: what an earlier push left: its pull request is gone on with while it is open.

    Raises:
        UserError: the token may not write there, or the repository is public and must not be.
        StageError: the connection broke, or the Hub refused what was sent.
    """
    assert section.hub_model_id
    name, api = section.hub_model_id, HfApi(library_name="prefold", library_version=version("prefold"))
    say(f"  to {name} on the Hub")
    with _explained(name), _quiet_client():
        api.create_repo(name, private=section.private, exist_ok=True)
        _require_private(api, section)
        if section.branch:
            api.create_branch(name, branch=section.branch, exist_ok=True)
        pull_request = _open_pull_request(api, section, before)
        revision = pull_request or section.branch
        commit = api.create_commit(
            name,
            [*_additions(items), *_stale(api, name, revision, items)],
            commit_message=section.commit_message or message,
            revision=revision,
            create_pr=section.create_pr and pull_request is None,
        )
    pull_request = commit.pr_revision or pull_request
    if pull_request:
        say(f"  pull request {pull_request.rpartition('/')[2]}")
    return {"commit": commit.oid, "branch": section.branch, "pull_request": pull_request}


def push_checkpoint(recipe: RecipeBase, checkpoint: Path) -> None:
    """Push the weights of a checkpoint, without what training goes on from, in one commit of a branch of their own.

    Raises:
        UserError, StageError: see `push`.
    """
    own = {"branch": CHECKPOINTS, "create_pr": False, "commit_message": None}
    section = require_section(recipe).model_copy(update=own)
    with tempfile.TemporaryDirectory() as aside:
        tokenizer_of(recipe.model).save_pretrained(aside)
        weights = [file for file in _files(checkpoint) if any(file.match(name) for name in OF_A_CHECKPOINT)]
        items = [_item(file, file.name) for file in [*weights, *_files(Path(aside))]]
        push(section, items, f"Step {checkpoint.name.removeprefix('checkpoint-')}", {})


def message_of(run_folder: Path) -> str:
    run = read_run(run_folder)
    return f"{run.method.upper()} of {last_part(run.model)}, by prefold {version('prefold')}"


def _additions(items: Sequence[Item]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(item.name, item.source) for item in items if item.source is not None]


def _stale(api: HfApi, name: str, revision: str | None, items: Sequence[Item]) -> list[CommitOperationDelete]:
    """Weight files there that are not among the new ones: transformers could take them for the model's."""
    kept = {item.name for item in items}
    there = [Path(file) for file in api.list_repo_files(name, revision=revision)]
    stale = [file for file in there if any(file.match(pattern) for pattern in WEIGHTS)]
    return [CommitOperationDelete(file.as_posix()) for file in stale if file.as_posix() not in kept]


def _require_private(api: HfApi, section: Publish) -> None:
    assert section.hub_model_id
    if section.private and not api.model_info(section.hub_model_id).private:
        raise UserError(
            "is public, and the recipe has `publish.private: true`; nothing was sent",
            where=section.hub_model_id,
            advice="set `publish.private: false`, make the repository private, or name another",
        )


def _open_pull_request(api: HfApi, section: Publish, before: dict[str, Any]) -> str | None:
    """The pull request of an earlier push there, if it is still open."""
    reference = before.get("pull_request")
    if not (section.create_pr and reference and before.get("hub_model_id") == section.hub_model_id):
        return None
    assert section.hub_model_id
    found = api.get_repo_discussions(section.hub_model_id, discussion_type="pull_request")
    there = any(one.git_reference == reference and one.status in ("open", "draft") for one in found)
    return str(reference) if there else None


@contextmanager
def _quiet_client() -> Iterator[None]:
    """The client's bars on a terminal only, and none of its advice."""
    logger, hidden = logging.getLogger("huggingface_hub"), are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if not hidden:
            enable_progress_bars()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One message for what keeps the Hub from taking the files. Its client's own texts hold addresses."""
    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        # The client wraps what goes wrong with a single large file.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise _refusal(name, reason) from None


def _refusal(name: str, reason: BaseException) -> UserError | StageError:
    again = "`prefold publish` goes on from there"
    if isinstance(reason, errors.HfHubHTTPError):
        status = reason.response.status_code
        if status in (401, 403, 404):
            return UserError(
                f"the Hub lets nobody write there with this token (HTTP {status})",
                where=name,
                expected="a token with the right to write, of somebody who may write to that name",
                advice="check `publish.hub_model_id`; `hf auth login`, or set HF_TOKEN",
            )
        return StageError(f"{name}: the Hub refused it (HTTP {status}); {again} when that is mended")
    if isinstance(reason, httpx2.HTTPError | ConnectionError | TimeoutError):
        return StageError(f"{name}: the connection to the Hub broke ({type(reason).__name__}); {again}")
    return StageError(f"{name}: the push failed: {first_line(reason)}")
