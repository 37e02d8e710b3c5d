"""Voting: what a voter sees, what is kept, and what comes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from prefold.data.vote_file import read_votes
from prefold.recipe.text import apply_override
from prefold.ui.vote import comparisons_of

Client = Callable[..., TestClient]
HOSTILE = "<script>window.owned = 1</script>{{ 7*7 }}\x1b[31m\u202e"


def sample(number: int, before: str = "", after: str = "") -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"prompt": prompt, "before": [before or f"Old {number}."], "after": [after or f"New {number}."]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that answered twelve prompts, two of them as before."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: dpo\n")
    (folder / "run.log").write_text("")
    rows = [sample(number) for number in range(10)] + [sample(10, "Same.", "Same."), sample(11, after=HOSTILE)]
    rows[0]["finish_reasons"] = {"before": ["stop"], "after": ["length"]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Voter:
    """As `vote.js` sends votes."""

    def __init__(self, client: TestClient, deck: Path, name: str = "Ann"):
        self.client, self.given = client, {"deck": str(deck), "voter": name}
        self.page = client.get("/vote", params=self.given).text

    @property
    def shown(self) -> list[str]:
        return [
            unescape(text) for text in re.findall(r'<div class="text" dir="auto">(.*?)</div>', self.page, re.DOTALL)
        ]

    @property
    def plain(self) -> str:
        return " ".join(unescape(re.sub(r"<[^>]+>", "", self.page)).split())

    def send(self, **fields: str) -> int:
        found = re.search(r'name="id" value="(\w+)"', self.page)
        sent = {**self.given, "id": found[1] if found else "", **fields}
        headers = {"origin": "http://127.0.0.1:8000", "accept": "text/html;part"}
        response = self.client.post("/vote", data=sent, headers=headers)
        self.page = response.text
        return response.status_code

    def prefer(self, start: str, **fields: str) -> None:
        """Vote for the answer that starts so."""
        self.send(winner="ab"[[text.startswith(start) for text in self.shown].index(True)], **fields)


def test_votes_are_kept_with_all_that_is_known_of_them(ui_client: Client, run: Path) -> None:
    voter = Voter(ui_client(run.parent), run, " Ann \n")
    voter.prefer("New", note="  clearer ")
    [vote] = read_votes(run / "votes.jsonl")
    assert vote["voter"] == "Ann" and vote["note"] == "clearer" and vote["prompt"] == sample(0)["prompt"]
    sides = {vote[f"answer_{side}"]: vote[f"model_{side}"] for side in "ab"}
    assert sides == {"Old 0.": "one, before", "New 0.": "one, after"}
    assert vote[f"answer_{vote['winner']}"] == "New 0." and vote["time"].endswith("+00:00") and vote["id"]
    assert "1 of 11 voted" in voter.plain and "Question 1?" in voter.page


def test_nobody_is_told_which_model_is_which(ui_client: Client, run: Path) -> None:
    """Neither by the order, which is another one from prompt to prompt and from voter to voter, and stays."""
    client = ui_client(run.parent)
    orders = {}
    for name in ("Ann", "Bo", "Cy"):
        voter = Voter(client, run, name)
        for number in range(8):
            assert Voter(client, run, name).shown == voter.shown
            ballot = voter.page.partition("<article")[2].partition("</form>")[0]
            assert not re.search(r"\b(before|after|one,)\b", ballot)
            orders[name, number] = voter.shown[0].startswith("New")
            voter.send(winner="tie")
    assert 6 < sum(orders.values()) < 18
    assert len({tuple(orders[name, number] for number in range(8)) for name in ("Ann", "Bo", "Cy")}) == 3


def test_undo_brings_the_question_back(ui_client: Client, run: Path) -> None:
    client = ui_client(run.parent)
    voter, other = Voter(client, run), Voter(client, run, "Bo")
    other.prefer("Old")
    for _ in range(2):
        voter.prefer("New")
    voter.send(undo="1")
    assert "Question 1?" in voter.page and "1 of 11 voted" in voter.plain
    voter.send(undo="1")
    voter.send(undo="1")  # nothing is left to undo: that of Bo is his own
    assert [vote["voter"] for vote in read_votes(run / "votes.jsonl")] == ["Bo"]
    assert len((run / "votes.jsonl").read_text().splitlines()) == 5


def test_twenty_votes_give_an_interval_and_agreement(ui_client: Client, run: Path) -> None:
    """Ann prefers ten new answers of eleven, Bo the same but one: they agree on ten of eleven."""
    client = ui_client(run.parent)
    ann, bo = Voter(client, run), Voter(client, run, "Bo")
    for number in range(11):
        ann.prefer("Old" if number == 3 else HOSTILE[:7] if number == 10 else "New")
        bo.prefer("Old" if number in (3, 4) else HOSTILE[:7] if number == 10 else "New")
    plain = bo.plain
    assert "All is voted on" in plain and "11 of 11 voted" in plain
    # 9 wins, a tie and a loss: 86.4 %, and 2 * (1 + 10) / 2 ** 10 for the sign test of ten.
    assert "86 %" in plain and "p = 0.021" in plain and "The answers of “one, after” are preferred." in plain
    assert "pairs of votes that agree91 %" in plain and "votes of Ann11" in plain
    # Of 22 votes 19 are for new answers: 1 - 21 * 2 / (22 ** 2 - 19 ** 2 - 3 ** 2).
    assert f"alpha{1 - 42 / 114:.2f}" in plain


def test_hostile_texts_are_texts(ui_client: Client, run: Path) -> None:
    voter = Voter(ui_client(run.parent), run, "<b>{{ 7*7 }}</b>")
    for _ in range(10):
        voter.send(winner="tie", note=HOSTILE)
    assert "&lt;script&gt;window.owned" in voter.page and "<script>window" not in voter.page
    assert "<b>" not in voter.page.partition("<main")[2].replace("<b>prefold</b>", "") or "&lt;b&gt;" in voter.page
    assert "\x1b" not in voter.page and "\u202e" not in voter.page and "49" not in voter.page
    assert read_votes(run / "votes.jsonl")[0]["note"] == HOSTILE.strip()


@pytest.mark.parametrize(
    "fields",
    [{"winner": "c"}, {"winner": ""}, {"id": "0"}, {"winner": "a", "voter": " "}, {"winner": "a", "voter": "x" * 61}],
)
def test_what_is_no_vote_is_refused(ui_client: Client, run: Path, fields: dict[str, str]) -> None:
    assert Voter(ui_client(run.parent), run).send(**fields) == 400
    assert not (run / "votes.jsonl").exists()


def test_a_link_out_of_the_folder_is_not_followed(ui_client: Client, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("")
    (run / "votes.jsonl").symlink_to(outside)
    assert ui_client(run).get("/vote", params={"deck": str(run), "voter": "Ann"}).status_code == 403
    sent = {"deck": str(run), "voter": "Ann", "winner": "a", "id": "0"}
    assert ui_client(run).post("/vote", data=sent, headers={"origin": "http://127.0.0.1:8000"}).status_code == 403


def test_votes_go_into_the_report_and_the_next_recipe(
    ui_client: Client, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Path, list[str], Path]] = []
    monkeypatch.setattr("prefold.ui.jobs.start", lambda *given: started.append(given))
    client, sent = ui_client(run.parent), {"deck": str(run)}
    headers = {"origin": "http://127.0.0.1:8000"}
    assert client.post("/vote/report", data=sent, headers=headers).status_code == 404
    recipe = {"method": "dpo", "data": {"train": [{"path": "old.jsonl"}], "decisions": "d.jsonl", "eval_fraction": 0.2}}
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"evaluate": {"win_rate": {"votes": "old.jsonl"}}}))
    voter = Voter(client, run)
    voter.prefer("New")
    link = unescape(re.search(r'href="(/runs/new[^"]+)"', voter.page)[1])  # type: ignore[index]
    assert client.post("/vote/report", data=sent, headers=headers, follow_redirects=False).status_code == 303
    [(folder, arguments, _)] = started
    assert folder == run and arguments[0] == str(run)
    values: dict[str, Any] = {}
    apply_override(values, arguments[1])
    assert values == {"evaluate": {"win_rate": {"votes": str(run / "votes.jsonl")}}}
    written = yaml.safe_load(
        unescape(re.search(r"<textarea[^>]*>(.*?)</textarea>", client.get(link).text, re.DOTALL)[1])
    )  # type: ignore[index]
    assert written["data"] == {"train": [{"path": "one/votes.jsonl"}], "decisions": None, "eval_fraction": 0.2}
    assert written["evaluate"] == {"win_rate": None}


@pytest.mark.parametrize("deck", ["/etc", "..", "../..", "\x00"])
def test_a_folder_outside_is_refused(ui_client: Client, run: Path, deck: str) -> None:
    client = ui_client(run)
    assert client.get("/vote", params={"deck": deck, "voter": "Ann"}).status_code in (403, 404)
    sent = {"deck": deck, "voter": "Ann", "winner": "a", "id": "0"}
    assert client.post("/vote", data=sent, headers={"origin": "http://127.0.0.1:8000"}).status_code in (403, 404)


def test_the_start_lists_what_there_is_to_vote_on(ui_client: Client, run: Path, tmp_path: Path) -> None:
    page = ui_client(run.parent).get("/vote").text
    assert f'<option value="{run}">one</option>' in page
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "There is nothing to vote on yet" in ui_client(empty).get("/vote").text


def test_any_two_answers_can_be_put_to_the_vote(run: Path) -> None:
    other = {"prompt": sample(0)["prompt"], "answers": ["One.", "Two."], "models": ["a", "b"]}
    rows = [other, {**other, "answers": ["One."]}, {**other, "answers": [1, 2]}, {**other, "prompt": "?"}, {"x": 1}]
    (run / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": [{"ro')
    found = [*comparisons_of(run).values()]
    assert len(found) == 12 and found[-1].models == ("a", "b")


def test_the_vote_is_there_before_the_answer_and_a_torn_line_does_no_harm(ui_client: Client, run: Path) -> None:
    voter = Voter(ui_client(run.parent), run)
    voter.prefer("New")
    with (run / "votes.jsonl").open("ab") as file:
        file.write(b'{"id": "torn", "voter": "An')
    voter.prefer("New")
    assert len(read_votes(run / "votes.jsonl")) == 2 and "2 of 11 voted" in voter.plain
    assert all(json.loads(line) for line in (run / "votes.jsonl").read_text().splitlines())
