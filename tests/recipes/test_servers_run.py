"""GRPO on completions of vLLM servers: the same numbers as with the own engine, and every lie named within a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from json_server import Failure, running
from run_files import lines
from safetensors.torch import load_file
from tiny_tokenizer import save_chat_model
from vllm_server import VllmServer

import prefold
from prefold.errors import UserError
from prefold.generation import servers
from prefold.recipe import RecipeBase
from prefold.training.sampled_trees import SampledTrees

MakeRecipe = Callable[..., RecipeBase]
SHORT = {"name": "length", "target": 3, "unit": "characters"}


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twelfth of its tokens ends a completion."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "ending", ends=tuple(range(0, 250, 12)))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "WAITS", (0.01,) * len(servers.WAITS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(ending_model: Path) -> Iterator[VllmServer]:
    with running(VllmServer(ending_model)) as server:
        yield server


@pytest.fixture
def grpo(recipe: MakeRecipe, ending_model: Path, tmp_path: Path) -> MakeRecipe:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say word {i}"}) + "\n" for i in range(12)))

    def make(grpo: dict[str, Any] | None = None, **changes: Any) -> RecipeBase:
        return recipe(
            method="grpo",
            grpo={"num_generations": 4, "max_completion_length": 8, "beta": 0.04, **(grpo or {})},
            rewards=[SHORT],
            **{
                "model": {"name": str(ending_model)},
                "data": {"train": [{"path": str(path)}]},
                "lora": {"lora_dropout": 0.0},
                "train": {"batch_size": 3, "max_steps": 4, "learning_rate": 5e-3, "save_steps": 2},
                **changes,
            },
        )

    return make


def served(*all_servers: VllmServer, **settings: Any) -> dict[str, Any]:
    return {"engine": "vllm", "urls": [server.address for server in all_servers], **settings}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def same_seeds(server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server draws with the numbers that the own engine would have."""
    completions_of = SampledTrees.completions_of

    def telling(self: SampledTrees, step: int, prompts: Any, seeds: Any) -> Any:
        server.seeds = dict(zip(prompts, seeds, strict=True))
        return completions_of(self, step, prompts, seeds)

    monkeypatch.setattr(SampledTrees, "completions_of", telling)


@pytest.mark.usefixtures("same_seeds")
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "num_iterations": 2, "beta": 0.0}])
def test_servers_give_what_the_own_engine_gives(
    grpo: MakeRecipe, server: VllmServer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    own = prefold.train(grpo(settings, output_dir=str(tmp_path / "own")))
    other = prefold.train(grpo(settings, generation=served(server)))
    assert lines(own / "rollouts.jsonl") == lines(other / "rollouts.jsonl")
    for mine, its in zip(lines(own / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-4, abs=1e-6)
        assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
        assert its.get("reward") == mine.get("reward")
        if "sampling/importance_sampling_ratio/mean" in its:
            assert its["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
            assert its["sampling/server_logp_difference"] < 1e-5
    for name, weight in adapter(own).items():
        torch.testing.assert_close(adapter(other)[name], weight, rtol=1e-3, atol=1e-5)
    assert not server.adapters and not (other / "served").exists()


def refusal(recipe: RecipeBase) -> str:
    with pytest.raises(UserError) as caught:
        prefold.train(recipe)
    return str(caught.value)


def test_a_lie_stops_the_run_within_a_step(grpo: MakeRecipe, server: VllmServer) -> None:
    """All of them are in tests/unit/training/test_served.py."""
    server.lie, server.lies_from = "base", 3
    recipe = grpo(generation=served(server))
    message = refusal(recipe)
    assert server.address in message and "(step 2); they are those of the base model, without the adapter" in message
    assert [line["step"] for line in lines(recipe.run_folder / "metrics.jsonl")] == [1]


# ---- faults -----------------------------------------------------------------------------------------------------

HALF = '{"model": "x", "choices": [{"index": 0'


@pytest.mark.usefixtures("same_seeds")
def test_servers_that_are_slow_full_or_gone_for_a_while(grpo: MakeRecipe, server: VllmServer, tmp_path: Path) -> None:
    straight = prefold.train(grpo(generation=served(server), output_dir=str(tmp_path / "straight")))
    asked = len(server.requests)
    busy = [Failure(429, headers={"Retry-After": "0.01"}), Failure(503), Failure(body=HALF), Failure(502)]
    server.failures = [*busy, *[Failure(body=HALF, seconds=0.2)] * 2, *busy]
    other = prefold.train(grpo(generation=served(server)))
    assert len(server.requests) == 2 * asked + 10 and not server.failures
    assert lines(other / "rollouts.jsonl") == lines(straight / "rollouts.jsonl")
    assert adapter(other).keys() == adapter(straight).keys()
    for name, weight in adapter(straight).items():
        torch.testing.assert_close(adapter(other)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("same_seeds")
def test_a_run_goes_on_when_the_server_is_back(
    grpo: MakeRecipe, server: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is gone for good in the third step, of which nothing is kept; the steps are counted once."""
    straight = prefold.train(grpo(generation=served(server), output_dir=str(tmp_path / "straight")))
    server.loaded, server.lies_from, server.lie = 0, 4, "dead"
    message = refusal(recipe := grpo(generation=served(server)))
    assert (
        server.address in message
        and "HTTP 503: gone (8 tries)" in message
        and "goes on from its last checkpoint" in message
    )
    assert [line["step"] for line in lines(recipe.run_folder / "metrics.jsonl")] == [1, 2]
    assert not (recipe.run_folder / "served").exists()
    server.lie = ""
    prefold.train(grpo(generation=served(server, timeout=500.0)))
    assert lines(recipe.run_folder / "rollouts.jsonl") == lines(straight / "rollouts.jsonl")
    assert [line["step"] for line in lines(recipe.run_folder / "metrics.jsonl")] == [1, 2, 3, 4]
    for name, weight in adapter(straight).items():
        torch.testing.assert_close(adapter(recipe.run_folder)[name], weight, rtol=1e-3, atol=1e-5)


def test_several_servers_share_the_work(
    grpo: MakeRecipe, server: VllmServer, ending_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever of them lies is named, not the other."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    with running(VllmServer(ending_model)) as other:
        recipe = grpo(generation=served(server, other), train={"batch_size": 6})
        other.lie, other.lies_from = "base", 3
        message = refusal(recipe)
        assert other.address in message and server.address not in message
        for each in (server, other):
            asked = [body for body in each.requests if body["path"] == "/v1/completions"]
            assert len(asked) > 8 and set(each.keys) == {"Bearer sk-secret"}
            assert not any("seed" in body for body in asked)
    written = [path.read_bytes() for path in recipe.run_folder.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in content for content in written)


def test_what_servers_cannot_be_given_is_refused(grpo: MakeRecipe, recipe: MakeRecipe, server: VllmServer) -> None:
    here = served(server)
    cases: list[tuple[Callable[[], RecipeBase], str]] = [
        (lambda: grpo(generation=here, lora="none"), "`lora: none` does not go with"),
        (lambda: grpo(generation=here, lora={"use_dora": True}), "`lora.use_dora` does not go with"),
        (lambda: recipe(generation=here), "would be ignored by `method: dpo`"),
        (lambda: grpo(generation={"engine": "vllm"}), "needs the servers' addresses"),
        (lambda: grpo(generation={"urls": ["http://a"]}), "`urls` would be ignored without `engine: vllm`"),
        (lambda: grpo(generation={**here, "urls": ["http://a:b@c/v1"]}), "holds a password"),
        (lambda: grpo(generation={**here, "urls": ["gpu-1:8000"]}), "is not the address of a server"),
        (lambda: grpo(generation={**here, "urls": ["http://a/v1", "http://a/v1/"]}), "names a server twice"),
        (lambda: grpo({"importance_sampling_correction": "none"}), "is for servers, and there are none"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message):
            make()
    message = refusal(grpo({"max_completion_length": 190}, generation=here))
    assert "takes 200 tokens at most" in message and "--max-model-len" in message


# ---- evaluation -------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(grpo: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """A recipe with six held-out prompts, two of which are answered without chance."""

    def make(settings: dict[str, Any] | None = None, **changes: Any) -> RecipeBase:
        data = {"train": [{"path": str(tmp_path / "prompts.jsonl")}], "eval_fraction": 0.5}
        return grpo(settings, **{"data": data, "evaluate": {"prompts": 2, "max_new_tokens": 6}, **changes})

    return make


@pytest.mark.usefixtures("same_seeds")
def test_evaluation_by_servers(evaluated: MakeRecipe, server: VllmServer, tmp_path: Path) -> None:
    own = prefold.train(evaluated(output_dir=str(tmp_path / "own")))
    other = prefold.train(evaluated(generation=served(server)))
    for folder in (own, other):
        prefold.merge(folder)
        server.requests.clear()
        prefold.evaluate(folder)
    assert lines(other / "samples.jsonl") == lines(own / "samples.jsonl")
    asked = [(body["model"], body["temperature"]) for body in server.requests if body["path"] == "/v1/completions"]
    [name] = {name for name, _ in asked} - {"base"}
    assert name.startswith("run-") or name.startswith(other.name)
    for each in ("base", name):
        assert asked.count((each, 1.0)) == 6 and asked.count((each, 0.0)) == 2
    assert not server.adapters and not (other / "served").exists()
    held_out = lines(other / "evaluation" / "heldout.jsonl")
    assert len(held_out) == 6 and None not in [line["after"] for line in held_out]


def test_an_answer_that_is_too_long_for_the_server_is_refused(evaluated: MakeRecipe, server: VllmServer) -> None:
    folder = prefold.train(evaluated(generation=served(server)))
    prefold.merge(folder)
    long = evaluated(generation=served(server), evaluate={"prompts": 2, "max_new_tokens": 400})
    server.requests.clear()
    with pytest.raises(UserError, match="takes 200 tokens at most"):
        prefold.evaluate(long)
    asked = [body for body in server.requests if body["path"] == "/v1/completions"]
    assert {body["max_tokens"] for body in asked} == {8}


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ("base", "off the model's"),
        ("other base", "off the model's"),
        ("foreign", "draws tokens"),
        ("temperature", "off"),
    ],
)
def test_a_lie_in_an_evaluation_is_named(evaluated: MakeRecipe, server: VllmServer, lie: str, named: str) -> None:
    recipe = evaluated({"temperature": 0.5}, generation=served(server))
    folder = prefold.train(recipe)
    prefold.merge(folder)
    server.lie, server.lies_from = lie, server.loaded + 1 if lie == "base" else 0
    with pytest.raises(UserError) as caught:
        prefold.evaluate(folder)
    assert server.address in str(caught.value) and named in str(caught.value)
    assert not (folder / "served").exists() and not server.adapters


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}, {"min_p": 0.02}])
def test_a_run_without_lies_is_never_stopped(grpo: MakeRecipe, server: VllmServer, settings: dict[str, Any]) -> None:
    recipe = grpo(settings, generation=served(server), train={"max_steps": 200, "learning_rate": 1e-2})
    folder = prefold.train(recipe)
    metrics = lines(folder / "metrics.jsonl")
    assert len(metrics) == 200 and max(line["sampling/server_logp_difference"] for line in metrics) < 2e-5
    assert all(line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3) for line in metrics)
