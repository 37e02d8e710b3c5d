"""Win rate by people's votes, and their agreement: numbers by hand and published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefold.data.vote_file import append_line
from prefold.errors import UserError
from prefold.evaluation.people import agreement, measure_by_votes, rate_by_votes

Line = dict[str, Any]


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {number}?"}]


def sample(number: int, before: str = "Old.", after: str = "New.") -> Line:
    return {"prompt": asked(number), "before": [before], "after": [after]}


def vote(number: int, winner: str, voter: str = "Ann", new_is: str = "a", **answers: str) -> Line:
    shown = {"answer_a": "New.", "answer_b": "Old."} if new_is == "a" else {"answer_a": "Old.", "answer_b": "New."}
    return {"id": f"{voter}{number}", "voter": voter, "prompt": asked(number), **shown, "winner": winner, **answers}


def rated(votes: list[Line], samples: list[Line]) -> Line:
    found = rate_by_votes(votes, samples)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_a_rate_whatever_side_the_new_answer_was_shown_on() -> None:
    """Of eight answers the new one is better seven times, once shown as a and then as b; the last is a tie."""
    votes = [vote(number, winner, new_is=winner) for number, winner in enumerate("abababa")]
    found = rated([*votes, vote(7, "tie")], [sample(number) for number in range(10)])
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (7, 1, 0, 7.5 / 8)
    assert found["p_value"] == pytest.approx(2 / 2**7) and found["verdict"] == "better"
    assert found["ci"][0] > 0.5 and (found["prompts"], found["comparisons"], found["votes"]) == (8, 8, 8)
    assert found["left_out"]["not_voted"] == 2 and found["agreement"] is None
    assert found["outcomes"] == [[1.0]] * 7 + [[0.5], [None], [None]]


def test_several_voters_on_an_answer_are_one_observation() -> None:
    """Two of three prefer the new answer to one prompt: two thirds, by a single prompt, which shows nothing."""
    found = rated([vote(0, "a"), vote(0, "b", "Bo", "b"), vote(0, "b", "Cy")], [sample(0)])
    assert found["win_rate"] == pytest.approx(2 / 3) and (found["prompts"], found["wins"]) == (1, 1)
    assert found["p_value"] == 1.0 and found["judge"]["name"] == "3 people"
    assert found["agreement"]["share"] == pytest.approx(1 / 3)  # of three pairs one agrees


def test_both_bad_counts_as_neither_and_is_counted() -> None:
    found = rated([vote(0, "both bad"), vote(1, "a")], [sample(0), sample(1)])
    assert (found["win_rate"], found["ties"], found["both_bad"]) == (0.75, 1, 1)
    assert found["judge"]["name"] == "1 person"


def test_votes_on_other_answers_say_nothing_of_a_run() -> None:
    """Those of another prompt, or of answers that an earlier training gave, or that are no two answers of this run."""
    votes = [vote(5, "a"), vote(0, "a", answer_a="Newer."), vote(1, "a", answer_b="New."), vote(2, "a")]
    found = rated(votes, [sample(number) for number in range(3)])
    assert (found["comparisons"], found["wins"]) == (1, 1)
    assert found["left_out"] == {"same_answers": 0, "not_voted": 2, "of_other_answers": 3}


def test_answers_that_are_the_same_are_not_voted_on() -> None:
    same = vote(0, "a", answer_a="Same.", answer_b="Same.")
    found = rated([same], [sample(0, "Same.", "Same."), sample(1)])
    assert found["prompts"] == 0 and "win_rate" not in found and found["judge"]["name"] == "0 people"
    assert found["left_out"] == {"same_answers": 1, "not_voted": 1, "of_other_answers": 1}


def test_a_prompt_that_is_there_twice_counts_once() -> None:
    found = rated([vote(0, "a")], [sample(0), sample(0)])
    assert (found["prompts"], found["comparisons"], found["outcomes"]) == (1, 1, [[1.0], [None]])


def test_several_answers_to_a_prompt_are_one_prompt() -> None:
    both = {"prompt": asked(0), "before": ["Old.", "Older."], "after": ["New.", "Newer."]}
    votes = [vote(0, "a"), vote(0, "a", answer_a="Newer.", answer_b="Older.")]
    assert (rated(votes, [both])["prompts"], rated(votes, [both])["comparisons"]) == (1, 2)


def test_other_people_are_another_judge() -> None:
    names = ["Ann", "Bo", "Ann "]
    one, other, again = (rated([vote(0, "a", name)], [sample(0)])["judge"] for name in names)
    assert one == again and one != other and "Ann" not in str(one)


def test_a_file_of_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "votes.jsonl"
    with pytest.raises(UserError, match=r"(?s)votes.jsonl: no such file of votes.*`prefold ui`"):
        measure_by_votes(str(path), [sample(0)])
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\n')
    for other in ("pairs.jsonl", "votes.txt"):
        (tmp_path / "votes.txt").touch()
        with pytest.raises(UserError, match="no line of it is a vote"):
            measure_by_votes(str(tmp_path / other), [sample(0)])
    for line in (vote(0, "b"), vote(0, "a"), vote(1, "a"), {"undo": "Ann1", "voter": "Ann"}):
        append_line(path, line)
    found = measure_by_votes(str(path), [sample(0), sample(1)])
    assert (found["win_rate"], found["votes"], found["left_out"]["not_voted"]) == (1.0, 1, 1)
    measure_by_votes(str(path), [sample(7)])
    assert "no vote in" in "".join(capsys.readouterr())


# ---- agreement --------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    """Four pairs of votes, of which three agree. Of the eight votes five are 1 and three are 0: by chance
    64 - 25 - 9 = 30 of the ordered pairs would differ, and 2 do: 1 - 7 * 2 / 30."""
    found = agreement([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5]])
    assert found == {"compared": 4, "pairs": 4, "share": 0.75, "alpha": pytest.approx(1 - 14 / 30)}


def test_alpha_with_votes_that_are_missing() -> None:
    """Three observers and fifteen units, 0.691 in Krippendorff's own computation (nominal data)."""
    a = [None, None, None, None, None, 3, 4, 1, 2, 1, 1, 3, 3, None, 3]
    b = [1, None, 2, 1, 3, 3, 4, 3, None, None, None, None, None, None, None]
    c = [None, None, 2, 1, 3, 4, 4, None, 2, 1, 1, 3, 3, None, 4]
    units = [[float(value) for value in unit if value is not None] for unit in zip(a, b, c, strict=True)]
    found = agreement(units)
    assert found is not None and found["alpha"] == pytest.approx(0.691, abs=5e-4)


def test_agreement_that_says_nothing() -> None:
    assert agreement([[1.0], [0.0]]) is None
    assert agreement([[1.0, 1.0], [1.0, 1.0]]) == {"compared": 2, "pairs": 2, "share": 1.0, "alpha": None}
