"""ORPO against numbers derived by hand, and its odds at the ends of the scale."""

from __future__ import annotations

import math

import pytest
import torch
from preference_batches import logprobs, metric_means, step_loss

from prefold.algorithms.orpo import ORPO, log1mexp, log_odds_ratio
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree

TREES = [TokenTree((1, 2, 3), ((4, 4), (4,)))]


def pair() -> TreeLogprobs:
    """Chosen: two tokens of probability 1/2 and 1/8, geometric mean 1/4. Rejected: one of 1/5. Prompt: two scored
    tokens of 3 nats together."""
    tokens = torch.tensor([1 / 2, 1 / 8, 1 / 5], dtype=torch.float64).log().requires_grad_()
    prompts = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    return logprobs(tokens, [2, 1], prompts=prompts, prompt_lengths=torch.tensor([2]))


def test_numbers_by_hand() -> None:
    """Odds 1/3 and 1/4, ratio 4/3: -ln s(ln(4/3)) = ln(1 + 3/4). Negative log-likelihood: (ln 16 + 3) / 4 over the two
    scored tokens of the prompt and the two of the chosen completion."""
    algorithm = ORPO(beta=0.5)
    output = algorithm.loss(pair(), None)
    nll = (math.log(16) + 3) / 4
    assert algorithm.units(TREES) == {"pairs": 1, "conversation_tokens": 4}
    assert step_loss(output, algorithm, TREES).item() == pytest.approx(nll + 0.5 * math.log(1.75))
    with_context = [TokenTree((1, 2, 3), ((4, 9, 9, 4), (4, 9)), (((1, 3),), ((1, 2),)))]
    assert algorithm.units(with_context) == {"pairs": 1, "conversation_tokens": 4}
    assert metric_means(output) == pytest.approx(
        {
            "nll_loss": nll,
            "log_odds_ratio": -math.log(1.75),
            "log_odds_chosen": math.log(4 / 3),
            "rewards/chosen": -0.5 * math.log(4),
            "rewards/rejected": -0.5 * math.log(5),
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.5 * math.log(5 / 4),
            "logps/chosen": -math.log(4),
            "logps/rejected": -math.log(5),
        }
    )


def test_completion_only() -> None:
    algorithm = ORPO(beta=0.5, completion_only_loss=True)
    assert ORPO().scores_prompt and not algorithm.scores_prompt
    assert algorithm.units(TREES) == {"pairs": 1, "chosen_tokens": 2}
    loss = step_loss(algorithm.loss(pair(), None), algorithm, TREES)
    assert loss.item() == pytest.approx(math.log(16) / 2 + 0.5 * math.log(1.75))


def test_gradient_by_hand() -> None:
    """d log odds / d log p = 1 / (1 - p): 4/3 and 5/4. The loss of the odds falls by s(-ln(4/3)) = 3/7 of that, times
    beta, shared by the tokens of the mean; the supervised loss takes 1/4 of each token it covers."""
    policy = pair()
    step_loss(ORPO(beta=0.5).loss(policy, None), ORPO(), TREES).backward()
    chosen = -1 / 4 - 0.5 * 3 / 7 * (4 / 3) / 2
    assert policy.tokens.grad is not None and policy.prompts is not None and policy.prompts.grad is not None
    assert policy.tokens.grad.tolist() == pytest.approx([chosen, chosen, 0.5 * 3 / 7 * 5 / 4])
    assert policy.prompts.grad.item() == -0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp(dtype: torch.dtype) -> None:
    """Against numbers computed with Python's own expm1 and log1p; near 0 it is ln(-x), far from it -e^x."""
    x = torch.tensor([-1e3, -100.0, -20.0, -0.7, -0.69, -1e-3, -1e-6, -1e-20], dtype=dtype)
    wanted = [math.log(-math.expm1(value)) if value > -1 else math.log1p(-math.exp(value)) for value in x.tolist()]
    torch.testing.assert_close(log1mexp(x), torch.tensor(wanted, dtype=dtype))
    assert log1mexp(x)[2] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_at_the_ends(dtype: torch.dtype) -> None:
    """Certain completions (0, or next to it) and impossible ones, on either side."""
    ends = torch.tensor([0.0, -1e-38, -1e-30, -1e-7, -1.0, -1e3, -1e30], dtype=dtype)
    grid = torch.cartesian_prod(ends, ends).requires_grad_()
    log_odds = log_odds_ratio(*grid.unbind(1))
    (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(log_odds).sum(), grid)
    assert log_odds.isfinite().all() and gradient.isfinite().all()
    assert (gradient[:, 0] <= 0).all() and (gradient[:, 1] >= 0).all()


def test_equal_odds() -> None:
    same = torch.tensor([-1e3, -2.0, -1e-6, 0.0])
    assert log_odds_ratio(same, same).tolist() == [0.0] * 4
