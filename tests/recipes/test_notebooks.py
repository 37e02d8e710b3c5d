"""The notebooks as a person runs them, cell by cell in a kernel; what they show, what an interrupted cell leaves."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

import prefold

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
LONGEST = 12
"""Cells."""
SHORT = ("evaluate.prompts=2", "evaluate.tasks=[]", "evaluate.max_new_tokens=4", "train.max_steps=2")
OURS_ARE_ERRORS = 'import warnings; warnings.filterwarnings("error", module="prefold")'


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels find this package, and neither they nor their files touch the user's own."""
    folder, package = tmp_path_factory.mktemp("kernels"), Path(prefold.__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / name.lower()))
        yield


def executed(path: Path, folder: Path, changes: list[str]) -> NotebookNode:
    """The notebook with its outputs, after its cells were run in a folder."""
    book = nbformat.read(path, as_version=4)
    [place] = [number for number, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    given = f"CHANGES = {changes!r}\n{OURS_ARE_ERRORS}"
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(given, id="given"))
    NotebookClient(book, timeout=3000, resources={"metadata": {"path": str(folder)}}).execute()
    return book


def outputs(book: NotebookNode, ident: str) -> list[NotebookNode]:
    [cell] = [cell for cell in book.cells if cell.id == ident]
    return list(cell.outputs)


def text(book: NotebookNode, ident: str) -> str:
    """What a cell shows without HTML."""
    return "".join(output.get("text") or output.data["text/plain"] for output in outputs(book, ident))


def page(book: NotebookNode, ident: str) -> str:
    """The page that a cell shows in a frame, behind the bars of what took a while."""
    *_, html = [output.data["text/html"] for output in outputs(book, ident) if "text/html" in output.get("data", {})]
    assert html.startswith('<iframe srcdoc="') and 'sandbox="allow-scripts"' in html
    return re.sub("</?span[^>]*>", "", unescape(html.split('"')[1]))  # each token has an element of its own


def assert_shown(book: NotebookNode, held_out: str) -> None:
    every = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" for output in every), every
    # tqdm, which Hub and transformers import, misses a package that notebooks usually have.
    said = [output.text for output in every if output.get("name") == "stderr"]
    assert all("IProgress not found" in text for text in said), said
    assert "optimizer steps" in text(book, "check") and "ok" in text(book, "check")
    assert "The data can be trained on." in page(book, "check")
    for stage in ("check", "train", "merge", "evaluate", "report"):
        assert f"\n{stage}\n" in f"\n{text(book, 'run')}"
    assert not any("\x1b" in output.get("text", "") for output in every)
    # A bar is one output that is replaced.
    bars = [output.data["text/plain"] for output in outputs(book, "run") if output.output_type == "display_data"]
    assert ["2/2" in bar for bar in bars if bar.startswith("train ")] == [True]
    table = text(book, "report")
    assert held_out in table and "before" in table and "after" in table
    report = page(book, "report")
    assert report.startswith("<!doctype html>") and 'class="chart"' in report and "Before" in report
    assert "Why do cats purr?" in text(book, "generate")
    assert "model.safetensors" in text(book, "publish") and "README.md" in text(book, "publish")


def own_rows(folder: Path, rows: list[dict[str, str]]) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = json.dumps([{"path": str(folder / "rows.jsonl")}])
    return [f"data.train={source}", "data.eval=[]", "data.eval_fraction=0.3"]


def pairs_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(count)]


@pytest.mark.parametrize("name", ["dpo", pytest.param("orpo", marks=pytest.mark.slow)])
def test_pairs(name: str, tiny_model: Path, tmp_path: Path) -> None:
    if name == "orpo":
        pytest.importorskip("bitsandbytes")
    changes = [f"model.name={tiny_model}", *SHORT, "train.learning_rate=1e-2", "train.warmup_steps=0"]
    [path] = [path for path in NOTEBOOKS if path.stem == name]
    book = executed(path, tmp_path, [*changes, *own_rows(tmp_path, pairs_of(20))])
    assert_shown(book, "held-out pairs")
    assert "WORD" in text(book, "check") and "WORD" in page(book, "check")
    assert not (tmp_path / "published").exists()


def test_prompts(tiny_model: Path, tmp_path: Path) -> None:
    changes = [f"model.name={tiny_model}", *SHORT, "train.learning_rate=1e-2", "grpo.max_completion_length=8"]
    rows = own_rows(tmp_path, [{"prompt": f"Say {number}"} for number in range(12)])
    [path] = [path for path in NOTEBOOKS if path.stem == "grpo"]
    book = executed(path, tmp_path, [*changes, *rows])
    assert_shown(book, "held-out prompts")
    assert text(book, "generate").count(" characters, cut off: ") == 4


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_as_they_stand(path: Path, smollm2: Path, tmp_path: Path) -> None:
    """The small recipes on their own model and data, shortened."""
    if path.stem == "orpo":
        pytest.importorskip("bitsandbytes")
    fewer = ("data.train.0.count=8", "data.eval.0.count=8", "train.batch_size=4")
    book = executed(path, tmp_path, [f"model.name={smollm2}", *SHORT, *fewer])
    assert_shown(book, "held-out prompts" if path.stem == "grpo" else "held-out pairs")


# ---- as they are committed --------------------------------------------------------------------------------------


def test_there_is_one_for_each_tutorial() -> None:
    assert NAMES == ["dpo", "grpo", "orpo"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_clean(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert len(book.cells) <= LONGEST
    written = path.read_text(encoding="utf-8")
    assert not any(place in written for place in ("/home", "/root", "/tmp", "/Users", str(Path.home())))
    assert "FULL = False" in written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
@pytest.mark.parametrize("full", [False, True])
def test_both_recipes_load(path: Path, full: bool) -> None:
    [cell] = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "recipe"]
    found: dict[str, Any] = {"FULL": full, "CHANGES": ["train.max_steps=3"]}
    exec(cell.source, found)
    # The small recipe for DPO is the demo's.
    assert found["recipe"].method == ("mixed" if path.stem == "dpo" and not full else path.stem)
    assert found["recipe"].train.max_steps == 3
    assert found["recipe"].model.load_in_4bit == (path.stem == "orpo" or (full and path.stem == "dpo"))


# ---- the kernel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(
    tmp_path_factory: pytest.TempPathFactory, kernels: None
) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    folder, manager = tmp_path_factory.mktemp("kernel"), KernelManager()
    manager.start_kernel(cwd=str(folder), env={**os.environ, "PREFOLD_CACHE": str(folder / "cache")})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def reply(client: BlockingKernelClient, sent: str) -> dict[str, Any]:
    while True:
        message = client.get_shell_msg(timeout=120)
        if message["parent_header"].get("msg_id") == sent:
            return dict(message["content"])


def test_an_interrupted_cell_goes_on(
    kernel: tuple[KernelManager, BlockingKernelClient], tiny_model: Path, tmp_path: Path
) -> None:
    manager, client = kernel
    steps, folder = 150, tmp_path / "run"
    changes = [f"model.name={tiny_model}", *SHORT, f"train.max_steps={steps}", "train.save_steps=1000"]
    changes.append(f"output_dir={folder}")
    code = f"import prefold; prefold.run('demo', {[*changes, *own_rows(tmp_path, pairs_of(20))]!r})"
    # The kernel aborts what it is asked within moments of an error otherwise, as cells queued after it.
    sent = client.execute(code, stop_on_error=False)
    until = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text().count("\n") > 2):
        assert time.monotonic() < until
        time.sleep(0.01)
    manager.interrupt_kernel()
    stopped = reply(client, sent)
    assert (stopped["status"], stopped.get("ename")) == ("error", "KeyboardInterrupt"), stopped
    [checkpoint] = (folder / "checkpoints").glob("checkpoint-*")
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert checkpoint.name == f"checkpoint-{done}" and 2 < done < steps
    assert reply(client, client.execute(code))["status"] == "ok"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == steps


def test_a_mistake_is_its_message(kernel: tuple[KernelManager, BlockingKernelClient]) -> None:
    _, client = kernel
    found = reply(client, client.execute("import prefold; prefold.run('demo', ['train.max_stesp=3'])"))
    assert found["status"] == "error" and "max_steps" in found["evalue"]
    assert found["traceback"] == [f"UserError: {found['evalue']}"]
