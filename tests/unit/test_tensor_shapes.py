"""The shapes of the tensors that pass from one folder to the next are checked while tests run (see `conftest.py`)."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch

from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree, pack

COMPLETION, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([2, 1])


@pytest.mark.parametrize(
    ("tokens", "completion", "lengths"),
    [
        (torch.zeros(2), COMPLETION, LENGTHS),
        (torch.zeros(3, 1), COMPLETION, LENGTHS),
        (torch.zeros(3), COMPLETION.double(), LENGTHS),
        (torch.zeros(3), COMPLETION, torch.tensor(2)),
    ],
)
def test_log_probs_that_do_not_fit_together(
    tokens: torch.Tensor, completion: torch.Tensor, lengths: torch.Tensor
) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        TreeLogprobs(tokens, completion, lengths)


def test_a_row_that_does_not_fit_together() -> None:
    row = pack([TokenTree((1, 2), ((3, 4), (5,)))])
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(row, positions=row.positions[:, 1:])
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(row, targets=row.targets[1:])
