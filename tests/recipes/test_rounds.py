"""`rounds:` in a recipe, as a user meets them: what is made, when it ends, stopped and gone on with, and refusals."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from json_server import Failure
from tiny_tokenizer import save_chat_model

import prefold
from prefold.cli import main
from prefold.errors import StageError, UserError
from prefold.generation.samplers import LocalModel
from prefold.models.adapters import load_policy
from prefold.recipe import Model, RecipeBase, load_recipe
from prefold.reports.rounds import summary
from prefold.runs import rounds as running
from prefold.runs.rounds import ByRewards
from prefold.training.loop import TrainingLoop
from prefold.trees.scorer import reference_model

__all__ = ["chat_server"]
MakeRecipe = Callable[..., RecipeBase]
SHORT = [{"name": "length", "target": 0, "unit": "characters"}]
ROUNDS = {"number": 2, "num_completions": 4, "max_new_tokens": 8, "temperature": 1.0}
PROMPTS, HELD_OUT = 14, 6


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "ending", ends=tuple(range(0, 256, 4)))


@pytest.fixture
def rounds(recipe: MakeRecipe, ending_model: Path, tmp_path: Path) -> MakeRecipe:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Say word {i}", "answer": str(i)} for i in range(PROMPTS + HELD_OUT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> RecipeBase:
        changes["rounds"] = {**ROUNDS, **changes["rounds"]} if "rounds" in changes else ROUNDS
        settings = {
            "model": {"name": str(ending_model), "dtype": "float32"},
            "data": {"train": [{"path": str(path)}], "eval_fraction": 0.3},
            "rewards": SHORT,
            "train": {"batch_size": 4, "max_steps": 2, "learning_rate": 5e-3, "save_steps": 1},
            "evaluate": {"prompts": 1, "max_new_tokens": 4},
        }
        return recipe(**{**settings, **changes})

    return make


@pytest.fixture
def all_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round is taken for better than the one before."""
    compared = ByRewards.compared
    monkeypatch.setattr(ByRewards, "compared", lambda *given: compared(*given) | {"verdict": "better"})


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "rounds.json").read_text()))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is made -----------------------------------------------------------------------------------------------


def test_two_rounds(
    rounds: MakeRecipe, all_help: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rounds()
    folder = prefold.run(made)
    facts = facts_of(folder)
    assert [each["round"] for each in facts["rounds"]] == [1, 2] and facts["best"] == 2 and facts["is_over"]
    assert facts["prompts"] == {"train": PROMPTS, "held_out": HELD_OUT}
    for number in (1, 2):
        pairs = rows_of(folder / "pairs" / f"{number}.jsonl")
        assert all(
            len(row["chosen"]) < len(row["rejected"]) and row["score_chosen"] == -len(row["chosen"]) for row in pairs
        )
        found = facts["rounds"][number - 1]["pairs"]
        assert found["pairs"] == len(pairs) > 4 and found["pairs"] + sum(found["left_out"].values()) == PROMPTS
        child = load_recipe(str(folder / "rounds" / str(number)))
        trained = json.loads((child.run_folder / "data.json").read_text())["tokens"]
        assert trained["train"]["trees"] == len(pairs) and trained["held_out"]["trees"] == found["held_out"] > 0
        assert (child.run_folder / "report.html").is_file() and child.rounds is None and child.rewards == []
    assert child.model.adapter == str(folder / "rounds" / "1" / "adapter") and child.model.reference is None
    # The answers of the second round are those of the first round's model.
    assert rows_of(folder / "pairs" / "1.jsonl") != rows_of(folder / "pairs" / "2.jsonl")
    assert {row["prompt"] for row in pairs}.isdisjoint(
        row["prompt"] for row in rows_of(folder / "pairs" / "2-held-out.jsonl")
    )
    by_hand(folder, facts)
    page = (folder / "rounds.html").read_text()
    assert 'href="rounds/2/report.html"' in page and "2 rounds made the model better" in page

    def unwanted(*given: Any, **settings: Any) -> Any:
        raise AssertionError("computed again")

    before = {
        path: path.read_bytes() for path in (folder / "rounds.json", folder / "rounds.html", folder / "pairs/2.jsonl")
    }
    monkeypatch.setattr(LocalModel, "sample", unwanted)
    monkeypatch.setattr(TrainingLoop, "train", unwanted)
    prefold.run(made)
    assert {path: path.read_bytes() for path in before} == before


def by_hand(folder: Path, facts: dict[str, Any]) -> None:
    """Models are compared by the mean reward of each held-out prompt, over all of its answers."""
    means = []
    for number in range(3):
        kept = dict(rows_of(folder / "answers" / f"{number}.jsonl"))  # type: ignore[arg-type]
        answers = [value for value in kept.values() if isinstance(value[0], list)]
        scores = [value for value in kept.values() if not isinstance(value[0], list)]
        # The held-out prompts are answered first, those that end early before the others.
        assert sorted([-len(text) for text, _ in group] for group in answers[:HELD_OUT]) == sorted(scores[:HELD_OUT])
        means.append([fmean(of_prompt) for of_prompt in scores[:HELD_OUT]])
    for number, each in enumerate(facts["rounds"], 1):
        for name, other in (("against_before", number - 1), ("against_base", 0)):
            assert each[name]["before"] == pytest.approx(fmean(means[other]))
            assert each[name]["after"] == pytest.approx(fmean(means[number])) == pytest.approx(each["model"]["reward"])
            assert each[name]["difference"] == pytest.approx(fmean(means[number]) - fmean(means[other]))
            assert each[name]["n"] == HELD_OUT and each[name]["metric"] == "reward"


def test_a_round_that_does_not_help_is_the_last(rounds: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prefold.run(rounds(train={"batch_size": 4, "max_steps": 1, "learning_rate": 1e-9}))
    facts = facts_of(folder)
    assert [each["round"] for each in facts["rounds"]] == [1] and facts["best"] == 0 and facts["is_over"]
    assert not (folder / "rounds" / "2").exists()
    from rich.console import Console

    Console(width=80).print(summary(folder))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Round 1 is the last: it is not shown to be better than the base, so the base is the one to keep" in shown


def test_full_fine_tuning_goes_on_with_whole_weights(rounds: MakeRecipe, all_help: None) -> None:
    made = rounds(lora="none", rounds={"number": 2}, train={"batch_size": 4, "max_steps": 1, "learning_rate": 1e-4})
    folder = prefold.run(made)
    child = load_recipe(str(folder / "rounds" / "2"))
    assert child.model.name == str(folder / "rounds" / "1" / "merged") and child.lora == "none"


def test_the_base_as_reference(rounds: MakeRecipe, all_help: None, ending_model: Path) -> None:
    folder = prefold.run(rounds(rounds={"reference": "base"}))
    first, second = (load_recipe(str(folder / "rounds" / number)) for number in "12")
    assert (first.model.reference, second.model.reference) == (None, "base")
    start = rows_of(folder / "rounds" / "2" / "metrics.jsonl")[0]
    # Where the last round is the reference, the first step has neither reward.
    assert abs(start["rewards/chosen"]) > 1e-3
    import torch

    ids = torch.arange(1, 9)[None]
    base = load_policy(Model(name=str(ending_model), dtype="float32"), first.lora, 0)  # type: ignore[arg-type]
    policy = load_policy(second.model, None, 0)
    with torch.no_grad(), reference_model(policy):
        assert torch.equal(policy(ids).logits, base(ids).logits)


def test_no_pair_in_a_later_round_ends_it(rounds: MakeRecipe, all_help: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = running.RoundsRun.answers

    def all_equal(self: Any, number: int, prompts: Any, *more: Any) -> Any:
        found = answers(self, number, prompts, *more)
        equal = [[each.__class__(each.text, 0, 1.0, each.finished) for each in group] for group in found]
        return equal if number == 1 and len(prompts) == PROMPTS else found

    monkeypatch.setattr(running.RoundsRun, "answers", all_equal)
    folder = prefold.run(rounds())
    facts = facts_of(folder)
    assert facts["best"] == 1 == len(facts["rounds"]) and facts["without_pairs"] == 2
    assert "Round 2 was not begun: no pair could be made of the answers" in (folder / "rounds.html").read_text()
    monkeypatch.setattr(running.RoundsRun, "answers", answers)
    with pytest.raises(StageError, match=rf"no pair could be made of {PROMPTS} prompts: {PROMPTS} margin too small"):
        prefold.run(rounds(rounds={"min_margin": 1000}, output_dir=str(folder.parent / "none")))


def test_people_vote(rounds: MakeRecipe, tmp_path: Path) -> None:
    votes = tmp_path / "votes"
    votes.mkdir()
    made = rounds(rounds={"number": 1, "votes": str(votes)})
    with pytest.raises(UserError, match="round 1 waits for votes on two answers to") as caught:
        prefold.run(made)
    offered = tmp_path / "run" / "pairs" / "1-to-vote.jsonl"
    assert str(offered) in str(caught.value)
    rows = rows_of(offered)
    # The first is for neither, one has no vote, all others are for the second answer.
    voted = [{**row, "vote": 2 if number else 0} for number, row in enumerate(rows[:-1])]

    def vote(*rows: dict[str, Any]) -> None:
        (votes / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    vote(*voted, {**rows[-1], "output_1": "another answer", "vote": 1})
    with pytest.raises(UserError, match=f"row {len(rows)}.*on answers that were not offered"):
        prefold.run(made)
    vote(*voted, voted[1])
    with pytest.raises(UserError, match="is a second vote on the same answers"):
        prefold.run(made)
    vote(*voted)
    folder = prefold.run(made)
    [only] = facts_of(folder)["rounds"]
    few = PROMPTS - len(rows)
    left_out = {"tie": 1, "no_vote": 1, **({"too_few_answers": few} if few else {})}
    assert only["pairs"]["left_out"] == left_out and only["pairs"]["pairs"] == len(rows) - 2
    pairs = rows_of(folder / "pairs" / "1.jsonl")
    chosen = {json.dumps(row["prompt"]): row["output_2"] for row in voted[1:]}
    assert {json.dumps([{"role": "user", "content": row["prompt"]}]): row["chosen"] for row in pairs} == chosen
    assert "score_chosen" not in pairs[0] and only["against_base"]["metric"] == "reward"


# ---- rewards and judges behind endpoints ------------------------------------------------------------------------


def test_a_rubric_says_what_it_costs(rounds: MakeRecipe, chat_server: ChatServer) -> None:
    def answer(body: dict[str, Any]) -> Failure:
        text = re.search(r"\[Answer\]\n(.*?)\n\n\[Criteria\]", body["messages"][0]["content"], re.DOTALL)
        assert text is not None
        content = json.dumps({"short": len(text[1]) < 4})
        usage = {"prompt_tokens": 50, "completion_tokens": 5}
        return Failure(body=json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}))

    chat_server.answer = answer
    criteria = [{"name": "short", "text": "It is short."}]
    reward = {"name": "rubric", "endpoint": chat_server.address, "model": "big", "criteria": criteria}
    folder = prefold.run(rounds(rewards=[reward], rounds={"number": 1}))
    facts = facts_of(folder)
    asked = len(chat_server.requests)
    cost = [facts["base"]["cost"], *(facts["rounds"][0][part]["cost"] for part in ("pairs", "model"))]
    # A short answer of both models to a prompt is the same question.
    assert sum(part["rubric"]["calls"] for part in cost) >= asked
    assert sum(part["rubric"]["calls"] for part in cost[:2]) <= asked
    assert cost[0]["rubric"]["prompt_tokens"] == 50 * cost[0]["rubric"]["calls"]
    assert 0 <= facts["base"]["reward"] <= 1
    page = (folder / "rounds.html").read_text()
    assert "rubric, requests" in page
    straight = (folder / "rounds.json").read_bytes()
    prefold.run(rounds(rewards=[reward], rounds={"number": 1}))
    assert (folder / "rounds.json").read_bytes() == straight and len(chat_server.requests) == asked


def test_a_judge(rounds: MakeRecipe, chat_server: ChatServer) -> None:
    def likes_short(body: dict[str, Any]) -> str:
        found = re.search(
            r"\[Answer 1\]\n(.*?)\n\n\[Answer 2\]\n(.*?)\n\n\[End\]", body["messages"][0]["content"], re.DOTALL
        )
        assert found is not None
        return "1" if len(found[1]) <= len(found[2]) else "2"

    chat_server.answer = likes_short
    judge = {"endpoint": chat_server.address, "model": "big"}
    folder = prefold.run(rounds(rewards=[], rounds={"number": 1, "judge": judge}))
    [only] = facts_of(folder)["rounds"]
    facts = only["against_before"]
    assert facts == only["against_base"] and facts["metric"] == "win rate" and facts["before"] == 0.5
    assert facts["n"] == HELD_OUT and facts["difference"] == pytest.approx(facts["after"] - 0.5)
    assert "its answers are preferred in" in (folder / "rounds.html").read_text()


# ---- stopped and gone on with -----------------------------------------------------------------------------------


class Stopped(BaseException):
    """Nothing may take it for an error of its own."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(running, "write_json", 1), (running, "answers_of", 2), (running, "write_pairs", 3), (TrainingLoop, "train", 2)],
)
def test_stopped_rounds_end_with_the_same_files(
    owner: Any,
    name: str,
    call: int,
    rounds: MakeRecipe,
    all_help: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = prefold.run(rounds(output_dir=str(tmp_path / "straight")))
    kept, calls = getattr(owner, name), 0

    def stops(*given: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return kept(*given, **settings)

    monkeypatch.setattr(owner, name, stops)
    with pytest.raises(Stopped):
        prefold.run(rounds())
    monkeypatch.setattr(owner, name, kept)
    folder = prefold.run(rounds())
    assert_same(folder, straight)


def test_stopped_amid_the_answers(rounds: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: rounds(rounds={"number": 1}, output_dir=str(tmp_path / name)) for name in ("straight", "stopped")}
    straight = prefold.run(made["straight"])
    kept = LocalModel.sample

    def stops(self: LocalModel, prompts: Any, wanted: Any) -> Any:
        for count, answered in enumerate(kept(self, prompts, wanted)):
            if count == 3:
                raise Stopped
            yield answered

    monkeypatch.setattr(LocalModel, "sample", stops)
    # Then the other 3, the scores of all 6, and 3 of the prompts to train on.
    for expected in (3, 15):
        with pytest.raises(Stopped):
            prefold.run(made["stopped"])
        assert len(rows_of(tmp_path / "stopped" / "answers" / "0.jsonl")) == expected
    monkeypatch.setattr(LocalModel, "sample", kept)
    assert_same(prefold.run(made["stopped"]), straight)


def assert_same(found: Path, wanted: Path) -> None:
    names = ["rounds.json", "rounds.html", *(f"pairs/{path.name}" for path in wanted.glob("pairs/*"))]
    for run in wanted.glob("rounds/*"):
        names += [f"rounds/{run.name}/{name}" for name in ("metrics.jsonl", "samples.jsonl", "evaluation/heldout.json")]
        names += [f"rounds/{run.name}/merged/model.safetensors"]
    for name in names:
        # The page is called by its folder.
        read = (wanted / name).read_bytes().replace(wanted.name.encode(), found.name.encode())
        assert (found / name).read_bytes() == read, name


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": {"number": 0}}, "`rounds.number` is 0"),
        ({"rounds": {"num_completions": 1}}, "`rounds.num_completions` is 1"),
        ({"rounds": {"temperature": 0}}, "`rounds.temperature` is 0"),
        ({"rounds": {"margin": 1}}, "`rounds.margin` is not a field"),
        ({"rewards": []}, "`rounds` need something that scores answers"),
        ({"rounds": {"judge": {"endpoint": "http://h/v1", "model": "m"}}}, "answers are scored twice"),
        ({"method": "kto"}, "which `method: kto` does not train on"),
        ({"method": "orpo", "rounds": {"reference": "base"}}, "`rounds.reference` would be ignored by `orpo`"),
        ({"lora": "none", "rounds": {"reference": "base"}}, "full fine-tuning does not keep the base"),
        ({"rounds": {"votes": "votes", "min_margin": 1.0}}, "`rounds.min_margin` would be ignored beside `votes`"),
        ({"publish": {"to": "out"}}, "`publish` does not go with `rounds`"),
        ({"data": {"template": "none"}}, "`data.template: none` does not go with `rounds`"),
        ({"data": {"overlong": "truncate_prompt"}}, "`data.overlong: truncate_prompt` does not go with `rounds`"),
        ({"model": {"reference": "base"}}, "`reference` would be ignored without `adapter`"),
        ({"data": {"eval_fraction": 0.0}}, "nothing is held out to compare rounds on"),
        ({"rewards": [{"name": "exact_number", "weight": 1, "target": 3}]}, "is not a setting of `exact_number`"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, rounds: MakeRecipe, recipe: MakeRecipe, tmp_path: Path
) -> None:
    sections = {
        name: {**rounds().model_dump(mode="json")[name], **change}
        for name, change in changes.items()
        if name in ("data", "model")
    }
    with pytest.raises(UserError) as caught:
        prefold.run(rounds(**{**changes, **sections}))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_number_is_enough(recipe: MakeRecipe, rounds: MakeRecipe) -> None:
    made = recipe(rounds=3, rewards=SHORT)
    assert made.rounds is not None and (made.rounds.number, made.rounds.reference) == (3, "last")
    with pytest.raises(UserError, match="`rewards` would be ignored by `method: dpo` without `rounds`"):
        recipe(rewards=SHORT)


def test_check_plans_a_round_and_says_so(rounds: MakeRecipe) -> None:
    report = prefold.check(rounds())
    [note] = [finding for finding in report.prepared.report.findings if finding.kind == "rounds"]
    assert note.message.startswith(f"at most 2 rounds, each with 4 answers to {PROMPTS} prompts and to {HELD_OUT}")
    assert report.plan.optimizer_steps == 2 and report.plan.untimed == ["rounds"]
    assert not Path(rounds().output_dir).exists()


def test_a_folder_of_something_else(rounds: MakeRecipe, recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is neither empty nor the folder of rounds"):
        prefold.run(rounds())
    (tmp_path / "run" / "notes.txt").unlink()
    made = rounds(rounds={"number": 1})
    prefold.run(made)
    with pytest.raises(UserError, match=r"made with other settings: `rounds.temperature` was 1.0, is 0.5"):
        prefold.run(rounds(rounds={"number": 1, "temperature": 0.5}))
    with pytest.raises(UserError, match=r"made with other settings: `train.seed` was 42, is 7"):
        prefold.run(rounds(rounds={"number": 1}, train={"batch_size": 4, "max_steps": 2, "seed": 7}))
    for act in (prefold.train, prefold.merge, prefold.evaluate, prefold.report):
        with pytest.raises(UserError, match="rounds are several runs"):
            act(made)
    fresh = prefold.run(rounds(rounds={"number": 1, "temperature": 0.5}), fresh=True)
    assert facts_of(fresh)["recipe"]["rounds"]["temperature"] == 0.5


def test_by_command(
    rounds: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefold.recipe import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(rounds(rounds={"number": 1})))
    monkeypatch.setattr(sys, "argv", ["prefold", "run", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "against the round before" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["prefold", "sweep", str(tmp_path / "recipe.yaml"), "dpo.beta=0.1,0.2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "a run of a sweep has no rounds" in " ".join(capsys.readouterr().err.split())
