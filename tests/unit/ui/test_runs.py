"""The pages of runs: what is listed, what is shown of one and of several, and what is started."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_texts import HOSTILE, ORIGIN, require_harmless
from starlette.testclient import TestClient

from prefold.ui import jobs
from prefold.ui.run_index import RunIndex, run_folders
from prefold.ui.worker import checker

Client = Callable[..., TestClient]
Fake = Callable[..., Path]
RECIPE = "method: dpo\nmodel: {name: tiny}\ndata:\n  train: [{path: pairs.jsonl}]\noutput_dir: runs/mine\n"


def listed(client: TestClient, query: str = "") -> list[str]:
    found = re.findall(r'id="run-\d+">([^<]*)</a>', client.get(f"/runs{query}").text)
    return sorted(found)


def test_runs_are_listed_and_filtered(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "deep" / "er" / "b", recipe="method: orpo\nmodel: {name: other}\n")
    (tmp_path / "deep" / "er" / "b" / "merged" / "README.md").unlink()
    (tmp_path / ".hidden").mkdir()
    fake_run(tmp_path / ".hidden" / "c")
    client = ui_client(tmp_path)
    assert listed(client) == ["a", "deep/er/b"]
    assert (
        listed(client, "?method=orpo")
        == listed(client, "?state=stopped")
        == listed(client, "?text=OTHER")
        == ["deep/er/b"]
    )
    assert listed(client, "?verdict=better&state=done") == ["a"]
    assert listed(client, "?text=nothing") == []
    assert "Held-out accuracy rose" in client.get("/runs/rows").text


def test_a_run_is_running_while_its_folder_is_locked(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    folder, client = fake_run(tmp_path / "a"), ui_client(tmp_path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert listed(client, "?state=running") == ["a"]
        # By this process, which is not `prefold run`.
        assert "Ctrl-C stops it where it was started" in client.get(f"/runs/run?run={folder}").text
        refused = client.post("/runs/stop", data={"run": str(folder)}, headers=ORIGIN)
        assert refused.status_code == 400 and "Ctrl-C" in refused.text
        assert client.post("/runs/continue", data={"run": str(folder)}, headers=ORIGIN).status_code == 400
    finally:
        os.close(descriptor)
    assert listed(client, "?state=running") == []


def test_what_was_read_of_a_run_is_read_anew_once_it_changes(fake_run: Fake, tmp_path: Path) -> None:
    folder, index = fake_run(tmp_path / "a"), RunIndex((tmp_path,))
    [row] = index.rows()
    assert row.facts and row.facts.outcome == "better" and row.state == "done"
    (folder / "evaluation" / "heldout.json").unlink()
    [row] = index.rows()
    assert row.facts and row.facts.outcome == "missing"


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a")
    (folder / "evaluation" / "heldout.json").write_text("{")
    client = ui_client(tmp_path)
    assert listed(client) == ["a"] and "cannot be read" in client.get("/runs").text
    assert client.get(f"/runs/run?run={folder}").status_code == 400


def test_links_out_of_the_folders_are_not_followed(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    outside = fake_run(tmp_path / "outside" / "a")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    client = ui_client(inside)
    assert list(run_folders(inside)) == [] and listed(client) == []
    for path in (str(outside), str(inside / "link"), "../outside/a", "link", "~root", "a\x00b", "/etc"):
        for page in ("/runs/run", "/runs/report", "/samples", "/runs/new?x=1"):
            name = "from" if "new" in page else "run"
            answer = client.get(page, params={name: path})
            assert answer.status_code in (400, 403, 404), (page, path)
            assert "SmolLM2" not in answer.text
        assert client.post("/runs/continue", data={"run": path}, headers=ORIGIN).status_code in (403, 404)
    (inside / "mine").mkdir()
    (inside / "mine" / "recipe.yaml").write_text("method: dpo\n")
    (inside / "mine" / "report.html").symlink_to(outside / "data.json")
    assert client.get("/runs/report?run=mine").status_code == 403


def test_a_report_is_shown_where_it_can_do_nothing(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a")
    assert ui_client(tmp_path).get("/runs/report?run=a").status_code == 404
    (folder / "report.html").write_text("<script>fetch('/runs/stop')</script>")
    answer = ui_client(tmp_path).get("/runs/report?run=a")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;") and "default-src 'none'" in policy
    assert "allow-same-origin" not in policy and "connect-src" not in policy


def test_hostile_texts_of_a_run_are_text(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        recipe = {"method": text, "description": text, "model": {"name": text}, text: text, "data": {text: text}}
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        (folder / "run.log").write_text(text, encoding="utf-8")
    client = ui_client(tmp_path)
    pages = ["/runs", "/runs?page=2", "/runs?page=3"]
    for number in range(0, len(HOSTILE), 3):
        pages += [f"/runs/run?run={number}", f"/runs/compare?run={number}&run=0&run=1", f"/runs/new?from={number}"]
    for path in pages:
        answer = client.get(path)
        assert answer.status_code == 200 or "compare" in path, answer.text
        require_harmless(answer.text)
    for text in HOSTILE[::9]:
        for path in ("/runs", "/samples", "/data/rows", "/runs/run"):
            given = dict.fromkeys(("text", "run", "path", "method", "n"), text)
            require_harmless(client.get(path, params=given).text)


def test_a_folder_with_a_hostile_name_is_text(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    for name in ("<img src=x onerror=alert(1)>", "' onclick='x", "{{ 7 * 7 }}", "\u202eabc", "?a=b&c#d"):
        fake_run(tmp_path / name)
        client = ui_client(tmp_path)
        for path in ("/runs", "/runs/run", "/samples", "/data", "/runs/new"):
            text = client.get(path, params={"run": name} if path != "/runs/new" else {"from": name}).text
            require_harmless(text)
        assert client.get("/runs/run", params={"run": name}).status_code == 200


def test_several_runs_are_drawn_over_one_another_and_their_recipes_compared(
    ui_client: Client, fake_run: Fake, tmp_path: Path
) -> None:
    fake_run(tmp_path / "a")
    fake_run(
        tmp_path / "b", recipe="method: dpo\ndpo: {beta: 0.7}\nmodel: {name: HuggingFaceTB/SmolLM2-135M-Instruct}\n"
    )
    client = ui_client(tmp_path)
    text = client.get("/runs/compare?run=a&run=b").text
    assert text.count('<svg class="lines"') >= 3 and 'class="line stroke-1' in text
    differing = text[text.index("<h2>Recipes") : text.index("fields that are the same")]
    assert re.search(r"dpo\.beta.*0\.1.*0\.7", differing, re.DOTALL) and "model.name" not in differing
    assert client.get("/runs/compare?run=a").status_code == 400
    assert client.get("/runs/compare?run=a&run=a").status_code == 400


def test_a_new_run_begins_with_the_recipe_of_another_in_a_free_folder(
    ui_client: Client, fake_run: Fake, tmp_path: Path
) -> None:
    fake_run(tmp_path / "runs" / "a")
    fake_run(tmp_path / "runs" / "a-2")
    (tmp_path / "runs" / "a.decisions.jsonl").write_text("")
    text = ui_client(tmp_path).get("/runs/new?from=runs/a").text
    assert "output_dir: runs/a-3" in text and "decisions: runs/a.decisions.jsonl" in text and 'value="a-3.yaml"' in text


OUTSIDE = ["data:\n  train: [{path: PATH}]", "data:\n  eval: [{path: PATH}]", "data:\n  decontaminate: [{path: PATH}]"]
OUTSIDE += ["data:\n  decisions: PATH", "rewards: [{file: PATH}]", "data:\n  train: [{path: '../*.jsonl'}]"]
OUTSIDE += ["evaluate: {include_path: PATH}", "evaluate: {win_rate: {judge: {file: PATH}}}", "publish: {to: ../new}"]


@pytest.mark.parametrize("field", OUTSIDE)
def test_a_recipe_does_not_lead_out_of_the_folders(ui_client: Client, tmp_path: Path, started: Any, field: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}')
    (tmp_path / "inside" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    client = ui_client(tmp_path / "inside")
    for path in (str(tmp_path / "secret.jsonl"), "../secret.jsonl", "link.jsonl"):
        text = f"method: dpo\noutput_dir: mine\n{field.replace('PATH', path)}\n"
        assert "in none of the folders" in client.post("/runs/check", data={"text": text}, headers=ORIGIN).text
        fields = {"text": text, "name": "mine.yaml", "folder": str(tmp_path / "inside")}
        assert client.post("/runs/start", data=fields, headers=ORIGIN).status_code == 403
        (tmp_path / "inside" / "there.yaml").write_text(text)
        if "data:" in field:
            assert client.get("/data/findings?recipe=there.yaml").status_code in (400, 403)
    assert not started and not (tmp_path / "inside" / "mine.yaml").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "evaluation", "samples.jsonl", "run.log"])
def test_a_file_of_a_run_that_leads_out_of_the_folders_is_not_shown(
    ui_client: Client, fake_run: Fake, tmp_path: Path, name: str
) -> None:
    outside = fake_run(tmp_path / "outside")
    (outside / "run.log").write_text("secret")
    folder = fake_run(tmp_path / "inside" / "a")
    shutil.rmtree(folder / name) if name == "evaluation" else (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / name)
    client = ui_client(tmp_path / "inside")
    for page in (
        "/runs/run?run=a",
        "/samples?run=a",
        "/runs/new?from=a",
        "/data?recipe=a",
        "/runs/compare?run=a&run=a/.",
    ):
        assert client.get(page).status_code in (400, 403, 404), page
    assert client.get("/runs").status_code == 200


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jobs, "start", lambda *given: calls.append(given))
    return calls


def test_starting_writes_the_recipe_and_runs_it(ui_client: Client, tmp_path: Path, started: list[Any]) -> None:
    client, fields = (
        ui_client(tmp_path),
        {"text": RECIPE.replace("\n", "\r\n"), "name": "mine.yaml", "folder": str(tmp_path)},
    )
    answer = client.post("/runs/start", data=fields, headers=ORIGIN, follow_redirects=False)
    folder = tmp_path.resolve() / "runs" / "mine"
    assert answer.status_code == 303 and answer.headers["location"].endswith("runs%2Fmine")
    assert started == [(folder, [str(tmp_path.resolve() / "mine.yaml")], tmp_path.resolve())]
    assert (tmp_path / "mine.yaml").read_text() == RECIPE
    other = fields | {"text": RECIPE + "# other\n"}
    answer = client.post("/runs/start", data=other, headers=ORIGIN)
    assert answer.status_code == 400 and "another recipe in this file" in answer.text and len(started) == 1
    client.post("/runs/start", data=other | {"replace": "1"}, headers=ORIGIN, follow_redirects=False)
    assert (tmp_path / "mine.yaml").read_text() == RECIPE + "# other\n"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"text": RECIPE.replace("runs/mine", "/tmp/elsewhere")}, 403),
        ({"text": RECIPE.replace("runs/mine", "../elsewhere")}, 403),
        ({"text": RECIPE.replace("output_dir: runs/mine\n", "")}, 400),
        ({"text": "a: [1"}, 400),
        ({"text": "- 1"}, 400),
        ({"text": "output_dir: 3"}, 400),
        ({"name": "../mine.yaml"}, 400),
        ({"name": "mine.py"}, 400),
        ({"name": ".mine.yaml"}, 400),
        ({"name": "pairs.jsonl"}, 400),
        ({"folder": "/etc"}, 403),
        ({"text": "x" * 5_000_000}, 413),
    ],
)
def test_what_is_not_to_be_started_leaves_nothing(
    ui_client: Client, tmp_path: Path, started: list[Any], changes: dict[str, str], status: int
) -> None:
    fields = {"text": RECIPE, "name": "mine.yaml", "folder": str(tmp_path)} | changes
    answer = ui_client(tmp_path).post("/runs/start", data=fields, headers=ORIGIN)
    assert answer.status_code == status and not started and not list(tmp_path.glob("*.yaml"))


def test_nothing_is_started_from_another_origin(ui_client: Client, tmp_path: Path, started: list[Any]) -> None:
    fields = {"text": RECIPE, "name": "mine.yaml", "folder": str(tmp_path)}
    for headers in ({}, {"origin": "http://evil.example"}, {"origin": "null"}):
        assert ui_client(tmp_path).post("/runs/start", data=fields, headers=headers).status_code == 403
    assert not started


def test_a_job_goes_on_by_itself_is_followed_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "import sys, time",
        "print('began', flush=True)",
        "try: time.sleep(60)",
        "except KeyboardInterrupt: sys.exit(3)",
    ]
    (tmp_path / "prefold.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    job = jobs.start(folder, ["RECIPE"], tmp_path)
    signal.signal(signal.SIGINT, before)
    assert os.getsid(job.pid) == job.pid != os.getsid(0)
    deadline = time.monotonic() + 20
    while "began" not in job.said() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert jobs.job_of(folder) == job and job.is_running and job.code is None
    with pytest.raises(Exception, match="another process is at work"):
        jobs.start(folder, ["RECIPE"], tmp_path)
    job.stop()
    while job.is_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.code == 3
    # Another process with the number is not it.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert not jobs.Job(str(folder), other.pid, job.created - 100, job.log).is_running
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="this system does not tell who has a lock")
@pytest.mark.parametrize(("command", "may_stop"), [("run", True), ("ui", False)])
def test_a_run_that_was_started_elsewhere_is_stopped(
    ui_client: Client, fake_run: Fake, tmp_path: Path, monkeypatch: Any, command: str, may_stop: bool
) -> None:
    """The process that took the lock gets the signal, and not the one that shares the descriptor with it."""
    lines = [
        "import fcntl, os, signal, sys, time",
        "descriptor, parent = os.open(sys.argv[2], os.O_RDONLY), os.getpid()",
        "is_parent = os.fork() > 0",
        "signal.signal(signal.SIGTERM, lambda *_: print('stopped', is_parent, flush=True))",
        "if is_parent: time.sleep(60)",
        "fcntl.flock(descriptor, fcntl.LOCK_EX)",
        "print('began', flush=True)",
        "while os.getppid() == parent: time.sleep(0.1)",
    ]
    (tmp_path / "prefold.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder, client = fake_run(tmp_path / "a"), ui_client(tmp_path)
    arguments = [sys.executable, "-m", "prefold", command, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "began\n"
        try:
            assert ("Stop after this step" in client.get(f"/runs/run?run={folder}").text) == may_stop
            answer = client.post("/runs/stop", data={"run": "a"}, headers=ORIGIN, follow_redirects=False)
            assert answer.status_code == (303 if may_stop else 400)
            assert not may_stop or process.stdout.readline() == "stopped False\n"
        finally:
            process.kill()


def test_a_job_that_was_refused_is_shown_with_what_it_said(ui_client: Client, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "prefold.py").write_text("import sys\nsys.exit('prefold: no such model')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = jobs.start(tmp_path / "run", ["RECIPE"], tmp_path)
    while job.is_running:
        time.sleep(0.05)
    text = ui_client(tmp_path).get(f"/runs/run?run={tmp_path}/run").text
    assert "exit code 1" in text and "prefold: no such model" in text


def test_a_recipe_is_checked_as_it_is_written(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    try:
        answer = client.post("/runs/check", data={"text": "- 1"}, headers=ORIGIN)
        assert answer.status_code == 200 and "is not a mapping of sections" in answer.text
        checker.child.kill()  # type: ignore[union-attr]
        checker.child.wait()  # type: ignore[union-attr]
        answer = client.post("/runs/check", data={"text": "a: [1"}, headers=ORIGIN)
        assert "not valid YAML" in answer.text
        assert client.post("/runs/check", data={"text": " "}, headers=ORIGIN).status_code == 200
    finally:
        checker.end()
