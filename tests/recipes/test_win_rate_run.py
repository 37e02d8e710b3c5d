"""A run that ends with a win rate, and run folders that are compared, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import prefold
from prefold.data.vote_file import append_line
from prefold.errors import UserError
from prefold.files import read_jsonl
from prefold.recipe import Publish, RecipeBase

MakeRecipe = Callable[..., RecipeBase]
JUDGED = {"prompts": 4, "max_new_tokens": 8, "win_rate": {"judge": {"name": "length", "target": 3}}}


def times(folder: Path) -> dict[str, int]:
    names = ("evaluation/heldout.json", "evaluation/win_rate.json", "report.html")
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def test_a_run_with_a_judge_and_another_one_afterwards(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe(evaluate=JUDGED))
    found = json.loads((folder / "evaluation" / "win_rate.json").read_text())
    assert found["judge"] == {"kind": "reward", "name": "length"}
    assert found["prompts"] == 4 == found["wins"] + found["ties"] + found["losses"]
    assert 'id="win-rate"' in (folder / "report.html").read_text()
    before = times(folder)
    # Another judge of the same answers: nothing else is done again but the report.
    prefold.run(recipe(evaluate=JUDGED | {"win_rate": {"judge": {"name": "repetition"}}}))
    changed = {name for name, time in times(folder).items() if before[name] != time}
    assert changed == {"evaluation/win_rate.json", "report.html"}
    assert json.loads((folder / "evaluation" / "win_rate.json").read_text())["judge"]["name"] == "repetition"
    # And none: the report forgets it.
    prefold.run(recipe(evaluate=JUDGED | {"win_rate": None}), fresh=False)
    prefold.report(recipe(evaluate=JUDGED | {"win_rate": None}))
    assert 'id="win-rate"' not in (folder / "report.html").read_text()


def test_evaluating_again_judges_again(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe(evaluate=JUDGED))
    before = times(folder)
    prefold.evaluate(recipe(evaluate=JUDGED))
    assert times(folder)["evaluation/win_rate.json"] != before["evaluation/win_rate.json"]


def test_a_judge_that_cannot_judge_is_refused_before_training(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="needs `answer`, which is not there"):
        prefold.run(recipe(evaluate={"win_rate": {"judge": {"name": "exact_number"}}}))
    assert not (recipe().run_folder / "metrics.jsonl").exists()


def test_a_judge_that_is_down_leaves_the_evaluation(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefold.generation.endpoint.WAITS", (0.01,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    down = recipe(evaluate=JUDGED | {"win_rate": {"judge": {"endpoint": "http://127.0.0.1:1/v1", "model": "big"}}})
    with pytest.raises(UserError, match="cannot be reached"):
        prefold.run(down)
    assert (down.run_folder / "evaluation" / "heldout.json").is_file()
    assert not (down.run_folder / "evaluation" / "win_rate.json").exists()
    with pytest.raises(UserError, match=r"(?s)needs the output of `judge`.*`prefold evaluate`"):
        prefold.publish(down.model_copy(update={"publish": Publish(to=str(tmp_path / "out"))}))


def test_people_vote_on_a_run_and_train_the_next(recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = prefold.run(recipe(evaluate={"prompts": 6, "max_new_tokens": 8}))
    votes, samples = folder / "votes.jsonl", read_jsonl(folder / "samples.jsonl")
    for number, sample in enumerate(samples[:5]):
        shown = {"answer_a": sample["before"][0], "answer_b": sample["after"][0]}
        vote = {
            "id": str(number),
            "voter": "Quentin",
            "prompt": sample["prompt"],
            **shown,
            "winner": "b" if number else "tie",
        }
        append_line(votes, vote)
    judged = {"prompts": 6, "max_new_tokens": 8, "win_rate": {"votes": str(votes)}}
    prefold.run(recipe(evaluate=judged))
    facts = json.loads((folder / "evaluation" / "win_rate.json").read_text())
    assert (facts["wins"], facts["ties"], facts["losses"], facts["votes"]) == (4, 1, 0, 5)
    assert facts["p_value"] == 2 / 2**4 and facts["judge"]["name"] == "1 person"
    page, card = (folder / "report.html").read_text(), (folder / "merged" / "README.md").read_text()
    assert "How often 1 person prefers the answer after training" in page and "judged by 1 person" in card
    assert "Quentin" not in page + card
    # A vote more: the judge stage and the report, and nothing else.
    append_line(votes, {"undo": "0", "voter": "Quentin"})
    heldout = (folder / "evaluation" / "heldout.json").stat().st_mtime_ns
    prefold.run(recipe(evaluate=judged))
    assert json.loads((folder / "evaluation" / "win_rate.json").read_text())["votes"] == 4
    assert (folder / "evaluation" / "heldout.json").stat().st_mtime_ns == heldout
    data = {"train": [{"path": str(votes)}], "eval_fraction": 0.3}
    second = prefold.run(recipe(data=data, evaluate=judged, output_dir=str(tmp_path / "next")))
    assert json.loads((second / "data.json").read_text())["sources"][0]["rows_used"] == 4
    assert "votes.jsonl" in (second / "report.html").read_text()


def test_votes_that_are_not_there_are_refused_before_training(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"`evaluate.win_rate.votes`, missing.jsonl: no such file of votes"):
        prefold.run(recipe(evaluate={"win_rate": {"votes": "missing.jsonl"}}))
    assert not (recipe().run_folder / "metrics.jsonl").exists()


def test_runs_are_compared_by_command(recipe: MakeRecipe, tmp_path: Path) -> None:
    folders = [str(prefold.run(recipe(output_dir=str(tmp_path / name)))) for name in ("one", "two")]
    found = prefold.compare(folders)
    assert list(found["runs"]) == folders
    facts = found["models"][folders[1]]["measures"]["held-out pairs"]
    assert facts["n"] == 6 and facts["changed"] == 0
    assert found["runs"][folders[0]]["method"] == "dpo"
