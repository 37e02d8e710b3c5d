"""`prefold ui` in a real browser: by the keyboard, at the width of a phone, with texts that would like to run; and on a
tiny model a run begun from the page and watched, its data decided about, and the next run begun from there."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH")

FAKE_RUN = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "reports" / "fake_run.py"))
HOSTILE = FAKE_RUN["HOSTILE"]
REFUSED = "status of 400"
"""What the browser says where the server refuses something, which is shown on the page."""
SIZES = [(1280, 800), (390, 844)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, among them a hostile one, and a file of pairs."""
    folder = tmp_path_factory.mktemp("ui")
    for name in ("first", "second"):
        FAKE_RUN["write_run"](folder / "runs" / name)
    texts = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    samples = [FAKE_RUN["sample"](text, text, text) for text in texts]
    FAKE_RUN["write_run"](folder / "runs" / "hostile", samples=samples, recipe=f"method: {json.dumps(texts[0])}\n")
    (folder / "runs" / "hostile" / "run.log").write_text("\n".join(texts), encoding="utf-8")
    rows = [{"prompt": f"Ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    rows += [{"prompt": text, "chosen": text, "rejected": f"not {text}"} for text in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as opened:
        yield opened


class served:
    """`prefold ui` as a process, in the folder that it serves; gives the address that it prints."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "prefold", "ui", str(folder), "--no-browser"]
        environment = {**os.environ, "PREFOLD_CACHE": str(folder / ".cache")}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __exit__(self, *error: object) -> None:
        with self.process:
            self.process.terminate()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page that was given the token. It fails where a script does, or where anything is asked for elsewhere."""
    context = browser.new_context(base_url=address.partition("/?")[0])
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and REFUSED not in said.text else None
    )
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    base = address.partition("/?")[0]
    page.on("request", lambda asked: None if asked.url.startswith((base, "data:")) else wrong.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def test_the_token_is_asked_for_and_leaves_the_address(browser: Any, address: str) -> None:
    stranger = browser.new_context().new_page()
    assert stranger.goto(address.partition("?")[0]).status == 403
    stranger.goto(address)
    assert stranger.url.endswith("/runs") and "token" not in stranger.url
    stranger.context.close()


def test_runs_by_the_keyboard(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("sec")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs?text=sec*")
    assert page.locator("tbody th a").all_inner_texts() == ["runs/second"]
    page.goto("/runs")
    for name in ("runs/first", "runs/second"):
        page.get_by_label(f"Mark {name}", exact=True).focus()
        page.keyboard.press("Space")
    page.wait_for_timeout(3500)  # the table was loaded anew meanwhile, and the marks are where they were
    page.keyboard.press("c")
    page.wait_for_url("**/runs/compare?*")
    assert page.locator("svg.lines").count() >= 4
    page.keyboard.press("u")
    page.wait_for_url("**/runs")
    page.keyboard.press("?")
    assert "Compare the marked" in page.get_by_role("dialog").inner_text()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    page.keyboard.press("n")
    page.wait_for_url("**/runs/new")


def test_a_row_is_struck_by_the_keyboard(page: Any, folder: Path) -> None:
    page.goto("/data/rows?path=pairs.jsonl")
    page.keyboard.press("f")
    page.wait_for_url("**after=50*")
    page.locator("#row-52").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**row=52")
    page.keyboard.press("j")
    page.wait_for_url("**row=53")
    with page.expect_response("**/data/decide") as refused:
        page.keyboard.press("x")
    assert refused.value.status == 400
    page.get_by_text("a decision without a reason").wait_for()
    page.keyboard.press("w")
    page.keyboard.type("x: both are wrong")  # a letter that is a key elsewhere is text in a field
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    page.get_by_text("Struck: x: both are wrong").wait_for()
    [line] = (folder / "pairs.decisions.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 53
    page.keyboard.press("o")
    page.get_by_text("Struck").wait_for(state="detached")


PAGES = [
    *(
        "/runs",
        "/runs/run?run=runs/first",
        "/runs/run?run=runs/hostile",
        "/runs/compare?run=runs/first&run=runs/second",
    ),
    *("/runs/new", "/data", "/data/rows?path=pairs.jsonl&after=50", "/data/row?path=pairs.jsonl&row=61"),
    *("/data/row?path=pairs.jsonl&row=108", "/samples", "/samples?run=runs/hostile", "/data?recipe=demo"),
]


@pytest.mark.parametrize("path", PAGES)
def test_no_text_runs_and_nothing_is_wider_than_a_phone(page: Any, path: str) -> None:
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.goto(path)
        assert page.title() != "owned" and not page.evaluate("'owned' in window")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width
    if path == "/data?recipe=demo":
        page.goto("about:blank")  # the check behind it need not be waited for


NAMELESS = """() => [...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a")]
  .filter((it) => !(it.getAttribute("aria-label") || it.textContent.trim() || it.labels?.length || it.title))
  .map((it) => it.outerHTML)"""


@pytest.mark.parametrize("path", PAGES)
def test_a_screen_reader_has_a_name_for_everything(page: Any, path: str) -> None:
    page.goto(path)
    assert page.evaluate(NAMELESS) == []
    assert page.locator("h1").count() == page.locator("main").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"
    keys = page.evaluate("[...document.querySelectorAll('[data-key]')].map((it) => it.dataset.key)")
    assert len(keys) == len(set(keys)), keys
    if path == "/data?recipe=demo":
        page.goto("about:blank")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_on_their_ground(browser: Any, address: str, scheme: str) -> None:
    """By the contrast of WCAG, of every text on the page with what is behind it."""
    page = browser.new_context(color_scheme=scheme, base_url=address.partition("/?")[0]).new_page()
    page.goto(address)
    for path in ("/runs", "/runs/run?run=runs/first", "/data/row?path=pairs.jsonl&row=1", "/runs/new"):
        page.goto(path)
        assert page.evaluate(CONTRAST) == [], path
    page.context.close()


CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const linear = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (it) => {
    for (; it; it = it.parentElement) {
      const colour = parse(getComputedStyle(it).backgroundColor);
      if (colour.a > 0.99) return colour.rgb;
    }
  };
  const low = [];
  for (const it of document.querySelectorAll("main *, body > nav *")) {
    const says = [...it.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!says || !it.offsetParent || it.closest("svg, option, optgroup, .unseen, .busy")) continue;
    const both = [light(parse(getComputedStyle(it).color).rgb), light(ground(it))];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) low.push(`${it.className} ${it.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return [...new Set(low)];
}"""


RECIPE = """method: dpo
model: {name: tiny, dtype: float32}
lora: {r: 4}
data:
  train: [{path: pairs.jsonl}]
  eval_fraction: 0.3
train: {batch_size: 4, max_steps: 6, learning_rate: 5e-3, save_steps: 2}
evaluate: {prompts: 2, max_new_tokens: 8}
output_dir: runs/first
"""


@pytest.mark.slow
def test_a_whole_round(browser: Any, tmp_path: Path) -> None:
    from tiny_tokenizer import save_chat_model

    save_chat_model(tmp_path / "tiny")
    rows = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(tmp_path) as address:
        page = browser.new_context(base_url=address.partition("/?")[0]).new_page()
        page.set_default_timeout(240_000)
        page.goto(address)
        begin_a_run(page)
        look_at_it(page)
        strike_a_row(page)
        begin_the_next(page)
        page.context.close()
    steps = (tmp_path / "runs" / "first-2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 61))
    made = json.loads((tmp_path / "runs" / "first-2" / "data.json").read_text())
    assert made["sources"][0]["rows_used"] == 19
    assert [finding["rows"][0]["row"] for finding in made["findings"] if finding["kind"] == "struck"] == [2]
    assert "struck by" in (tmp_path / "runs" / "first-2" / "report.html").read_text()


def begin_a_run(page: Any) -> None:
    """What is wrong with its recipe is said while it is written."""
    page.get_by_role("link", name="New run").click()
    page.fill("#text", RECIPE.replace("lora:", "loora:"))
    page.locator("#checked").get_by_text("`loora` is not a field").wait_for()
    page.fill("#text", RECIPE)
    page.locator("#checked").get_by_text("The data can be trained on.").wait_for()
    page.fill("[name=name]", "../first.yaml")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("cannot be its name").wait_for()
    assert page.input_value("#text") == RECIPE
    page.fill("[name=name]", "first.yaml")
    page.get_by_role("button", name="Start").click()
    page.locator(".state.done").wait_for()


def look_at_it(page: Any) -> None:
    assert "held-out accuracy" in page.inner_text("main").lower() and page.locator("svg.lines").count() >= 4
    assert "evaluate" in page.inner_text(".log")
    page.get_by_role("link", name="Report").click()
    assert "accuracy" in page.title()
    page.goto("/samples?run=runs/first")
    assert page.locator(".exchange").count() == 6


def strike_a_row(page: Any) -> None:
    page.goto("/data?recipe=runs/first")
    page.locator(".findings").wait_for()
    page.goto("/data/row?recipe=runs/first&n=0&row=2")
    page.locator("#tokens .token.trained").first.wait_for()
    page.fill("[name=reason]", "both are wrong")
    page.get_by_role("button", name="Strike it").click()
    page.get_by_text("Struck: both are wrong").wait_for()


def begin_the_next(page: Any) -> None:
    """From the recipe of the first, with what was decided; it is stopped, and goes on."""
    page.goto("/runs/new?from=runs/first")
    assert "decisions: runs/first.decisions.jsonl" in page.input_value("#text")
    page.locator("#checked").get_by_text("struck by `data.decisions`").wait_for()
    page.fill("#text", page.input_value("#text").replace("max_steps: 6", "max_steps: 60"))
    page.get_by_role("button", name="Start").click()
    page.get_by_text(re.compile(r"^[1-9]\d* steps$")).first.wait_for()
    page.get_by_role("button", name="Stop after this step").click()
    page.locator(".state.stopped").wait_for()
    assert "stopping after this step" in page.inner_text(".log")
    page.get_by_role("button", name="Continue").click()
    page.locator(".state.done").wait_for()
