"""Files, folders, built-in sets and Hub data sets -> rows. What the columns mean is not known here.

Data in: a `recipe.Rows`; data out: an iterator of `RawRow`. `formats` reads the files, and `vote_file` joins the lines
of a file of votes. Code that comes with a Hub data set is never run.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import Any

from prefold.data.formats import READABLE, RawRow, read_file, reader_for
from prefold.data.preference import RowId
from prefold.data.vote_file import joined_votes
from prefold.errors import UserError, did_you_mean
from prefold.files import digest_of, without_home, without_secrets
from prefold.recipe import Rows

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER: Traversable = resources.files("prefold.data") / "builtin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def source_name(source: Rows) -> str:
    """The name of a source in messages and in the origins of its rows: its path in the resolved recipe, with `name` and
    `split` if they are set. Rows of a folder or glob have the name of their file instead."""
    parts = ", ".join(part for part in (source.name, source.split) if part is not None)
    return without_home(source.path) + (f" ({parts})" if parts else "")


def names_of_rows(source: Rows) -> list[str]:
    """The source names in the origins of the rows. Raises UserError: the source does not exist."""
    return list(named_files(source)) or [source_name(source)]


def read_rows(source: Rows) -> Iterator[RawRow]:
    """Find the source at once, and read its rows lazily. Raises UserError: the source does not exist, or is not in its
    format; what only reading can tell is raised while reading."""
    files = named_files(source)
    if not files:
        return _hub_rows(_load_from_hub(source), source)
    return joined_votes(chain.from_iterable(read_file(file, name) for name, file in files.items()))


def identity_of(source: Rows) -> str | None:
    """A text that changes whenever the rows change; None if only reading them can tell. Raises UserError: the source
    does not exist."""
    files = named_files(source)
    if not files:
        # The fingerprint is that of a commit, configuration and split.
        return None if source.streaming else getattr(_load_from_hub(source), "_fingerprint", None)
    digest = hashlib.sha256()
    try:
        for name, file in files.items():
            digest.update(f"{name}\n{digest_of(Path(str(file)))}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def named_files(source: Rows) -> dict[str, Traversable]:
    """The files of a source by their names in messages; empty if it may be a data set of the Hub."""
    if source.path.startswith(BUILTIN_PREFIX):
        _require_no_hub_fields(source, "a built-in set", ("name", "revision", "streaming"))
        return {source_name(source): _builtin_file(source)}
    files = _files(source)
    if files:
        _require_no_hub_fields(source, "a file", ("name", "split", "revision", "streaming"))
    return {_shown(file): file for file in files}


def _require_no_hub_fields(source: Rows, what: str, names: tuple[str, ...]) -> None:
    for name in names:
        if given := getattr(source, name):
            what = f"{what} has no `{name}`, but `{name}: {given}` is given"
            raise UserError(what, where=source.path, advice=f"remove `{name}`")


def _files(source: Rows) -> list[Path]:
    """The files of a path, folder or glob, sorted; empty if it may be a data set of the Hub. Raises UserError: there is
    no such file, or none that can be read."""
    path = Path(os.path.expanduser(source.path))
    try:
        if path.is_dir():
            files = [file for file in _visible(path) if reader_for(file.name)]
            if not files:
                raise UserError("no file in this folder can be read", where=source.path, expected=READABLE)
            return files
        if path.is_file():
            return [_readable(path, source)]
        if glob.has_magic(source.path):
            matches = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
            if not matches:
                raise UserError("no file matches", where=source.path, expected=READABLE)
            return [_readable(file, source) for file in matches]
        if _HUB_ID.fullmatch(source.path) and not reader_for(path.name) and not path.parent.is_dir():
            return []
        raise _missing(source, path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=source.path) from None


def _readable(path: Path, source: Rows) -> Path:
    if reader_for(path.name) is None:
        ending = f"files that end in `{_printable(path.suffix)}` are not read"
        what = ending if path.suffix else "the file name has no ending"
        where = source.path if path.name == Path(source.path).name else _shown(path)
        raise UserError(what, where=where, expected=READABLE, advice="convert it to .jsonl")
    return path


def _visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _shown(path: Path) -> str:
    """The name of a file in messages."""
    return without_home(_printable(str(path)))


def _printable(name: str) -> str:
    """A file name, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _missing(source: Rows, path: Path) -> UserError:
    if path.exists():
        return UserError("it is no regular file", where=source.path, advice="write the rows to a file first")
    if path.is_symlink():
        return UserError("it is a link that leads nowhere", where=source.path, advice="mend the link")
    if not path.parent.is_dir():
        advice = "check the path, which starts where prefold was called"
        return UserError("no such file: its folder does not exist either", where=source.path, advice=advice)
    advice = did_you_mean(path.name, [_printable(file.name) for file in path.parent.iterdir()], most=3)
    if not advice:
        names = [_printable(file.name) for file in _visible(path.parent) if reader_for(file.name)]
        advice = f"readable files in that folder: {_listed(names)}"
        if not names:
            advice = "check the path, which starts where prefold was called: that folder has no file that can be read"
    return UserError("no such file", where=source.path, advice=advice)


def _builtin_file(source: Rows) -> Traversable:
    name, split = source.path.removeprefix(BUILTIN_PREFIX), source.split or "train"
    sets = {entry.name: entry for entry in _entries(BUILTIN_FOLDER) if entry.is_dir() and _entries(entry)}
    _require_one_of(name, sorted(sets), f"there is no built-in set `{name}`", source)
    files = {entry.name.removesuffix(".jsonl"): entry for entry in _entries(sets[name])}
    _require_one_of(split, sorted(files), f"it has no split `{split}`", source)
    return files[split]


def _require_one_of(name: str, known: list[str], what: str, source: Rows) -> None:
    if name not in known:
        expected = f"one of: {_listed(known)}" if known else ""
        raise UserError(what, where=source.path, expected=expected, advice=did_you_mean(name, known))


def _entries(folder: Traversable) -> list[Traversable]:
    """The subfolders and .jsonl files of a package folder; none if it does not exist."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if entry.is_dir() or entry.name.endswith(".jsonl")]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def _hub_rows(loaded: Iterable[dict[str, Any]], source: Rows) -> Iterator[RawRow]:
    """A row's number is its position in the split, from 1."""
    with _explained(source):
        for number, value in enumerate(loaded, start=1):
            yield RawRow(RowId(source_name(source), number), value, pads_with_nulls=True)


def _load_from_hub(source: Rows) -> Any:
    """Download the data set, or load it from the cache."""
    import datasets

    with _explained(source):
        settings = source.model_dump(include={"name", "revision", "streaming"})
        return datasets.load_dataset(source.path, split=source.split or "train", **settings)


@contextmanager
def _explained(source: Rows) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = without_secrets(str(error).partition("\n")[0])
        what = f"no such file, and the data set cannot be had from the Hub: {reason or type(error).__name__}"
        advice = "check `path`, `name`, `split` and `revision`, and the network; gated sets need `HF_TOKEN`"
        raise UserError(what, where=source_name(source), advice=advice) from None
