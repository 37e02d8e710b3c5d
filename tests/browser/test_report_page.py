"""The report in a real browser: it loads without an error, draws its curves, and runs nothing that a text brought."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from datetime import datetime, timedelta
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import prefold
from prefold.reports.live import LivePage
from prefold.reports.page import write_report
from prefold.terminal import progress_bar

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH")

FAKE_RUN = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "reports" / "fake_run.py"))

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
]

# Put at the end of a copy of the page: what is drawn, how wide the page is, and whether a hostile text ran.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const canvases = [];
  const visit = (node) => {
    if (node.shadowRoot) visit(node.shadowRoot);
    for (const child of node.children) { if (child.localName === "canvas") canvases.push(child); visit(child); }
  };
  document.querySelectorAll(".chart").forEach(visit);
  const colours = (canvas) => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 250) seen.add(pixels.slice(i, i + 3).join());
    return seen.size;
  };
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({
    colours: canvases.filter((canvas) => canvas.width && canvas.height).map(colours),
    overflow: document.documentElement.scrollWidth - innerWidth,
    title: document.title,
    owned: "owned" in window,
    scripts: document.scripts.length,
    forty_nine: document.body.innerText.includes("{{7*7}}"),
    stale: document.getElementById("stale")?.hidden === false,
    tallest_stage: Math.max(...[...document.querySelectorAll("#cost tbody th")].map((cell) => cell.offsetHeight)),
    first_screen: ["h1", ".description", "#example .answer.after"].map(
      (part) => document.querySelector(part)?.getBoundingClientRect().bottom),
    narrowest_bar: Math.min(...[...document.querySelectorAll(".bar")].map((bar) => bar.offsetWidth)),
  });
  document.body.append(found);
}, 1000));
</script>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
REFRESH = re.compile(r'<meta http-equiv="refresh"[^>]*>')
"""Of a page that is live; the browser's virtual time would have no end."""


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and what it said on the console, its own loading line left out."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "setting log level" not in line]
    return done.stdout, said


def probed(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Findings of `PROBE` on a copy of the page that has lost its content security policy: escaping alone must do."""
    text, removed = POLICY.subn("", page.read_text(encoding="utf-8"))
    assert removed == 1
    copy = folder / "copy.html"
    copy.write_text(REFRESH.sub("", text).replace("</body>\n</html>", PROBE + "</body>\n</html>"), encoding="utf-8")
    document, _ = browse(copy, folder, *flags)
    found = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    findings: dict[str, Any] = json.loads(unescape(found[1]))
    return findings


def hostile_run(folder: Path) -> Path:
    texts = FAKE_RUN["HOSTILE"]
    data = FAKE_RUN["DATA"] | {
        "findings": [{"kind": text, "severity": text, "count": 1, "message": text, "advice": text} for text in texts]
    }
    rows = FAKE_RUN["metrics"](5)
    rows[2]["loss"] = float("nan")
    return Path(
        FAKE_RUN["write_run"](
            folder,
            data=data,
            metrics=[row | dict.fromkeys(texts, 1.0) for row in rows],
            samples=[FAKE_RUN["sample"](text, text, text) for text in texts],
            environment={"packages": {text: text for text in texts}},
        )
    )


def test_it_loads_silently_in_the_frame_of_a_notebook(tmp_path: Path) -> None:
    page = tmp_path / "cell.html"
    page.write_text(prefold.show(FAKE_RUN["write_run"](tmp_path / "run"))._repr_html_(), encoding="utf-8")
    document, said = browse(page, tmp_path)
    assert document.count("<iframe") == 1 and said == []


def test_the_page_loads_silently_and_draws_its_curves(tmp_path: Path) -> None:
    page = write_report(FAKE_RUN["write_run"](tmp_path / "run"))
    _, said = browse(page, tmp_path)
    assert said == []
    found = probed(page, tmp_path)
    assert len([count for count in found["colours"] if count > 2]) >= 4
    assert found["title"].startswith("run: Held-out accuracy rose")


def test_no_script_of_a_hostile_text_runs(tmp_path: Path) -> None:
    page = write_report(hostile_run(tmp_path / "run"))
    document, said = browse(page, tmp_path)
    assert said == []
    assert "<title>run: Held-out accuracy rose" in document
    found = probed(page, tmp_path)
    assert not found["owned"] and found["title"].startswith("run: Held-out accuracy rose")
    assert found["forty_nine"]
    assert found["scripts"] == 4  # Data, library, drawing, and the probe.


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_first_screen_says_what_was_taught_with_an_answer(tmp_path: Path, width: int, height: int) -> None:
    recipe = "description: The model learns to answer in one or two short sentences.\n" + FAKE_RUN["RECIPE"]
    samples = [FAKE_RUN["sample"]("What does a compiler do?", "A lecture. " * 60, "It translates code.")]
    page = write_report(FAKE_RUN["write_run"](tmp_path / "run", recipe=recipe, samples=samples))
    # A window of Chromium is 500 wide at least.
    text = page.read_text(encoding="utf-8").replace("</head>", f"<style>html {{ width: {width}px; }}</style></head>")
    page.write_text(text, encoding="utf-8")
    bottoms = probed(page, tmp_path, f"--window-size={max(width, 500)},{height}")["first_screen"]
    assert bottoms == sorted(bottoms) and bottoms[-1] <= height


def test_a_phone_need_not_scroll_sideways(tmp_path: Path) -> None:
    page = write_report(hostile_run(tmp_path / "run"))
    assert probed(page, tmp_path, "--window-size=500,900")["overflow"] <= 0


def test_a_phone_cuts_no_word_and_leaves_bars_their_width(tmp_path: Path) -> None:
    rate = {"judge": {"kind": "reward", "name": "length"}, "prompts": 40, "win_rate": 0.6, "ci": [0.5, 0.7]}
    asked = FAKE_RUN["RECIPE"].replace("evaluate:\n", "evaluate:\n  win_rate: {judge: {name: length}}\n")
    page = write_report(FAKE_RUN["write_run"](tmp_path / "run", recipe=asked, win_rate=rate))
    # A window of Chromium is 500 wide at least.
    text = page.read_text(encoding="utf-8").replace("</head>", "<style>html { width: 390px; }</style></head>")
    page.write_text(text, encoding="utf-8")
    found = probed(page, tmp_path, "--window-size=500,900")
    assert found["tallest_stage"] < 45 and found["narrowest_bar"] > 140


@pytest.mark.parametrize(("width", "hours"), [(1280, 0), (500, 0), (500, 1)])
def test_the_live_page(tmp_path: Path, width: int, hours: int) -> None:
    unfinished = dict.fromkeys(("heldout", "samples", "merge"))
    live = LivePage(FAKE_RUN["write_run"](tmp_path / "run", **unfinished), ["check", "train", "report"], "report.html")
    with progress_bar("train", 300) as advance:
        advance(advance=120, text="loss 0.123")
        text = live.render("train")
    written = re.search(r'datetime="([^"]*)"', text)
    assert written
    earlier = datetime.fromisoformat(written[1]) - timedelta(hours=hours)
    page = tmp_path / "live.html"
    page.write_text(REFRESH.sub("", text.replace(written[1], earlier.isoformat())), encoding="utf-8")
    _, said = browse(page, tmp_path)
    assert said == []
    found = probed(page, tmp_path, f"--window-size={width},844")
    assert found["overflow"] <= 0 and len([count for count in found["colours"] if count > 2]) >= 4
    assert found["stale"] == (hours > 0)
