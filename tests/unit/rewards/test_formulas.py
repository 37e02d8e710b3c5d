"""Formulas that are the same mathematics, and texts that are out to do harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefold.errors import UserError
from prefold.recipe import Reward, make_section, rewards
from prefold.rewards import formulas
from prefold.rewards.formulas import Comparer, SymbolicEquality
from prefold.rewards.load import load_rewards

pytest.importorskip("math_verify")

SECONDS = 20.0
"""Enough on a busy machine."""


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    found = Comparer()
    yield found
    found._stop()


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("1/2", "so it is $0.5$.", 1),
        (r"\frac{1}{2}", r"The answer is \boxed{\frac{2}{4}}", 1),
        ("x^2 + 2x + 1", "we get $(x+1)^2$", 1),
        ("x^2 + 2x + 1", "we get $(x+2)^2$", 0),
        (r"$2\sqrt{2}$", r"$\sqrt{8}$", 1),
        ("They sell 48 and then 24.\n#### 1,072", "1000 + 72 = 1072\n#### 1072", 1),
        ("#### 72", "#### 73", 0),
        ("#### -3", "it is -3", 1),
        ("7", "seven", 0),
        ("7", "", 0),
        ("", "7", None),
    ],
)
def test_equality(comparer: Comparer, answer: str, completion: str, value: float | None) -> None:
    assert comparer.compare(answer, completion, SECONDS) == value


def test_code_is_not_run(comparer: Comparer, tmp_path: Path) -> None:
    witness = tmp_path / "owned"
    code = f"__import__('pathlib').Path('{witness}').touch()"
    open_it = rf"open('{witness}','w')"
    for text in (code, open_it):
        for written in (text, f"${text}$", f"#### {text}", rf"\boxed{{{text}}}", rf"$\operatorname{{{text}}}(x)$"):
            assert comparer.compare(written, f"1 + 1 = {written}", SECONDS) in (0, 1, None)
            assert comparer.compare("2", written, SECONDS) in (0, None)
    assert not witness.exists()


@pytest.mark.parametrize("text", ["$9^{9^{9^{9}}} + 1$", "$10000000000!$", "(" * 5000 + "1" + ")" * 5000])
def test_what_takes_too_long_is_different(text: str) -> None:
    comparer = Comparer()
    assert comparer.compare("2", "$2$", SECONDS) == 1
    started = time.monotonic()
    assert comparer.compare("2", text, 1.0) == 0
    assert time.monotonic() - started < 10
    # The next ones are compared as ever.
    assert comparer.compare("2", "$1 + 1$", SECONDS) == 1
    comparer._stop()


def test_in_a_thread_and_after_the_process_died(comparer: Comparer) -> None:
    comparer.compare("2", "$2$", SECONDS)
    assert comparer._process is not None
    comparer._process.kill()
    comparer._process.wait()
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(comparer.compare("2", "$2$", SECONDS)))
    thread.start()
    thread.join()
    assert found == [1]


def test_as_a_reward() -> None:
    reward = SymbolicEquality(rewards.SymbolicEquality())
    assert reward(["$1/2$", "0.6", "3"], ["0.5", 0.5, ""]) == [1, 0, None]
    assert Reward(name="symbolic_equality", seconds=2).settings == {"seconds": 2}


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="`seconds` is 0"):
        make_section(Reward, {"name": "symbolic_equality", "seconds": 0.0})
    monkeypatch.setattr(formulas, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="needs the package math-verify"):
        load_rewards([Reward(name="symbolic_equality")], ("completions", "answer"))
