"""The pages of data: rows as they are read, what is found in them, and what is decided about them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hostile_texts import HOSTILE, ORIGIN, require_harmless
from starlette.testclient import TestClient

from prefold.data.decisions import read_decisions
from prefold.ui import tables
from prefold.ui.data import _marked
from prefold.ui.worker import TASKS, Worker, checker, reader

Client = Callable[..., TestClient]
Write = Callable[..., Path]
PAIRS = [{"prompt": f"Ask {i}", "chosen": "yes " * (i % 7 + 1), "rejected": f"no {i}"} for i in range(1, 131)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'id="row-(\d+)"', text)]


def following(text: str) -> str:
    found = re.search(r'href="([^"]*)" data-key="f"', text)
    assert found
    return found[1].replace("&amp;", "&")


def test_rows_are_shown_in_pages(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    path, client = write_rows("pairs.jsonl", PAIRS), ui_client(tmp_path)
    text = client.get("/data", params={"path": str(path)}).text
    assert numbers(text) == list(range(1, 51)) and re.search(r">130</span> rows", text)
    assert "Ask 1<" in text and "chosen" in text and "no 50" in text
    text = client.get(following(text)).text
    assert numbers(text) == list(range(51, 101))
    text = client.get(following(text)).text
    assert numbers(text) == list(range(101, 131)) and 'data-key="f"' not in text


def test_rows_by_length_text_and_number(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", PAIRS)
    client = ui_client(tmp_path)
    sizes = {i: len(json.dumps(row)) for i, row in enumerate(PAIRS, 1)}
    longest = numbers(client.get("/data/rows?path=pairs.jsonl&order=longest").text)
    assert [sizes[i] for i in longest] == sorted(sizes.values(), reverse=True)[:50]
    shortest = client.get("/data/rows?path=pairs.jsonl&order=shortest").text
    assert [sizes[i] for i in numbers(client.get(following(shortest)).text)] == sorted(sizes.values())[50:100]
    assert numbers(client.get("/data/rows?path=pairs.jsonl&text=ask+12").text) == [12, *range(120, 130)]
    text = client.get("/data/rows?path=pairs.jsonl&text=yes").text
    assert numbers(client.get(following(text)).text) == list(range(51, 101))
    assert numbers(client.get("/data/rows?path=pairs.jsonl&rows=5,7,900,0,x").text) == [5, 7]
    named = ",".join(map(str, range(130, 60, -1)))
    text = client.get(f"/data/rows?path=pairs.jsonl&rows={named}").text
    assert numbers(text) == list(range(130, 80, -1)) and numbers(client.get(following(text)).text) == [
        *range(80, 60, -1)
    ]
    assert "No row matches" in client.get("/data/rows?path=pairs.jsonl&text=absent").text


def test_a_row_shows_what_differs(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", [{"prompt": "Why?", "chosen": "It is so.", "rejected": "It was so."}])
    text = ui_client(tmp_path).get("/data/row?path=pairs.jsonl&row=1").text
    assert 'It <span class="token differs">is</span> so.' in text
    assert 'It <span class="token differs">was</span> so.' in text
    assert _marked("x " * 5000, "y") == [[("x " * 5000, False)], [("y", False)]]


def test_a_data_set_of_the_hub(
    ui_client: Client, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows, with nulls that mean nothing; a decision calls it by its name."""
    loaded = [[{"role": "user", "content": f"Ask {i}", "tool_calls": None}] for i in range(3)]
    rows = [{"prompt": prompt, "chosen": [{"role": "assistant", "content": "y"}], "rejected": "n"} for prompt in loaded]
    tried = iter([ValueError("gone"), rows])

    def load_dataset(path: str, **given: Any) -> Any:
        assert path == "some/pairs" and given["split"] == "train"
        if isinstance(outcome := next(tried), ValueError):
            raise outcome
        return outcome

    monkeypatch.setattr(tables, "SOON", 20)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(Worker, "ask", lambda self, task, **arguments: TASKS[task](**arguments))
    (tmp_path / "r.yaml").write_text("method: dpo\nmodel: {name: m}\ndata: {train: [{path: some/pairs}]}\n")
    client = ui_client(tmp_path)
    text = client.get("/data?recipe=r.yaml").text
    assert "some/pairs" in text and "/data/findings?recipe=r.yaml" in text
    assert "cannot be had from the Hub: gone" in client.get("/data/rows?recipe=r.yaml&n=0").text
    text = client.get("/data/rows?recipe=r.yaml&n=0").text
    assert numbers(text) == [1, 2, 3] and "Ask 2" in text
    assert "Ask 1" in client.get("/data/row?recipe=r.yaml&n=0&row=2").text
    fields = {"recipe": "r.yaml", "n": "0", "row": "2", "action": "strike", "reason": "odd"}
    client.post("/data/decide", data=fields, headers=ORIGIN)
    [((source, row), decision)] = read_decisions(tmp_path / "r.decisions.jsonl").items()
    assert (source, row, decision.action) == ("some/pairs", 2, "strike")
    assert numbers(client.get("/data/rows?recipe=r.yaml&n=0&order=decided").text) == [2]


def test_a_file_that_is_not_recognised_is_shown_as_it_is(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("odd.jsonl", [{"alpha": 1, "beta": [1, {"gamma": "deep"}]}])
    client = ui_client(tmp_path)
    assert "alpha" in client.get("/data/rows?path=odd.jsonl").text
    text = client.get("/data/row?path=odd.jsonl&row=1").text
    assert "deep" in text and "is not recognised" in text


@pytest.mark.parametrize(
    "name", ["empty.jsonl", "broken.jsonl", "broken.json", "other.txt", "missing.jsonl", "fifo.jsonl"]
)
def test_what_cannot_be_shown_says_why(ui_client: Client, tmp_path: Path, name: str) -> None:
    contents = {"empty.jsonl": "", "broken.jsonl": '{"a"\n[1]\n', "broken.json": "{", "other.txt": "text"}
    if name in contents:
        (tmp_path / name).write_text(contents[name])
    client = ui_client(tmp_path)
    answer = client.get(f"/data/rows?path={name}")
    assert answer.status_code in (200, 400)
    assert client.get(f"/data/row?path={name}&row=1").status_code in (200, 400)
    if name == "broken.json":
        assert "not JSON" in answer.text


def test_rows_outside_the_folders_are_not_shown(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    outside = write_rows("pairs.jsonl", [{"prompt": "secret", "chosen": "a", "rejected": "b"}])
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.jsonl").symlink_to(outside)
    recipe = f"method: dpo\ndata:\n  train: [{{path: {outside}}}]\n"
    (inside / "mine.yaml").write_text(recipe)
    (inside / "decides.yaml").write_text(
        "method: dpo\ndata:\n  train: [{path: 'builtin:short_answers'}]\n  decisions: ../d.jsonl\n"
    )
    client = ui_client(inside)
    for given in (
        {"path": str(outside)},
        {"path": "link.jsonl"},
        {"path": "../*.jsonl"},
        {"path": "../pairs.jsonl"},
        {"recipe": "mine.yaml"},
    ):
        for page in ("/data", "/data/rows", "/data/row", "/data/row/tokens"):
            answer = client.get(page, params=given)
            assert answer.status_code in (400, 403) and "secret" not in answer.text, (given, page)
        fields = {**given, "row": "1", "action": "strike", "reason": "why"}
        assert client.post("/data/decide", data=fields, headers=ORIGIN).status_code in (400, 403)
    fields = {"recipe": "decides.yaml", "row": "1", "action": "strike", "reason": "why"}
    assert client.post("/data/decide", data=fields, headers=ORIGIN).status_code == 403
    assert not list(tmp_path.glob("*decisions*")) and not (tmp_path / "d.jsonl").exists()


def decide(client: TestClient, **fields: str) -> Any:
    return client.post("/data/decide", data={"path": "pairs.jsonl", **fields}, headers=ORIGIN)


def test_a_row_is_struck_flipped_and_left_as_it_was(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    path, client = write_rows("pairs.jsonl", PAIRS[:3]), ui_client(tmp_path)
    before = path.read_bytes()
    text = decide(client, row="2", action="strike", reason="<b>wrong</b>").text
    assert "Struck: " in text and "&lt;b&gt;wrong" in text
    decide(client, row="3", action="flip", reason="the other way")
    rows = client.get("/data/rows?path=pairs.jsonl").text
    assert "struck" in rows and "flipped" in rows
    assert numbers(client.get("/data/rows?path=pairs.jsonl&order=decided").text) == [2, 3]
    decide(client, row="2", action="keep")
    assert numbers(client.get("/data/rows?path=pairs.jsonl&order=decided").text) == [3]
    known = read_decisions(tmp_path / "pairs.decisions.jsonl")
    assert {key: it.action for key, it in known.items()} == {("pairs.jsonl", 2): "keep", ("pairs.jsonl", 3): "flip"}
    assert path.read_bytes() == before
    write_rows("pairs.jsonl", [*PAIRS[:2], PAIRS[5]])
    assert "has changed since it was decided about" in client.get("/data/row?path=pairs.jsonl&row=3").text


def test_what_is_no_decision_is_refused(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", [*PAIRS[:2], "broken"])
    write_rows("prompts.jsonl", [{"prompt": "Why?"}])
    client = ui_client(tmp_path)
    for fields in (
        *({"row": "1", "action": "strike", "reason": " "}, {"row": "1", "action": "remove", "reason": "x"}),
        *({"row": "9", "action": "strike", "reason": "x"}, {"row": "-1", "action": "strike", "reason": "x"}),
        *({"row": "3", "action": "strike", "reason": "x"}, {"action": "strike", "reason": "x"}),
        {"path": "prompts.jsonl", "row": "1", "action": "flip", "reason": "x"},
    ):
        assert decide(client, **fields).status_code == 400, fields
    fields = {"path": "pairs.jsonl", "row": "1", "action": "strike", "reason": "x"}
    assert client.post("/data/decide", data=fields).status_code == 403
    assert not list(tmp_path.glob("*.decisions.jsonl"))


def test_decisions_of_a_recipe_go_where_it_says(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", PAIRS[:3])
    write_rows("more.jsonl", PAIRS[3:6])
    recipe = "method: dpo\ndata:\n  train: [{path: pairs.jsonl}, {path: more.jsonl}]\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "named.yaml").write_text(recipe + "  decisions: decided.jsonl\n")
    client = ui_client(tmp_path)
    for name, file in (("mine", "mine.decisions.jsonl"), ("named", "decided.jsonl")):
        fields = {"path": "", "recipe": f"{name}.yaml", "n": "1", "row": "2", "action": "strike", "reason": "x"}
        text = decide(client, **fields).text
        assert set(read_decisions(tmp_path / file)) == {("more.jsonl", 2)}
        assert ("a recipe uses it by" in text) == (name == "mine")
        assert numbers(client.get(f"/data/rows?recipe={name}.yaml&n=0&order=decided").text) == []
        assert numbers(client.get(f"/data/rows?recipe={name}.yaml&n=1&order=decided").text) == [2]
    assert client.get("/data/rows?recipe=mine.yaml&n=2").status_code == 404
    assert "applies them" in client.get("/runs/new?from=mine.yaml").text.replace("</code>", "")


def test_a_built_in_set_is_decided_about_in_the_first_folder(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    answer = client.post(
        "/data/decide",
        data={"path": "builtin:short_answers", "row": "1", "action": "flip", "reason": "x"},
        headers=ORIGIN,
    )
    assert answer.status_code == 200 and "Flipped" in answer.text
    assert [key[0] for key in read_decisions(tmp_path / "short_answers.decisions.jsonl")] == ["builtin:short_answers"]


def test_findings_lead_to_their_rows(
    ui_client: Client, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows("pairs.jsonl", PAIRS[:4])
    (tmp_path / "mine.yaml").write_text("method: dpo\ndata:\n  train: [{path: pairs.jsonl}]\n")
    rows = [{"source": str(path), "row": row} for row in (2, 4)]
    finding = {"kind": "duplicate", "severity": "note", "count": 9, "rows": rows, "message": "<b>", "advice": "x"}
    asked: list[str] = []

    def ask(task: str, **given: str) -> dict[str, Any]:
        asked.append(given["text"])
        return {"findings": [finding], "sources": [], "tokens": {}}

    monkeypatch.setattr(checker, "ask", ask)
    client = ui_client(tmp_path)
    assert "/data/findings?recipe=mine.yaml" in client.get("/data?recipe=mine.yaml").text
    text = client.get("/data/findings?recipe=mine.yaml").text
    assert "The first 2 rows" in text and "&lt;b&gt;" in text and str(path) in asked[0]
    link = re.search(r'href="(/data/rows[^"]*)"', text)
    assert link and numbers(client.get(link[1].replace("&amp;", "&")).text) == [2, 4]


def test_what_is_odd_about_a_file_needs_no_model(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", [*PAIRS[:3], {"prompt": "Why?", "chosen": "", "rejected": "No."}])
    write_rows("odd.jsonl", [{"alpha": 1}])
    client = ui_client(tmp_path)
    try:
        assert "/data/findings?path=pairs.jsonl" in client.get("/data?path=pairs.jsonl&findings=1").text
        text = client.get("/data/findings?path=pairs.jsonl").text
        link = re.search(r'href="(/data/rows[^"]*)"', text)
        assert "1 row left out: a text is empty" in text and link
        assert numbers(client.get(link[1].replace("&amp;", "&")).text) == [4]
        assert client.get("/data/findings?path=odd.jsonl").status_code == 400
    finally:
        reader.end()


def test_tokens_are_those_of_the_recipe_or_of_a_model(
    ui_client: Client, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows("pairs.jsonl", PAIRS[:2])
    (tmp_path / "mine.yaml").write_text("method: dpo\ndata:\n  train: [{path: pairs.jsonl}]\n")
    asked: list[dict[str, str]] = []
    tokens = {
        name: [{"id": 7, "text": f"<i>{name}", "part": "prompt" if name == "prompt" else "scored"}]
        for name in ("prompt", "chosen", "rejected")
    }

    def ask(task: str, **given: str) -> dict[str, Any]:
        asked.append(given)
        row = {"source": str(path), "row": 2}
        return {"row": row, "left_out": [], "findings": [], "rendered": [{"prompt": "<u>"}], "tokens": [tokens]}

    monkeypatch.setattr(reader, "ask", ask)
    client = ui_client(tmp_path)
    text = client.get("/data/row/tokens?recipe=mine.yaml&row=2").text
    assert "&lt;i&gt;chosen" in text and "token trained differs" in text and "&lt;u&gt;" in text
    assert asked[0]["row"] == f"{path}:2" and asked[0]["value"] == PAIRS[1] and "method: dpo" in asked[0]["text"]
    assert "With a model's name" in client.get("/data/row/tokens?path=pairs.jsonl&row=2").text.replace("&#39;", "'")
    client.get("/data/row/tokens?path=pairs.jsonl&row=2&model=tiny")
    assert asked[1] == {
        "start": str(tmp_path.resolve()),
        "row": f"{path}:2",
        "value": PAIRS[1],
        "model": "tiny",
        "path": str(path),
        "kind": "pairs",
    }


def test_hostile_rows_are_text(ui_client: Client, write_rows: Write, tmp_path: Path) -> None:
    write_rows("pairs.jsonl", [{"prompt": text, "chosen": text, "rejected": f"{text} {text}"} for text in HOSTILE])
    write_rows("odd.jsonl", [{text: text, "other": [text, {text: text}]} for text in HOSTILE])
    client = ui_client(tmp_path)
    for name in ("pairs.jsonl", "odd.jsonl"):
        for after in (0, 50, 100):
            require_harmless(client.get(f"/data/rows?path={name}&after={after}").text)
        for row in range(1, len(HOSTILE) + 1):
            answer = client.get(f"/data/row?path={name}&row={row}")
            assert answer.status_code == 200
            require_harmless(answer.text)
    for text in HOSTILE[::4]:
        given = {"path": "pairs.jsonl", "text": text, "order": text, "after": text}
        require_harmless(client.get("/data/rows", params=given).text)
        decided = decide(client, row="1", action="strike", reason=text)
        assert decided.status_code == 200
        require_harmless(decided.text)
