"""The pages Talk and Vote in a real browser, by the keyboard alone."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny_tokenizer import save_chat_model

import prefold
from prefold.data.vote_file import read_votes
from prefold.files import read_jsonl
from prefold.recipe import make_recipe
from prefold.reports.run_files import readable
from prefold.ui import ahead, speakers
from prefold.ui.server import make_app
from prefold.ui.site import Site

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH")

FAKE_SPEAKER = Path(__file__).parents[1] / "unit" / "ui" / "fake_speaker.py"
HOSTILE = "<img src=x onerror='window.owned=1'><script>window.owned=1</script>{{7*7}}"
PATIENCE = 120_000
"""Milliseconds, for machines that do something else as well."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """`open_page(address)` of a server for the folder `runs`; what goes wrong on a page fails the test."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(16)
    site = Site(((tmp_path / "runs").resolve(),), tmp_path.resolve(), listening.getsockname()[1], "secret")
    server = uvicorn.Server(uvicorn.Config(make_app(site), log_level="warning"))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    context, wrong = browser.new_context(viewport={"width": 1280, "height": 800}), []
    expect.set_options(timeout=PATIENCE)

    def make(address: str, wide: bool = True) -> Page:
        page = context.new_page()
        page.set_viewport_size({"width": 1280 if wide else 390, "height": 800})
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(f"http://127.0.0.1:{site.port}{address}{'&' if '?' in address else '?'}token=secret")
        return page

    yield make
    context.close()
    server.should_exit = True
    thread.join(20)
    for speaker in speakers._SPEAKERS.values():
        speaker.end()
    assert wrong == []


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "COMMAND", (sys.executable, str(FAKE_SPEAKER)))
    monkeypatch.setattr(speakers, "_SPEAKERS", {})
    monkeypatch.setattr(ahead, "_WORK", {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    (folder / "merged").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("method: dpo\n")
    (folder / "run.log").write_text("")
    rows: list[dict[str, Any]] = []
    for number in range(20):
        prompt = [{"role": "user", "content": f"Question {number}? {HOSTILE}"}]
        rows.append({"prompt": prompt, "before": [f"Old {number}. {HOSTILE}"], "after": [f"New {number}."]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def runs_nothing_of_theirs(page: Page) -> bool:
    return not page.evaluate("'owned' in window") and "49" not in page.content()


def vote_by_keys(page: Page, votes: int, prefers: Callable[[str, str], str]) -> None:
    """Press the key that `prefers` names for the two answers on the screen, vote after vote."""
    for number in range(votes):
        expect(page.locator("#progress")).to_contain_text(f"{number} of {votes} voted")
        first, second = page.locator(".ballot .answer .text").all_inner_texts()
        page.keyboard.press(prefers(first, second))
    expect(page.locator("#progress")).to_contain_text(f"{votes} of {votes} voted")


def test_twenty_votes_by_keys_and_the_interval(open_page: Open, run: Path) -> None:
    page = open_page("/vote")
    page.keyboard.press("n")
    page.keyboard.type("Ann")
    page.keyboard.press("Enter")
    page.wait_for_url("**/vote?*voter=Ann")
    assert runs_nothing_of_theirs(page)
    vote_by_keys(page, 20, lambda first, _: "1" if first.startswith("New") else "2")
    expect(page.locator("#results")).to_contain_text("The answers of “one, after” are preferred.")
    expect(page.locator("#results")).to_contain_text("100")
    assert page.locator("#results .bar i").get_attribute("style") is not None
    assert page.evaluate("document.activeElement.id") == "asked"
    votes = read_votes(run / "votes.jsonl")
    assert len(votes) == 20 and all(vote[f"answer_{vote['winner']}"].startswith("New") for vote in votes)
    assert 3 < sum(vote["winner"] == "a" for vote in votes) < 17
    # A key too many does nothing; undo, a tie with a note, and both bad.
    page.keyboard.press("1")
    for number in (19, 18):
        page.keyboard.press("u")
        expect(page.locator("#progress")).to_contain_text(f"{number} of 20 voted")
    page.keyboard.press("n")
    page.keyboard.type("120 uS")
    page.keyboard.press("Enter")  # which is no vote
    page.keyboard.press("0")
    expect(page.locator("#progress")).to_contain_text("19 of 20 voted")
    page.keyboard.press("s")
    expect(page.locator("#progress")).to_contain_text("20 of 20 voted")
    last = read_votes(run / "votes.jsonl")[-2:]
    assert [(vote["winner"], vote["note"]) for vote in last] == [("tie", "120 uS"), ("both bad", "")]
    assert runs_nothing_of_theirs(page)


def test_the_pages_fit_a_phone_and_need_no_mouse(open_page: Open, run: Path, fake_models: None) -> None:
    for address in ("/vote", f"/vote?deck={run}&voter=Ann", "/talk"):
        page = open_page(address, wide=False)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
        unnamed = "el => !(el.labels?.length || el.getAttribute('aria-label') || el.textContent.trim())"
        fields = page.locator("main :is(button:not([hidden]), input:not([type=hidden]), select, textarea)")
        assert fields.count() and not any(fields.nth(at).evaluate(unnamed) for at in range(fields.count())), address


def test_a_conversation_by_keys(open_page: Open, run: Path, fake_models: None) -> None:
    page = open_page("/talk")
    turns, notice = page.locator(".turn"), page.locator("#notice")
    page.keyboard.type(HOSTILE)
    page.keyboard.press("Enter")
    expect(turns.nth(0).locator(".answer").nth(0)).to_contain_text(f"before 0: {HOSTILE}")
    expect(turns.nth(0).locator(".answer").nth(1)).to_contain_text(f"after 0: {HOSTILE}")
    assert runs_nothing_of_theirs(page)
    page.keyboard.type("more")
    page.keyboard.press("Enter")
    expect(turns.nth(1).locator(".answer").nth(1)).to_contain_text("after 0: more")
    expect(page.locator("#retry")).to_be_enabled()
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    expect(turns.nth(1).locator(".answer").nth(1)).to_contain_text("after 1: more")
    expect(page.locator("#retry")).to_be_enabled()
    page.keyboard.press("v")
    expect(notice).to_contain_text("said different things before")
    page.keyboard.press("e")
    expect(page.locator("#text")).to_have_value("more")
    assert turns.count() == 1 and page.evaluate("document.activeElement.id") == "text"
    # An answer that goes on until it is stopped; what was said stays.
    page.locator("#text").fill("go on")
    page.keyboard.press("Enter")
    expect(turns.nth(1).locator(".answer").nth(1)).to_contain_text("word word")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    expect(turns.nth(1).locator(".ended").nth(1)).to_have_text("stopped")
    expect(page.locator("#retry")).to_be_enabled()
    # One that nobody waits for any more holds nothing up.
    page.keyboard.press("r")
    expect(turns.nth(1).locator(".answer").nth(0)).to_contain_text("word word")
    page.keyboard.press("n")
    assert turns.count() == 0
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(turns.nth(0).locator(".answer").nth(1)).to_contain_text("after 0: hello")
    expect(page.locator("#compare")).to_be_enabled()
    page.keyboard.press("Escape")
    page.keyboard.press("v")
    expect(notice).to_contain_text("Put to the vote.")
    notice.get_by_role("link").press("Enter")
    page.wait_for_url("**/vote?deck=*")
    page.locator("[name=voter]").fill("Ann")
    page.keyboard.press("Enter")
    expect(page.locator(".ballot .prompt")).to_contain_text("hello")
    assert "training" not in page.locator(".ballot").inner_text()


def test_answers_made_ahead_are_voted_on(open_page: Open, run: Path, fake_models: None) -> None:
    rows = [{"prompt": f"prompt {number}", "chosen": "So.", "rejected": "No."} for number in range(30)]
    (run.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page("/talk")
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    page.locator("[name=prompts]").select_option("file")
    page.locator("[name=file]").fill("runs/prompts.jsonl")
    page.locator("[name=count]").fill("5")
    page.keyboard.press("Enter")
    expect(page.locator("#ahead")).to_contain_text(
        "5 of 5 prompts answered by one, before training, 5 by one, after training"
    )
    page = open_page(f"/vote?deck={run.parent}&voter=Bo")
    vote_by_keys(page, 5, lambda first, _: "1" if first.startswith("after") else "2")
    expect(page.locator("#results")).to_contain_text("one, after training against one, before training")


@pytest.mark.slow
def test_the_loop_is_closed(open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, vote on what it answers, see the interval in the report, train on the votes, and see that report."""
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    model = save_chat_model(tmp_path / "tiny", ends=(10, 46, 120))
    pairs = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def recipe(name: str, data: Path, **evaluate: Any) -> Any:
        return make_recipe(
            {
                "method": "dpo",
                "model": {"name": str(model), "dtype": "float32"},
                "lora": {"r": 4},
                "data": {"train": [{"path": str(data)}], "eval_fraction": 0.4},
                "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2},
                "evaluate": {"prompts": 20, "max_new_tokens": 8, "temperature": 1.0, **evaluate},
                "output_dir": str(tmp_path / "runs" / name),
            }
        )

    run = prefold.run(recipe("one", tmp_path / "pairs.jsonl"))
    samples = [sample for sample in read_jsonl(run / "samples.jsonl") if sample["before"] != sample["after"]]
    after, count = {bare(sample["after"][0]) for sample in samples}, len(samples)
    assert count > 15
    page = open_page(f"/vote?deck={run}&voter=Ann")
    vote_by_keys(page, count, lambda first, _: "1" if bare(first) in after else "2")
    expect(page.locator("#results")).to_contain_text("The answers of “one, after” are preferred")
    votes = run / "votes.jsonl"
    prefold.run(recipe("one", tmp_path / "pairs.jsonl", win_rate={"votes": str(votes)}))
    facts = json.loads((run / "evaluation" / "win_rate.json").read_text())
    assert (facts["votes"], facts["wins"], facts["verdict"]) == (count, count, "better")
    report = open_page(f"/runs/report?run={run}")
    expect(report.locator("#win-rate")).to_contain_text("How often 1 person prefers the answer after training")
    second = prefold.run(recipe("two", votes))
    data = json.loads((second / "data.json").read_text())
    assert data["sources"][0]["rows_used"] == count
    expect(open_page(f"/runs/report?run={second}").locator("body")).to_contain_text("votes.jsonl")


@pytest.mark.slow
def test_a_real_model_answers(open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "_SPEAKERS", {})
    run = tmp_path / "runs" / "one"
    model = save_chat_model(run / "merged", ends=(10, 46, 120))
    recipe = {"method": "dpo", "model": {"name": str(model)}, "data": {"train": [{"path": "pairs.jsonl"}]}}
    (run / "recipe.yaml").write_text(json.dumps({**recipe, "output_dir": str(run)}))
    (run / "run.log").write_text("")
    page = open_page("/talk")
    page.keyboard.type("Say word 3")
    page.keyboard.press("Enter")
    expect(page.locator("#retry")).to_be_enabled(timeout=10 * PATIENCE)
    assert set(page.locator(".turn .ended").all_inner_texts()) <= {"", CUT}


def bare(text: str) -> str:
    """Without spaces, and as a page shows it."""
    return "".join(readable(text).split())


CUT = "cut off at max_new_tokens"
