"""Records that repeat earlier ones, and records that contain text of a benchmark.

Near repeats and benchmark texts are compared by runs of consecutive words: lower case, without punctuation; each
Chinese or Japanese character is a word. A word is a 64-bit hash and a run a polynomial of its hashes, so that the runs
of a text are an array `[runs]` of uint64. Two different runs share a hash about once in 1e19 comparisons, which is
ignored.

Near repeats follow A. Broder, "On the resemblance and containment of documents" (1997), with banding: only records
that agree in a band of minimum hashes are compared, and then exactly.

Data in: the parts of a record (prompt, chosen, rejected), each a list of messages; data out: the row that it repeats,
or the benchmark text that it contains.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from prefold.data.preference import Message, RowId, messages_key, texts_of

Runs = NDArray[np.uint64]
Parts = Sequence[Sequence[Message]]

SHINGLE_WORDS = 5
NEAR = 0.8
"""Jaccard similarity, runs in both texts over runs in either, from which texts are near repeats."""
BENCHMARK_WORDS = 13
WHOLE_MESSAGE_WORDS = 5
"""A benchmark text of fewer words must be a whole message: too many contain "what is it"."""

# 24 bands of 2 hashes per part: records whose three parts each have just the similarity `NEAR` agree in some band
# with probability 1 - (1 - 0.8**6)**24 > 0.999.
_BANDS, _HASHES = 24, 2
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words of a text; the text itself if it has none, such as "?!"."""
    return _WORD.findall(text.lower()) or [text]


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _hashes(words: Iterable[str]) -> Runs:
    return np.fromiter(map(_hash, words), dtype=np.uint64)


def _runs(hashes: Runs, length: int) -> Runs:
    """A hash for every `length` consecutive words, in order; one for all the words if there are fewer."""
    length = min(length, len(hashes))
    runs = np.zeros(len(hashes) - length + 1, dtype=np.uint64)
    for start in range(length):
        runs = runs * _BASE + hashes[start : start + len(runs)]
    return runs


class ExactRepeats:
    """Finds records whose messages are the same as those of an earlier one."""

    def __init__(self) -> None:
        self._rows: dict[str, RowId] = {}

    def earlier(self, parts: Parts, origin: RowId) -> RowId | None:
        """The row that a record repeats; None if it repeats none, and then it is remembered as `origin`."""
        row = self._rows.setdefault(messages_key(*parts), origin)
        return None if row is origin else row


class NearRepeats:
    """Finds records of which every part has a similarity of `NEAR` or more, in runs of `SHINGLE_WORDS` words."""

    def __init__(self) -> None:
        self._seen: list[tuple[RowId, list[Runs]]] = []
        self._bands: dict[bytes, list[int]] = {}
        draw = np.random.default_rng(0)
        factors, offsets = draw.integers(2**64, size=(2, _BANDS * _HASHES, 1), dtype=np.uint64)
        self._factors, self._offsets = factors | np.uint64(1), offsets

    def earlier(self, parts: Parts, origin: RowId) -> RowId | None:
        shingles = [_shingles(part) for part in parts]
        minima = np.stack([(self._factors * part + self._offsets).min(axis=1) for part in shingles])
        bands = minima.reshape(len(parts), _BANDS, _HASHES).swapaxes(0, 1)
        # One key for each band; only records that share a key are compared.
        keys = [bytes([number]) + band.tobytes() for number, band in enumerate(bands)]
        for index in sorted({index for key in keys for index in self._bands.get(key, ())}):
            row, seen = self._seen[index]
            if all(_similarity(*both) >= NEAR for both in zip(shingles, seen, strict=True)):
                return row
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._seen))
        self._seen.append((origin, shingles))
        return None


def _shingles(part: Sequence[Message]) -> Runs:
    text = "\n".join(text for message in part for text in texts_of(message))
    return np.unique(_runs(_hashes(words_of(text)), SHINGLE_WORDS))


def _similarity(first: Runs, second: Runs) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


REPEATS: dict[str, type[ExactRepeats] | type[NearRepeats]] = {"drop_exact": ExactRepeats, "drop_near": NearRepeats}
"""By `data.duplicates`, of which `keep` needs none."""


@dataclass(frozen=True)
class Match:
    """A row that contains text of a benchmark: the row of that text, and the words in common."""

    row: RowId
    benchmark: RowId
    words: str


class Contamination:
    """Finds records that contain `BENCHMARK_WORDS` consecutive words of a benchmark text, or a shorter text whole."""

    def __init__(self, texts: Iterable[tuple[str, RowId]]):
        self._origins: dict[int, RowId] = {}
        known = list(texts)
        of_texts, self._known = _runs_of([text for text, _ in known])
        for runs, (_, origin) in zip(of_texts, known, strict=True):
            for run in runs.tolist():
                self._origins.setdefault(run, origin)

    def find(self, parts: Parts, origin: RowId) -> Match | None:
        """The first match of a record; None if it contains no benchmark text."""
        for message in chain.from_iterable(parts):
            words = words_of("\n".join(texts_of(message)))
            for length, start, run in _hits(words, self._known):
                return Match(origin, self._origins[run], " ".join(words[start : start + length]))
        return None


def overlapping(texts: Sequence[str], records: Iterable[Parts]) -> list[bool]:
    """For each text, whether a record contains `BENCHMARK_WORDS` consecutive words of it, or all of a shorter one."""
    of_texts, known = _runs_of(texts)
    held: set[int] = set()
    for message in chain.from_iterable(chain.from_iterable(records)):
        held.update(run for _, _, run in _hits(words_of("\n".join(texts_of(message))), known))
    return [not held.isdisjoint(runs.tolist()) for runs in of_texts]


def _runs_of(texts: Iterable[str]) -> tuple[list[Runs], dict[int, Runs]]:
    """The runs of each benchmark text; and, by their number of words, the distinct runs of all texts, sorted."""
    of_texts, by_length = [], defaultdict(list)
    for text in texts:
        hashes = _hashes(words_of(text))
        of_texts.append(_runs(hashes, BENCHMARK_WORDS))
        by_length[min(BENCHMARK_WORDS, len(hashes))].append(of_texts[-1])
    return of_texts, {length: np.unique(np.concatenate(by_length[length])) for length in sorted(by_length)}


def _hits(words: Sequence[str], known: Mapping[int, Runs]) -> Iterator[tuple[int, int, int]]:
    """The known runs in a message: (number of words, index of the first word, run)."""
    hashes = _hashes(words)
    for length, of_length in known.items():
        if length <= len(words) and (length >= WHOLE_MESSAGE_WORDS or length == len(words)):
            runs = _runs(hashes, length)
            nearest = np.minimum(np.searchsorted(of_length, runs), len(of_length) - 1)
            for start in np.flatnonzero(of_length[nearest] == runs).tolist():
                yield length, start, int(runs[start])
