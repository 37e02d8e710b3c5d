"""What a process holds, what is at hand, and what is refused before it is loaded."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_tokenizer import save_chat_model
from transformers import AutoModelForCausalLM

import prefold
from prefold import memory
from prefold.errors import UserError
from prefold.generation import chat, opening
from prefold.generation.opening import how_to_keep, open_model, stored_weights
from prefold.memory import ANYWAY, PeakMemory, available, held, require
from prefold.plan.machine import Machine
from prefold.recipe import Model

MB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


# ---- what is held -----------------------------------------------------------------------------------------------


def mapped_files_are_not_held(path: Path) -> None:
    path.write_bytes(bytes(64 * MB))
    before = held() or 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert (held() or 0) - before < 16 * MB
    own = bytearray(64 * MB)
    own[::4096] = b"1" * (len(own) // 4096)
    assert (held() or 0) - before > 48 * MB


def the_peak_is_seen_and_starts_anew_with_each_stage(path: Path) -> None:
    peak, before = PeakMemory(), held() or 0
    peak.restart()
    own = b"1" * (96 * MB)
    time.sleep(0.3)
    del own
    assert (peak.read() or 0) - before > 80 * MB
    peak.restart()
    assert (peak.read() or 0) - before < 40 * MB


@linux
@pytest.mark.parametrize("case", [mapped_files_are_not_held, the_peak_is_seen_and_starts_anew_with_each_stage])
def test_what_a_process_holds(case: Callable[[Path], None], tmp_path: Path) -> None:
    """In one of its own: what other tests have freed is taken up again in theirs."""
    process = get_context("spawn").Process(target=case, args=(tmp_path / "file",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "sunos")
    peak = PeakMemory()
    peak.restart()
    assert held() is None and peak.read() is None


# ---- what is at hand --------------------------------------------------------------------------------------------

STAT = "{cached} 300\n{shared} 100\nrss 5\n"


def group(folder: Path, names: tuple[str, str], limit: str, used: int, kinds: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(STAT.format(cached=kinds[0], shared=kinds[1]))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


SECOND = (("memory.max", "memory.current"), ("file", "shmem"))
FIRST = (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("total_cache", "total_shmem"))


@pytest.mark.parametrize("bound", ["a", "a/b"])
def test_the_tightest_of_nested_groups_counts(groups: Path, bound: str) -> None:
    """What it holds beside cached files; those that live in memory alone stay."""
    (groups / "own").write_text("0::/a/b\n")
    (groups / "cgroup.controllers").write_text("memory\n")
    for name in ("a", "a/b"):
        group(groups / name, SECOND[0], "1000" if name == bound else "max", 700, SECOND[1])
    assert available() == 1000 - 700 + 300 - 100


def test_groups_of_the_first_version(groups: Path) -> None:
    (groups / "own").write_text("5:cpu:/x\n4:memory:/container/inner\n0::/\n")
    # In a container the path is the host's, and the root is its own group.
    group(groups / "memory", FIRST[0], "5000", 1000, FIRST[1])
    assert available() == 5000 - 1000 + 200


def test_a_group_that_is_over_its_limit_leaves_nothing(groups: Path) -> None:
    (groups / "own").write_text("0::/\n")
    (groups / "cgroup.controllers").write_text("memory\n")
    group(groups, SECOND[0], "100", 700, SECOND[1])
    assert available() == 0


def test_without_groups_it_is_what_the_system_has(groups: Path) -> None:
    assert available() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@linux
@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_limits_of_ulimit(kind: str) -> None:
    limit = 3 * 10**9
    code = (
        f"import resource; resource.setrlimit(resource.{kind}, ({limit}, resource.RLIM_INFINITY));"
        "from prefold.memory import available, left_by_ulimit; print(available(), left_by_ulimit())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    least, left = map(int, found.split())
    assert 0.5 * limit < least <= limit and left >= least


def test_several_processes_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefold.plan.machine.available", lambda: 10**10)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine = Machine.here("cpu")
    assert machine.memory == 10**10 // 4 + machine.process
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY or not machine.counts_mapped


# ---- the refusal ------------------------------------------------------------------------------------------------


def test_what_is_refused_has_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    require("`merge`", 10, 10)
    with pytest.raises(UserError) as refused:
        require("`merge`", 18_700_000_000, 12_000_000_000, "this fits: merge.dtype=bfloat16")
    for words in ("`merge`", "18.7 GB", "12.0 GB", "merge.dtype=bfloat16", "--anyway"):
        assert words in str(refused.value)
    monkeypatch.setenv(ANYWAY, "1")
    require("`merge`", 20, 10)


# ---- how a model is kept while it is asked -----------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
AMPLE = Machine("cpu", 10**12, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """A model whose layers are more than its vocabulary, stored in a dtype."""
    made: dict[torch.dtype, Path] = {}

    def stored_in(dtype: torch.dtype) -> Path:
        if dtype not in made:
            made[dtype] = folder = tmp_path_factory.mktemp("models") / str(dtype)
            save_chat_model(folder, **SHAPE)
            AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
        return made[dtype]

    return stored_in


Models = Callable[[torch.dtype], Path]
HALVES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("stored", "half"), HALVES)
def test_16_bits_where_float32_does_not_fit(models: Models, stored: torch.dtype, half: torch.dtype) -> None:
    section = Model(name=str(models(stored)))
    numbers, largest, dtype = stored_weights(models(stored))
    whole = how_to_keep(section, AMPLE, measured=True)
    assert (whole.dtype, whole.widened, dtype) == (torch.float32, False, stored)
    narrow = how_to_keep(section, Machine("cpu", whole.needed - 1, 0), measured=True)
    assert (narrow.dtype, narrow.widened) == (half, True)
    assert whole.needed - narrow.needed == 2 * numbers - 4 * largest
    assert how_to_keep(section, AMPLE, measured=True, in_16_bits=True).widened
    # What is not measured is kept as the section says.
    said = Model(name=str(models(stored)), dtype="bfloat16")
    assert how_to_keep(said, Machine("cpu", 1, 0))[:2] == (torch.bfloat16, False)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_widened_modules_compute_what_float32_weights_do(models: Models, stored: torch.dtype) -> None:
    section, ids = Model(name=str(models(stored))), torch.arange(3, 40)[None]
    whole = open_model(section, "test", measured=True, in_16_bits=False)
    narrow = open_model(section, "test", measured=True, in_16_bits=True)
    with torch.no_grad():
        wanted, found = (model(input_ids=ids, use_cache=False).logits for model in (whole, narrow))
    assert {weight.dtype for weight in narrow.parameters()} == {stored}
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def small(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A machine that has no more memory than that."""
    monkeypatch.setattr("prefold.plan.machine.available", lambda: 0)
    monkeypatch.setattr("prefold.plan.machine.held", lambda: size)


def test_generate_refuses_before_it_loads(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(opening, "load_start", lambda *args, **kwargs: pytest.fail("a model was loaded"))
        with pytest.raises(UserError, match=r"needs \d+.* are at hand"):
            prefold.generate(models(torch.bfloat16), "Hello", max_new_tokens=2)
    monkeypatch.setenv(ANYWAY, "1")
    assert len(prefold.generate(models(torch.bfloat16), "Hello", max_new_tokens=2)) == 1


def test_two_models_that_do_not_fit_speak_in_turn(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that has spoken only its answers stay."""
    loaded: list[str] = []

    def load(section: Model, *args: Any, **kwargs: Any) -> Any:
        loaded.append(section.name)
        return open_model(section, "test")

    before, after = (Model(name=str(models(dtype)), dtype="float32") for dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(chat, "open_model", load)
    monkeypatch.setattr(chat, "model_named", lambda name: after)
    monkeypatch.setattr(chat, "run_recipe", lambda name: type("Recipe", (), {"model": before}))
    with monkeypatch.context() as patch:
        patch.setattr(chat.Machine, "here", lambda device: Machine("cpu", 10**6, 0))
        speakers = chat._speakers("run", compare=True)
    assert loaded == []
    settings = chat.Chat(max_new_tokens=3)
    conversation = chat.Conversation(speakers, settings, chat.Console(quiet=True))
    for _ in range(2):
        conversation.ask("Hello")
        assert [speaker.model for speaker in speakers] == [None, None]
    assert loaded == [before.name, after.name] * 2
    loaded.clear()
    assert all(speaker.model is not None for speaker in chat._speakers("run", compare=True))
    assert loaded == [before.name, after.name]
