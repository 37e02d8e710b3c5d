"""Push files to a repository of the Hub, by the Hub's own client.

A push is one commit, so that a repository never holds half a model; what was uploaded before a connection broke is not
sent again. The token is left to the client: no value that could be written down ever holds it.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from prefold.errors import StageError, UserError, first_line
from prefold.models.tokenizer import tokenizer_of
from prefold.publishing.files import WEIGHTS, Item, checkpoint_items
from prefold.recipe import Publish, RecipeBase
from prefold.terminal import say

CHECKPOINTS = "checkpoints"
"""The branch that checkpoints are pushed to."""


def require_token(hub_model_id: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and the model is to be pushed", where=hub_model_id, advice="unset it")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "there is no token for the Hub, and the model is to be pushed there",
            where=hub_model_id,
            advice="`hf auth login`, or set HF_TOKEN to one that may write; `publish.to` needs none",
        )


def push(section: Publish, items: Sequence[Item], message: str, before: dict[str, Any]) -> dict[str, Any]:
    """Push the files in one commit, with this message unless the section has one. Returns `commit`, `branch` and
    `pull_request`. `before`: the record of an earlier push, whose pull request is added to while it is open.

    Raises:
        UserError: the token may not write there, or the repository is public and must not be.
        StageError: the connection broke, or the Hub refused what was sent.
    """
    assert section.hub_model_id
    name, api = section.hub_model_id, HfApi(library_name="prefold", library_version=version("prefold"))
    say(f"  to {name} on the Hub")
    with _explained(name), _quiet_client():
        api.create_repo(name, private=section.private, exist_ok=True)
        if section.private and not api.model_info(name).private:
            what = "is public, and the recipe has `publish.private: true`; nothing was sent"
            advice = "set `publish.private: false`, make the repository private, or name another"
            raise UserError(what, where=name, advice=advice)
        if section.branch:
            api.create_branch(name, branch=section.branch, exist_ok=True)
        pull_request = _open_pull_request(api, name, before) if section.create_pr else None
        revision = pull_request or section.branch
        added = [CommitOperationAdd(item.name, item.source) for item in items if item.source is not None]
        commit = api.create_commit(
            name,
            [*added, *_stale(api, name, revision, items)],
            commit_message=section.commit_message or message,
            revision=revision,
            create_pr=section.create_pr and pull_request is None,
        )
    pull_request = commit.pr_revision or pull_request
    if pull_request:
        say(f"  pull request {pull_request.rpartition('/')[2]}")
    return {"commit": commit.oid, "branch": section.branch, "pull_request": pull_request}


def push_checkpoint(recipe: RecipeBase, checkpoint: Path) -> None:
    """Push the weights of a checkpoint in one commit to the branch `checkpoints`. Errors are those of `push`."""
    assert recipe.publish
    section = recipe.publish.model_copy(update={"branch": CHECKPOINTS, "create_pr": False, "commit_message": None})
    with tempfile.TemporaryDirectory() as aside:
        tokenizer_of(recipe.model).save_pretrained(aside)
        message = f"Step {checkpoint.name.removeprefix('checkpoint-')}"
        push(section, checkpoint_items(checkpoint, Path(aside)), message, {})


def _stale(api: HfApi, name: str, revision: str | None, items: Sequence[Item]) -> list[CommitOperationDelete]:
    """Deletions of the repository's weight files that are not among the new ones: transformers could load those."""
    kept = {item.name for item in items}
    files = [Path(file) for file in api.list_repo_files(name, revision=revision)]
    stale = [file for file in files if any(file.match(pattern) for pattern in WEIGHTS)]
    return [CommitOperationDelete(file.as_posix()) for file in stale if file.as_posix() not in kept]


def _open_pull_request(api: HfApi, name: str, before: dict[str, Any]) -> str | None:
    """The pull request of an earlier push to this repository, if it is still open."""
    reference = before.get("pull_request")
    if not reference or before.get("hub_model_id") != name:
        return None
    requests = api.get_repo_discussions(name, discussion_type="pull_request")
    is_open = any(request.git_reference == reference and request.status in ("open", "draft") for request in requests)
    return str(reference) if is_open else None


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Show the client's progress bars on a terminal only, and hide its warnings."""
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
    """Turn errors of the Hub's client, whose texts contain addresses, into one message."""
    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        # The client wraps errors with a single large file.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise _refusal(name, reason) from None


def _refusal(name: str, reason: BaseException) -> UserError | StageError:
    again = "`prefold publish` continues from there"
    if isinstance(reason, errors.HfHubHTTPError):
        status = reason.response.status_code
        if status in (401, 403, 404):
            what = f"the Hub does not let this token write there (HTTP {status})"
            expected = "a write token of an account that may write to this repository"
            advice = "check `publish.hub_model_id`; `hf auth login`, or set HF_TOKEN"
            return UserError(what, where=name, expected=expected, advice=advice)
        return StageError(f"{name}: the Hub refused it (HTTP {status}); {again} once that is fixed")
    if isinstance(reason, httpx2.HTTPError | ConnectionError | TimeoutError):
        return StageError(f"{name}: the connection to the Hub broke ({type(reason).__name__}); {again}")
    return StageError(f"{name}: the push failed: {first_line(reason)}")
