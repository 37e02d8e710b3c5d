"""Supervised fine-tuning: tokens of the chosen completions count, all the same."""

from __future__ import annotations

import pytest
import torch
from preference_batches import logprobs, metric_means, step_loss

from prefold.algorithms.sft import SFT
from prefold.trees.packing import TokenTree


def test_numbers_by_hand() -> None:
    """Chosen completions of 1 and 3 tokens, 2 and 6 nats in all: 8 / 4 per token. A mean of means would be 2, too, for
    equal rates; with 2 and 12 nats it is 14 / 4."""
    tokens = torch.tensor([-2.0, -9.0, -9.0, -4.0, -4.0, -4.0, -9.0], requires_grad=True)
    policy = logprobs(tokens, [1, 2, 3, 1])
    trees = [TokenTree((1, 2), ((3,), (3, 3))), TokenTree((1,), ((3, 3, 3), (3,)))]
    output = SFT().loss(policy, None)
    loss = step_loss(output, SFT(), trees)
    assert SFT().units(trees) == {"chosen_tokens": 4}
    assert loss.item() == pytest.approx(14 / 4)
    loss.backward()
    assert tokens.grad is not None and tokens.grad.tolist() == [-0.25, 0, 0, -0.25, -0.25, -0.25, 0]
    assert metric_means(output) == pytest.approx({"nll_loss": 3.5, "logps/chosen": -7.0, "logps/rejected": -13.5})
    with_context = [
        TokenTree((1, 2), ((3, 9), (3, 3)), (((1, 2),), ())),
        TokenTree((1,), ((9, 3, 3, 9, 3), (3,)), (((0, 1), (3, 4)), ())),
    ]
    assert SFT().units(with_context) == {"chosen_tokens": 4}
