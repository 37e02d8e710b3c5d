"""Prepared data cached on disk, so that later stages and commands need not tokenize them again.

An entry is a folder, named by a digest of everything that decides its content: the settings, the contents of the files
(of a Hub data set, what was downloaded), the tokenizer with its template, and the code that prepares. It is written
whole or not at all. Several processes may write the same entry at once, and an entry that is removed while it is being
read stays readable.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from prefold.data.chat import require_chat_template
from prefold.data.decisions import read_decisions
from prefold.data.examples import Examples
from prefold.data.findings import DataReport
from prefold.data.mixture import Prepared, load_split
from prefold.data.shapes import Kind
from prefold.data.sources import identity_of
from prefold.data.templates import DATE, keywords_of
from prefold.files import cache_folder, new_folder, remove_left_over
from prefold.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT = 20 * 2**30
"""Bytes of all entries; beyond that, the least recently used are removed."""

_FACTS = TypeAdapter(tuple[DataReport, dict[str, str]])
"""The parts of `Prepared` that are not examples: the report and the fingerprints."""


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, kind: Kind = "pairs") -> Prepared:
    """The result of `load_split`, from the cache if it is there. Raises the same errors."""
    if data.template == "chat":
        require_chat_template(tokenizer)
    sources = _identities(data)
    key = key_of_data(data, tokenizer, seed, kind, sources)
    if key is None:
        return load_split(data, tokenizer, seed, kind)
    folder = cache_folder() / "data" / key
    with suppress(OSError, ValueError, EOFError):
        return _opened(folder, data)
    prepared = None
    try:
        with new_folder(folder) as aside:
            prepared = load_split(data, tokenizer, seed, kind, aside)
            np.save(aside / "train.npy", prepared.train.order)
            np.save(aside / "held_out.npy", prepared.held_out.order)
            (aside / "facts.json").write_bytes(_FACTS.dump_json((prepared.report, prepared.fingerprints)))
            if _identities(data) != sources:
                raise OSError("a source has changed while it was read")
        _remove_old(folder)
    except OSError:  # also: no space, a cache that cannot be written to, another process that was faster
        prepared = prepared or load_split(data, tokenizer, seed, kind)
    return prepared


def _opened(folder: Path, data: Data) -> Prepared:
    """Raises OSError, ValueError or EOFError: there is no sound entry."""
    report, fingerprints = _FACTS.validate_json((folder / "facts.json").read_bytes())
    train = Examples.open(folder / "train.arrow")
    held_out = Examples.open(folder / "eval.arrow") if data.eval else train
    train, held_out = train.select(np.load(folder / "train.npy")), held_out.select(np.load(folder / "held_out.npy"))
    os.utime(folder)
    return Prepared(train, held_out, report, fingerprints)


def _remove_old(newest: Path) -> None:
    remove_left_over(newest.parent)
    with suppress(OSError):  # another process may be removing them too
        entries = {path: path.stat().st_mtime for path in newest.parent.glob("[!.]*") if path != newest}
        total = _size(newest)
        for path in sorted(entries, key=entries.__getitem__, reverse=True):
            total += _size(path)
            if total > LIMIT:
                shutil.rmtree(path)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _identities(data: Data) -> list[str | None]:
    """What identifies the sources and the decisions about their rows; None where only reading a source can tell."""
    decided = repr(read_decisions(Path(data.decisions).expanduser())) if data.decisions else ""
    return [hashlib.sha256(decided.encode()).hexdigest()] + [
        identity_of(source) for source in (*data.decontaminate, *data.train, *data.eval)
    ]


def key_of_data(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, kind: Kind, sources: list[str | None] | None = None
) -> str | None:
    """A digest of everything that decides what `prepare` returns; None if that is not known, or the tokenizer has no
    backend whose state could be digested. `sources`: their identities, if known. Raises UserError: a source does not
    exist."""
    sources = sources or _identities(data)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or None in sources:
        return None
    # These are set by each call of the tokenizer, and decide nothing here.
    backend.no_padding()
    backend.no_truncation()
    ids = hashlib.sha256(backend.to_str().encode()).hexdigest()
    template, keywords = json.dumps(tokenizer.chat_template), keywords_of(tokenizer)
    has_date = DATE in template and DATE not in keywords
    parts = {
        "code": _code(),
        "data": data.model_dump(mode="json"),
        "sources": sources,
        "seed": seed,
        "kind": kind,
        "tokenizer": [type(tokenizer).__name__, ids, tokenizer.special_tokens_map],
        "decoding": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "template": [template, keywords, date.today().isoformat() if has_date else None],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def _code() -> Any:
    """The code that makes tokens of rows: a digest of this package, and versions of the libraries that it calls."""
    contents = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(contents)).hexdigest(), *map(version, ("transformers", "tokenizers", "jinja2"))
