"""Several processes give one process's numbers, whatever the method, and end together when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import write_tasks
from json_server import running
from processes import Pair, stopping_at
from run_files import lines
from safetensors.torch import load_file
from tiny_tokenizer import save_chat_model
from transformers import AutoModelForSequenceClassification
from vllm_server import VllmServer

import prefold
from prefold import ranks
from prefold.errors import UserError
from prefold.recipe import RecipeBase, dump_recipe
from prefold.runs.train import _require_sharing

MakeRecipe = Callable[..., RecipeBase]
EXACT = {"r": 4, "lora_dropout": 0.0}
UNEVEN = {"batch_size": 3, "max_steps": None, "num_train_epochs": 0.5, "max_tokens": 120}
"""Seven pairs in steps of 3, 3 and 1: the last leaves one of two processes without any."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    started = Pair()
    yield started
    started.end()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say word {i}"}) + "\n" for i in range(12)))
    return path


@pytest.fixture
def grpo(recipe: MakeRecipe, prompts: Path) -> MakeRecipe:
    def make(grpo: dict[str, Any] | None = None, rewards: Any = None, **changes: Any) -> RecipeBase:
        return recipe(
            method="grpo",
            grpo={"num_generations": 4, "max_completion_length": 8, "beta": 0.04, "num_iterations": 2, **(grpo or {})},
            rewards=rewards or [{"name": "length", "target": 3, "unit": "characters"}],
            data={"train": [{"path": str(prompts)}]},
            lora=EXACT,
            **changes,
        )

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("adapter/*.safetensors")) if (folder / "adapter").exists() else trained(folder))


def trained(folder: Path) -> Path:
    return folder / "trained" / "model.safetensors"


def assert_alike(found: Path, wanted: Path) -> None:
    """Every number of every step, and the weights in the end."""
    assert len(lines(found)) == len(lines(wanted))
    for one, other in zip(lines(found), lines(wanted), strict=True):
        assert list(one) == list(other)
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=2e-6)


# ---- the numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "orpo", "aot", "kto"])
def test_two_processes_are_one(method: str, pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Apart, coupled (aot), and with completions under other prompts (kto)."""
    settings = {"method": method, "lora": EXACT, "train": {**UNEVEN, "eval_steps": 2}}
    pair.do("train", recipe(**settings, output_dir=str(tmp_path / "two")))
    one = prefold.train(recipe(**settings, output_dir=str(tmp_path / "one")))
    assert len(lines(one)) == (3 if method != "kto" else 5)
    assert_alike(tmp_path / "two", one)
    assert [line["tokens"] for line in lines(tmp_path / "two", "timing.jsonl") if "tokens" in line] == [
        line["tokens"] for line in lines(one, "timing.jsonl") if "tokens" in line
    ]


def test_rollouts_of_two_processes_are_those_of_one(pair: Pair, grpo: MakeRecipe, tmp_path: Path) -> None:
    train = {"batch_size": 3, "max_steps": 4, "learning_rate": 5e-3, "save_steps": 2, "max_tokens": 150}
    pair.do("run", grpo(train=train, output_dir=str(tmp_path / "two")))
    one = prefold.run(grpo(train=train, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    for name in ("rollouts.jsonl", "samples.jsonl"):
        found, wanted = lines(tmp_path / "two", name), lines(one, name)
        assert str(found) == str(wanted), name
    rewards = [json.loads((folder / "evaluation" / "rewards.json").read_text()) for folder in (tmp_path / "two", one)]
    assert rewards[0] == rewards[1]


def test_equal_groups_of_two_processes_are_those_of_one(pair: Pair, grpo: MakeRecipe, tmp_path: Path) -> None:
    """They are drawn again and left out alike, also where one process has nothing left, or neither has."""
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 97 == int(prompt[-1]['content'].split()[-1]))\n"
        "            for prompt, ids in zip(prompts, completion_ids)]\n"
    )
    settings = {
        "grpo": {"beta": 0.0, "num_iterations": 1, "resample": 1, "num_generations": 8},
        "rewards": [{"name": "mine", "file": str(tmp_path / "mine.py")}],
        "train": {"batch_size": 3, "max_steps": 12, "learning_rate": 5e-3, "max_tokens": 150},
    }
    pair.do("run", grpo(**settings, output_dir=str(tmp_path / "two")))
    one = prefold.run(grpo(**settings, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    left_out = {line["groups/left_out"] for line in lines(one)}
    assert left_out >= {2, 3} and sum(line["groups/drawn_again"] for line in lines(one)) > 0


def test_every_stage(pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"lora": EXACT, "train": {"eval_steps": 2, "load_best_model_at_end": True, "max_steps": 4}}
    pair.do("run", recipe(**settings, output_dir=str(tmp_path / "two")))
    one = prefold.run(recipe(**settings, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    found, wanted = (
        json.loads((folder / "evaluation" / "heldout.json").read_text()) for folder in (tmp_path / "two", one)
    )
    for when in ("before", "after", "reward"):
        assert found[when]["margin"] == pytest.approx(wanted[when]["margin"], rel=1e-5)
    assert lines(tmp_path / "two", "samples.jsonl") == lines(one, "samples.jsonl")
    names = {path.relative_to(one) for path in one.rglob("*") if path.name != "rng_state.pth"}
    assert {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")} == names


@pytest.mark.parametrize(("begun", "goes_on"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_other_processes(
    begun: int, goes_on: int, pair: Pair, recipe: MakeRecipe, tmp_path: Path
) -> None:
    train = {"max_steps": 5, "save_steps": 2, "max_tokens": 150}
    straight = prefold.train(recipe(method="bco", lora=EXACT, train=train, output_dir=str(tmp_path / "straight")))
    stopped = recipe(method="bco", lora=EXACT, train=train, output_dir=str(tmp_path / "stopped"))
    if begun == 2:
        pair.do("train", stopped, stop=3)
    else:
        with stopping_at(3), pytest.raises(KeyboardInterrupt):
            prefold.train(stopped)
    assert len(lines(tmp_path / "stopped")) == 3
    if goes_on == 2:
        pair.do("train", stopped)
    else:
        prefold.train(stopped)
    assert_alike(tmp_path / "stopped", straight)


@pytest.mark.parametrize("method", ["dpo", "aot"])
def test_memory_that_runs_out_in_one_process(method: str, pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    """All of them do the step again in smaller parts."""
    train = {"max_tokens": 400, "max_steps": 3, "batch_size": 8}
    settings = {"method": method, "lora": EXACT, "train": train}
    tried = pair.do("train", recipe(**settings, output_dir=str(tmp_path / "two")), room=(1, 200))
    assert max(tried[1]) > 200 > min(tried[1])
    one = prefold.train(recipe(**settings, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    kept = json.loads((tmp_path / "two" / "checkpoints" / "checkpoint-3" / "prefold.json").read_text())
    assert kept["max_tokens"] < 400


def test_all_processes_measure_the_same_to_the_last_bit(pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    """One that finds another checkpoint the best would save it while the others go on, and wait for ever."""
    train = {"max_steps": 3, "eval_steps": 1, "max_tokens": 150}
    first, second = pair.do("measured", recipe(lora=EXACT, train=train, data={"eval_fraction": 0.6}))
    assert len(first) == 3 and first == second


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interruption_of_one_process_is_that_of_all(
    rank: int, pair: Pair, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The step at hand is finished and saved, and the run goes on from there."""
    train = {"max_steps": 5, "save_steps": 4}
    straight = prefold.train(recipe(lora=EXACT, train=train, output_dir=str(tmp_path / "straight")))
    stopped = recipe(lora=EXACT, train=train, output_dir=str(tmp_path / "stopped"))
    assert pair.do("interrupted", stopped, rank=rank, step=2) == ["Ctrl-C", "Ctrl-C"]
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [1, 2]
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-2").is_dir()
    pair.do("train", stopped)
    assert_alike(tmp_path / "stopped", straight)


def test_guards_roll_all_processes_back(pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    pair.do("guarded", recipe(lora=EXACT, guards={"not_finite": "roll_back"}))
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in found[:4]] == pytest.approx([5e-3, 5e-3 * 5 / 6, 5e-3 / 3, 5e-3 / 4])
    events = json.loads((tmp_path / "run" / "guards.json").read_text())["events"]
    assert [(event["step"], event["after"]) for event in events if event["guard"] == "not_finite"] == [(3, 2)]


def test_reward_models(pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"method": "reward", "lora": EXACT, "train": {**UNEVEN, "eval_steps": 2}}
    pair.do("run", recipe(**settings, output_dir=str(tmp_path / "two")))
    one = prefold.run(recipe(**settings, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    found, wanted = (
        json.loads((folder / "evaluation" / "heldout.json").read_text()) for folder in (tmp_path / "two", one)
    )
    for name in ("accuracy", "margin"):
        assert found["after"][name] == pytest.approx(wanted["after"][name], rel=1e-5)


def test_tasks(pair: Pair, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-likelihoods, in several rows, and completions."""
    folder = write_tasks(tmp_path / "tasks")
    asked = {"tasks": ["tiny_passages", "tiny_sums"], "include_path": str(folder), "limit": 3, "prompts": 1}

    def make(name: str) -> RecipeBase:
        return recipe(lora=EXACT, evaluate=asked, train={"max_steps": 1}, output_dir=str(tmp_path / name))

    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache of two"))
    pair.do("run", make("two"), row_tokens=40)
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache of one"))
    one = prefold.run(make("one"))
    for name in ("scores_before", "scores_after"):
        found, wanted = (
            json.loads((run / "evaluation" / f"{name}.json").read_text()) for run in (tmp_path / "two", one)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours["questions"] == theirs["questions"]
            assert ours["values"] == pytest.approx(theirs["values"], rel=1e-5)


# ---- sharded weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "model"),
    [(EXACT, {}), ("none", {}), (EXACT, {"load_in_4bit": True})],
    ids=["lora", "full", "4 bits, tied"],
)
def test_sharded_weights(lora: Any, model: dict[str, Any], pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    if model:
        pytest.importorskip("bitsandbytes")
        model = {**model, "name": str(save_chat_model(tmp_path / "tied", tie_word_embeddings=True))}
    train = {**UNEVEN, "learning_rate": 1e-3, "eval_steps": 2, "save_steps": 1}
    settings = {"lora": lora, "model": model, "output_dir": str(tmp_path / "two"), "train": {**train, "fsdp": True}}
    found = pair.do("shards", recipe(**settings))
    one = prefold.train(recipe(lora=lora, model=model, train=train, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    base = list(load_file(Path(recipe(**settings).model.name) / "model.safetensors"))
    assert len(found[0]) == len(base)
    for name, (whole, first) in found[0].items():
        second = found[1][name][1]
        assert first[0] + second[0] == whole[0] and max(first[0], second[0]) <= -(-whole[0] // 2), name
    merged = load_file(prefold.merge(recipe(**settings)) / "model.safetensors")
    assert merged.keys() == set(base)


def test_the_automatic_budget_reckons_with_the_own_part_of_the_weights(pair: Pair, recipe: MakeRecipe) -> None:
    base = load_file(Path(recipe().model.name) / "model.safetensors")
    assert sum(pair.do("reckoned", recipe())) == sum(weight.nbytes for weight in base.values())


@pytest.mark.slow
def test_shards_within_machines(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Four processes on two machines: each machine has a whole copy of the model, each process a half of it."""
    four = Pair(4)
    try:
        for lora in (EXACT, "none"):
            train = {**UNEVEN, "learning_rate": 1e-3, "eval_steps": 2, "save_steps": 1}
            folder = tmp_path / ("lora" if lora == EXACT else "full")
            hybrid = recipe(lora=lora, train={**train, "fsdp": "hybrid"}, output_dir=str(folder / "four"))
            found = four.do("shards", hybrid)
            one = prefold.train(recipe(lora=lora, train=train, output_dir=str(folder / "one")))
            assert_alike(folder / "four", one)
            for name, (whole, _) in found[0].items():
                own = [parts[name][1][0] for parts in found]
                assert own[0] + own[1] == own[2] + own[3] == whole[0] and own[0] == own[2], name
            stopped = recipe(lora=lora, train={**train, "fsdp": "hybrid"}, output_dir=str(folder / "stopped"))
            four.do("train", stopped, stop=2)
            four.do("train", stopped)
            assert_alike(folder / "stopped", one)
    finally:
        four.end()


@pytest.mark.parametrize("lora", [EXACT, "none"], ids=["lora", "full"])
def test_sharded_reward_models(lora: Any, pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Plain transformers loads what they leave."""
    train = {**UNEVEN, "learning_rate": 1e-3, "eval_steps": 2, "save_steps": 1}
    settings = {"method": "reward", "lora": lora}
    pair.do("run", recipe(**settings, train={**train, "fsdp": True}, output_dir=str(tmp_path / "two")))
    one = prefold.run(recipe(**settings, train=train, output_dir=str(tmp_path / "one")))
    assert_alike(tmp_path / "two", one)
    found, wanted = (
        AutoModelForSequenceClassification.from_pretrained(folder / "merged").state_dict()
        for folder in (tmp_path / "two", one)
    )
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("lora", [EXACT, "none"], ids=["lora", "full"])
@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_sharded_training_goes_on(method: str, lora: Any, pair: Pair, recipe: MakeRecipe, tmp_path: Path) -> None:
    train = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "fsdp": True}
    best = {"eval_steps": 2, "load_best_model_at_end": True}

    def make(name: str) -> RecipeBase:
        return recipe(method=method, lora=lora, train={**train, **best}, output_dir=str(tmp_path / name))

    pair.do("train", make("straight"))
    pair.do("train", make("stopped"), stop=3)
    pair.do("train", make("stopped"))
    assert_alike(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["kto", "orpo"])
def test_sharded_weights_of_other_methods(
    method: str, dtype: str, pair: Pair, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """With checkpointing, prompts that are scored, statistics of the whole step, and in half precision."""
    train = {**UNEVEN, "gradient_checkpointing": True}
    settings = {"method": method, "lora": EXACT, "model": {"dtype": dtype}}
    pair.do("train", recipe(**settings, train={**train, "fsdp": True}, output_dir=str(tmp_path / "two")))
    one = prefold.train(recipe(**settings, train=train, output_dir=str(tmp_path / "one")))
    if dtype == "float32":
        assert_alike(tmp_path / "two", one)
    else:
        for found, wanted in zip(lines(tmp_path / "two"), lines(one), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"load_in_8bit": True}},
        {"model": {"device_map": "auto"}},
        {"lora": {"use_dora": True}},
        {"lora": {"modules_to_save": ["lm_head"]}},
    ],
    ids=lambda changes: next(iter(next(iter(changes.values())))),
)
def test_what_cannot_be_sharded(changes: dict[str, Any], recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"`train\.fsdp` does not go with"):
        recipe(train={"fsdp": True}, **changes)


def test_sharded_models_sample_by_servers_alone(grpo: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"does not go with `method: grpo` without servers in `generation`"):
        grpo(train={"batch_size": 2, "fsdp": True})


@pytest.mark.parametrize("fsdp", [False, True], ids=["replicas", "shards"])
def test_several_processes_with_a_server(
    fsdp: bool, pair: Pair, grpo: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first asks the server, all of them compare; it is given the weights of one process, and a lie ends all."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    train = {"batch_size": 3, "max_steps": 4, "learning_rate": 5e-3, "save_steps": 2, "max_tokens": 150}
    model = save_chat_model(tmp_path / "ending", ends=tuple(range(0, 250, 12)))
    with running(VllmServer(model)) as server:
        changes = {"generation": {"engine": "vllm", "urls": [server.address]}, "model": {"name": str(model)}}
        two = grpo({"top_k": 20}, train={**train, "fsdp": fsdp}, output_dir=str(tmp_path / "two"), **changes)
        pair.do("train", two)
        asked, server.loaded = [body["path"] for body in server.requests], 0
        one = prefold.train(grpo({"top_k": 20}, train=train, output_dir=str(tmp_path / "one"), **changes))
        assert_alike(tmp_path / "two", one)
        assert str(lines(tmp_path / "two", "rollouts.jsonl")) == str(lines(one, "rollouts.jsonl"))
        of_one = [body["path"] for body in server.requests[len(asked) :]]
        assert asked.count("/v1/completions") == of_one.count("/v1/completions") and not server.adapters
        server.lie, server.loaded, server.lies_from = "base", 0, 2
        with pytest.raises(UserError, match="they are those of the base model, without the adapter"):
            pair.do("train", grpo(train={**train, "fsdp": fsdp}, output_dir=str(tmp_path / "lie"), **changes))


def test_one_process_has_nothing_to_shard_with(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="there is one"):
        prefold.train(recipe(train={"fsdp": True}))


@pytest.mark.parametrize(
    ("here", "message"),
    [([2, 2, 1], "as many processes on each machine, and there are 1 and 2"), ([1, 1], "is one on")],
)
def test_machines_that_cannot_hold_a_copy_each(
    here: list[int], message: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here[-1]))
    monkeypatch.setattr(ranks, "processes", lambda: len(here))
    monkeypatch.setattr(ranks, "gather", lambda value: here)
    with pytest.raises(UserError, match=message):
        _require_sharing(recipe(train={"fsdp": "hybrid"}))


# ---- shares -----------------------------------------------------------------------------------------------------


def test_shares_are_even_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5, 40, 7, 31, 22, 9, 40, 3, 18]
    shares = []
    monkeypatch.setattr(ranks, "processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.share(sizes))
    assert sorted(place for share in shares for place in share) == list(range(9))
    loads = [sum(sizes[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 8
    assert shares == [sorted(share) for share in shares]


def test_one_process_has_everything() -> None:
    assert ranks.share([3, 1, 2]) == [0, 1, 2]
    assert ranks.gather("a") == ["a"] and ranks.merged({1: 2}) == {1: 2} and ranks.from_first(lambda: 5) == 5
    assert ranks.missing(7) == 0 and ranks.is_first()


# ---- starting and ending ----------------------------------------------------------------------------------------

FAILING = """
import os, sys
from prefold.errors import UserError
from prefold.runs import train as training
if os.environ["RANK"] == "1":
    def fails(recipe):
        raise UserError("something is wrong here", where="process 1")
    training.policy_of = fails
from prefold.cli import main
main()
"""


@pytest.fixture
def recipe_file(recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(lora=EXACT)))
    return path


def test_one_that_fails_ends_all_with_one_message(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from prefold.launch import launch

    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    assert launch([sys.executable, str(script), "train", str(recipe_file)], 2) == 2
    out, err = capfd.readouterr()
    assert "process 1: something is wrong here" in err
    assert err.count("prefold:") == 1 and "Traceback" not in err and out == ""


@pytest.mark.slow
def test_a_wrong_recipe_is_one_message(recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from prefold.launch import launch

    assert launch(prefold_command("train", recipe_file, "lora.r=0"), 2) == 2
    _, err = capfd.readouterr()
    assert err.count("`lora.r` is 0") == 1 and "Traceback" not in err


def prefold_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "prefold", *map(str, arguments)]


@pytest.mark.slow
def test_the_command(recipe_file: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    done = subprocess.run(prefold_command("train", recipe_file, "--nproc", 2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    assert done.stderr.count("2 processes, each with a share of every step") == 1
    assert_alike(tmp_path / "run", prefold.train(recipe(lora=EXACT, output_dir=str(tmp_path / "one"))))


@pytest.mark.slow
def test_torchrun(recipe_file: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prefold"]
    done = subprocess.run([*torchrun, "run", str(recipe_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert_alike(tmp_path / "run", prefold.train(recipe(lora=EXACT, output_dir=str(tmp_path / "one"))))
    wrong = subprocess.run([*torchrun, "merge", str(recipe_file)], capture_output=True, text=True)
    assert "`prefold merge` uses one process, and 2 were started" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_command_is_that_of_all(number: signal.Signals, recipe_file: Path, tmp_path: Path) -> None:
    command = prefold_command("train", recipe_file, "--nproc", 2, "train.max_steps=5000")
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or len(lines(tmp_path / "run")) < 3:
        assert started.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(started.pid, number)
    assert started.wait(30) != 0
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
