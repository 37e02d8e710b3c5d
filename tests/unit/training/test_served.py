"""Every lie of a server is named within a step, and at the start; what is true is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from json_server import running
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import save_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import VllmServer

from prefold.errors import UserError
from prefold.generation import servers
from prefold.generation.sampling import Sampling
from prefold.generation.servers import Servers
from prefold.recipe import Generation
from prefold.training.served import ServedCompletions, trained_weights
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import choose_scorer

SAMPLING = Sampling(12, 4, temperature=1.0)
PROMPTS = [tuple(range(start, start + 9 + start)) for start in (3, 5, 6)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "WAITS", (0.01,) * len(servers.WAITS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twelfth of its tokens ends a completion."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "ending", ends=tuple(range(0, 250, 12)))


@pytest.fixture
def server(ending_model: Path) -> Iterator[VllmServer]:
    with running(VllmServer(ending_model)) as server:
        yield server


class Training:
    """A policy that changes from step to step."""

    def __init__(self, folder: Path, served_from: list[VllmServer], adapters: Path, sampling: Sampling):
        torch.manual_seed(0)
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        scorer = choose_scorer(self.model.eval(), [TokenTree(prompt, ((1, 2), (3,))) for prompt in PROMPTS], 4096)
        section = Generation(engine="vllm", urls=[server.address for server in served_from])
        self.served = ServedCompletions(
            Servers(section, tokenizer), scorer, tokenizer, sampling, adapters / "served", "run"
        )

    @torch.no_grad()
    def step(self, number: int) -> Any:
        torch.manual_seed(number)
        for name, weight in self.model.named_parameters():
            if "lora_B" in name and number:
                weight += 0.05 * torch.randn_like(weight)
        return self.served(number, PROMPTS)


def refusal(training: Training, step: int) -> str:
    with pytest.raises(UserError) as caught:
        training.step(step)
    return str(caught.value)


LIES = {
    "base": "they are those of the base model, without the adapter",
    "stale": "they are those of the step before",
    "other base": "it has other weights",
    "forgets": "no longer has the adapter that it was given",
    "says base": "answers as `base` where `run-",
    "truncates": "truncates prompts, or reads others",
    "truncates in secret": "reads or draws otherwise than it says",
    "foreign": "draws tokens that the model does not have",
    "temperature": "it ignores these settings",
    "raw": "start it with `--logprobs-mode processed_logprobs`",
    "greedy": "does not sample as requested",
    "top_p": "ignores `top_p`",
    "top_k": "ignores `top_k`",
    "max_tokens": "ignores `max_tokens`: 1",
    "n": "ignores `n`: 3 completions where 4 were asked for",
    "twice": "ignores `n`: 8 completions",
    "stop": "ignores `stop_token_ids`",
    "half": "log-probs for",
}
TOLD = {
    "temperature": Sampling(12, 4, temperature=0.7),
    "raw": Sampling(12, 4, temperature=0.7),
    "top_p": Sampling(12, 4, temperature=1.0, top_p=0.6),
    "top_k": Sampling(12, 4, temperature=1.0, top_k=20),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_named_within_a_step(ending_model: Path, server: VllmServer, tmp_path: Path, lie: str) -> None:
    """Told from the third step on, whose adapter is the fourth after that of random weights."""
    training = Training(ending_model, [server], tmp_path, TOLD.get(lie, SAMPLING))
    training.step(0)
    training.step(1)
    server.lie = lie
    message = refusal(training, 2)
    assert server.address in message and LIES[lie] in message
    assert "nats" not in message or "step 3" in message


@pytest.mark.parametrize("lie", [*LIES, "tokenizer"])
def test_each_lie_is_named_at_the_start(ending_model: Path, server: VllmServer, tmp_path: Path, lie: str) -> None:
    """Of adapters, that of random weights is the first one; the lie of an old one begins with the next."""
    server.lie, server.lies_from = lie, 1 if lie in ("base", "stale", "forgets", "says base") else 0
    with pytest.raises(UserError) as caught:
        Training(ending_model, [server], tmp_path, TOLD.get(lie, SAMPLING)).step(0)
    assert server.address in str(caught.value)


@pytest.mark.parametrize("sampling", [SAMPLING, *TOLD.values(), Sampling(12, 4, temperature=1.0, min_p=0.05)], ids=str)
def test_a_true_server_is_believed(
    ending_model: Path, server: VllmServer, tmp_path: Path, sampling: Sampling, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(ending_model, [server], tmp_path, sampling)
    before = trained_weights(training.model)
    with training.served as served:
        for number in range(4):
            groups, metrics = training.step(number)
            assert [len(group) for group in groups] == [4, 4, 4]
            assert metrics["sampling/server_logp_difference"] < 1e-5
            if number == 0:  # nothing is left of the random weights
                after = trained_weights(training.model)
                assert all(torch.equal(weight, after[name]) for name, weight in before.items())
            assert len(server.adapters) == 1 and len(list((tmp_path / "served").iterdir())) == 1
    assert served is training.served and not server.adapters and not (tmp_path / "served").exists()
    said = " ".join(capsys.readouterr().err.split())
    [allowed] = re.findall(r"nats in the mean; more than (\S+) stops the run", said)
    assert 1e-4 <= float(allowed) < 1e-3


def test_log_probs_are_those_before_truncation(ending_model: Path, server: VllmServer, tmp_path: Path) -> None:
    """What the server gives is of what is kept; what is trained on, of the whole, as the policy's own."""
    training = Training(ending_model, [server], tmp_path, TOLD["top_p"])
    training.step(0)
    groups, _ = training.step(1)
    ids = [tuple(each.token_ids for each in group) for group in groups]
    trees = [TokenTree(prompt, own) for prompt, own in zip(PROMPTS, ids, strict=True)]
    with torch.no_grad():
        own = training.served.scorer.score(trees).tokens
    given = torch.tensor([value for group in groups for each in group for value in each.logprobs])
    torch.testing.assert_close(given, own, rtol=0, atol=1e-4)


def test_whoever_of_two_lies_is_named(ending_model: Path, server: VllmServer, tmp_path: Path) -> None:
    with running(VllmServer(ending_model)) as other:
        training = Training(ending_model, [server, other], tmp_path, SAMPLING)
        training.step(0)
        other.lie = "base"
        message = refusal(training, 1)
        assert other.address in message and server.address not in message


def test_nan_is_no_agreement(ending_model: Path, server: VllmServer, tmp_path: Path) -> None:
    training = Training(ending_model, [server], tmp_path, SAMPLING)
    training.step(0)
    training.served._hand_over = lambda name: None  # type: ignore[method-assign]  # the server has them as they were
    for weight in training.model.parameters():
        if weight.requires_grad:
            weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="nan nats off"):
        training.step(1)
