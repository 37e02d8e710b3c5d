"""Log-probs of the reference: each tree is scored once, and what is kept is whole, for all runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense import dense_logprobs
from families import family
from tiny import random_trees, with_lora
from torch import Tensor

from prefold.trees import reference as references
from prefold.trees.packing import TokenTree
from prefold.trees.reference import Reference
from prefold.trees.scorer import Scorer, reference_model

TREES = random_trees(8, seed=4)


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(with_lora(family("llama")), 64, "prefold_joined")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[TokenTree]:
    """The trees that are scored from now on."""
    trees: list[TokenTree] = []
    compute = references.compute_reference

    def counting(scorer: Scorer, given: list[TokenTree], dtype: torch.dtype) -> list[Tensor]:
        trees.extend(given)
        return compute(scorer, given, dtype)

    monkeypatch.setattr(references, "compute_reference", counting)
    return trees


def same(found: dict[int, Tensor], scorer: Scorer) -> None:
    with torch.no_grad(), reference_model(scorer.model):
        for i, tokens in found.items():
            torch.testing.assert_close(tokens, dense_logprobs(scorer.model, [TREES[i]]), rtol=1e-5, atol=1e-5)


def files(cache: Path) -> list[Path]:
    return [*(cache / "reference").iterdir()]


def test_a_tree_is_scored_when_it_is_first_asked_for(scorer: Scorer, tmp_path: Path, scored: list[TokenTree]) -> None:
    reference = Reference(scorer, TREES, tmp_path)
    first = reference.of([5, 2])
    assert list(first) == [5, 2] and scored == [TREES[5], TREES[2]]
    again = reference.of([2, 7, 5])
    assert scored == [TREES[5], TREES[2], TREES[7]]
    assert torch.equal(again[5], first[5]) and torch.equal(again[2], first[2])
    same(again, scorer)
    assert Reference(scorer, [TREES[1], TREES[1]], tmp_path).of([0, 1]).keys() == {0, 1}
    assert scored[3:] == [TREES[1]]  # equal trees once


def test_later_runs_read_what_was_kept(scorer: Scorer, tmp_path: Path, scored: list[TokenTree]) -> None:
    first = Reference(scorer, TREES, tmp_path)
    wanted = first.of([5, 2])
    first.keep()
    wanted |= first.of([0, 1])
    first.keep()
    first.keep()
    assert len(files(tmp_path)) == 2
    # In another order, as of another seed.
    other = Reference(scorer, TREES[::-1], tmp_path)
    found = other.of([7, 6, 5, 2])
    assert len(scored) == 4
    assert all(torch.equal(found[7 - i], tokens) for i, tokens in wanted.items())
    with torch.no_grad():
        next(scorer.model.parameters()).mul_(2)
    Reference(scorer, TREES, tmp_path).of([5])
    assert len(scored) == 5


def test_runs_side_by_side(scorer: Scorer, tmp_path: Path, scored: list[TokenTree]) -> None:
    runs = [Reference(scorer, TREES, tmp_path) for _ in range(3)]
    for run, indices in zip(runs, ([0, 1], [1, 2], [0, 1]), strict=True):
        run.of(indices)
    for run in runs:
        run.keep()
    scored.clear()
    same(Reference(scorer, TREES, tmp_path).of([0, 1, 2]), scorer)
    assert not scored


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, emptied, Path.unlink])
def test_what_is_broken_is_scored_again(
    damage: Callable[[Path], None], scorer: Scorer, tmp_path: Path, scored: list[TokenTree]
) -> None:
    first = Reference(scorer, TREES, tmp_path)
    wanted = first.of([3, 4])
    first.keep()
    reading = Reference(scorer, TREES, tmp_path)
    [file] = files(tmp_path)
    damage(file)
    for reference in (reading, Reference(scorer, TREES, tmp_path)):
        scored.clear()
        found = reference.of([3, 4])
        assert len(scored) == 2 and all(torch.equal(found[i], wanted[i]) for i in (3, 4))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_a_write_that_ends_early_leaves_nothing(
    error: BaseException,
    scorer: Scorer,
    tmp_path: Path,
    scored: list[TokenTree],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reference = Reference(scorer, TREES, tmp_path)
    wanted = reference.of([3, 4])

    def ended(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(references, "save_file", ended)
        if isinstance(error, OSError):
            reference.keep()
            assert "not kept for later runs: No space left" in caplog.text
        else:
            with pytest.raises(KeyboardInterrupt):
                reference.keep()
    assert not files(tmp_path)
    assert torch.equal(reference.of([3])[3], wanted[3]) and len(scored) == 2
    reference.keep()
    assert torch.equal(Reference(scorer, TREES, tmp_path).of([4])[4], wanted[4]) and len(scored) == 2
