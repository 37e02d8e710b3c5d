"""Rewards: built-in ones by hand-made numbers, a user's own by what it may and may not do."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tiny import SHAPE
from tiny_tokenizer import CHATML, LLAMA3, make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from prefold import user_code
from prefold.data.preference import Message
from prefold.errors import StageError, UserError
from prefold.recipe import Reward, make_section
from prefold.recipe.rewards import BUILT_IN
from prefold.rewards import reward_model
from prefold.rewards.builtin import number_in
from prefold.rewards.load import load_rewards
from prefold.rewards.scoring import LoadedReward, Scores, score, weighted
from prefold.training.interrupt import Interruption

KNOWN = ("prompts", "completions", "completion_ids", "answer")
PROMPT = [Message(role="user", content="How many?")]
PARTIAL = "from functools import partial\n"


def scores(spec: dict[str, Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """What a reward says, with one token id for each word."""
    return scored(spec, completions, **columns).values


def scored(spec: dict[str, Any], completions: list[str], **columns: list[Any]) -> Scores:
    [reward] = load_rewards([Reward(**spec)], (*KNOWN, *columns))
    ids = [list(range(len(completion.split()))) for completion in completions]
    [found] = score([reward], [PROMPT] * len(completions), completions, ids, columns)
    return found


# ---- built in ---------------------------------------------------------------------------------------------------


def test_length() -> None:
    completions = ["one", "one two", "one two three four"]
    assert scores({"name": "length", "target": 2}, completions) == [-1, 0, -2]
    assert scores({"name": "length", "target": 7, "unit": "characters"}, completions) == [-4, 0, -11]


def test_regex_is_found_anywhere() -> None:
    assert scores({"name": "regex", "pattern": r"\d{2,}"}, ["a 12 b", "1 2"]) == [1, 0]


def test_repetition() -> None:
    # runs of two words: ab ba ab ba -> two of four were there before; all different; too short for any
    assert scores({"name": "repetition", "ngram_size": 2}, ["a b A b a", "a b c", "a"]) == [-0.5, 0, 0]


def test_exact_number() -> None:
    answers = ["They sell 1,250.\n#### 1,250", "#### 7", "none", 1250, None]
    completions = ["so it is $1250.00.", "the 7 apples, or 8", "1", "#### 1250 or 3?", "5"]
    assert scores({"name": "exact_number"}, completions, answer=answers) == [1, 0, None, 1, None]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number", None),
        ("1 or 2.", "2"),
        ("#### 5 and 6", "5"),
        ("3 #### 4 #### 5", "5"),
        ("3 #### none", "3"),
        ("-3", "-3"),
        ("= -3.50", "-3.5"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("(4)-3", "3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("costs $ 3", "3"),
        ("\u22123", "-3"),
        ("+3", "3"),
        ("12%", "12"),
        ("1,234,567.8", "1234567.8"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1e3", "1000"),
        ("**42**", "42"),
        (r"\boxed{42}", "42"),
        ("4 of CO2", "4"),
        ("5kg", "5"),
    ],
)
def test_number_in(text: str, number: str | None) -> None:
    assert number_in(text) == (None if number is None else Decimal(number))


def save_classifier(
    folder: Path, labels: int = 1, template: str = CHATML, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(template, eos=eos, bos="<|begin|>")
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, num_labels=labels)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(("template", "eos"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>")])
def test_reward_model_reads_the_last_token_of_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, eos: str
) -> None:
    monkeypatch.setattr(reward_model, "choose_dtype", lambda setting, device: torch.float32)
    tokenizer = save_classifier(tmp_path, template=template, eos=eos)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    completions = ["Short.", "A longer answer, to be padded for.", "x" * 300]
    found = scores({"name": "reward_model", "model": str(tmp_path)}, completions)
    expected = []
    for completion in completions[:2]:
        turns = [*PROMPT, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            head = model.score(model.model(ids).last_hidden_state)
        expected.append(head[0, -1, 0].item())
    assert found[:2] == pytest.approx(expected, rel=1e-4)
    assert found[0] != found[1]
    assert found[2] is None  # longer than the model's 256 positions


@pytest.mark.parametrize("device", ["cuda:1", "mps", "cpu"])
def test_a_reward_model_goes_straight_to_its_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[Any] = []

    def from_pretrained(folder: Path, **settings: Any) -> Any:
        maps.append(settings["device_map"])
        raise OSError("enough seen")

    for name in ("fetch", "load_tokenizer", "require_chat_template", "how_to_keep", "choose_dtype"):
        monkeypatch.setattr(reward_model, name, MagicMock())
    monkeypatch.setattr(reward_model, "choose_device", lambda: torch.device(device))
    monkeypatch.setattr(reward_model, "Machine", MagicMock())
    monkeypatch.setattr(reward_model.memory, "require", MagicMock())
    monkeypatch.setattr(reward_model.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="enough seen"):
        reward_model._load("any")
    assert maps == [{"": torch.device(device)}]


def test_reward_models_that_are_none(tmp_path: Path) -> None:
    save_classifier(tmp_path / "three", labels=3)
    with pytest.raises(UserError, match="has 3 labels, not one"):
        scores({"name": "reward_model", "model": str(tmp_path / "three")}, ["a"])
    folder = tmp_path / "headless"
    save_classifier(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "score" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not a reward model: its weights lack score\.weight"):
        scores({"name": "reward_model", "model": str(folder)}, ["a"])


# ---- in a recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "lenght", "target": 5}, "`lenght` is not a built-in reward (did you mean `length`?)"),
        ({"name": "mine"}, "a function of your own needs its `file`"),
        ({"name": "length", "targte": 5}, "`targte` is not a setting of `length`; did you mean `target`?"),
        ({"name": "regex", "target": 5}, "`target` is not a setting of `regex`; it has pattern"),
        ({"name": "mine", "file": "a.py", "target": 5}, "`target` is not a setting of `mine`; it has none"),
        ({"name": "length"}, "`length` needs `target`"),
        ({"name": "length", "target": "5"}, "`target` is '5'"),
        ({"name": "length", "target": -1}, "`target` is -1\n  expected: greater than or equal to 0"),
        ({"name": "length", "target": 1, "unit": "words"}, "`unit` is 'words'"),
        ({"name": "regex", "pattern": "("}, "`pattern`: not a regular expression"),
        ({"name": "repetition", "ngram_size": 0}, "`ngram_size` is 0\n  expected: greater than or equal to 1"),
        ({"name": "length", "target": 1, "weight": float("nan")}, "`weight` is nan"),
        ({"target": 5}, "`name` is missing"),
    ],
)
def test_wrong_settings_are_explained(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_section(Reward, spec, "recipe.yaml")
    assert message in str(caught.value)


def test_a_resolved_reward_can_be_read_again() -> None:
    reward = Reward(name="length", target=5, weight=2)
    assert Reward.model_validate_json(reward.model_dump_json()).settings == {"target": 5}


def test_the_schema_describes_every_setting() -> None:
    described = Reward.model_json_schema()["properties"]
    assert all(entry.get("description") for entry in described.values())
    assert all(name in described for settings in BUILT_IN.values() for name in settings.model_fields)


# ---- a user's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A file with the given text, and the reward `mine` in it."""

    def write(text: str) -> dict[str, Any]:
        (tmp_path / "rewards.py").write_text(text)
        return {"name": "mine", "file": str(tmp_path / "rewards.py"), "weight": 0.5}

    return write


Own = Callable[[str], dict[str, Any]]


def test_a_function_gets_what_it_names(own: Own) -> None:
    spec = own(
        "def mine(prompts, completions, *, level, other=7):\n"
        "    return [len(p[-1]['content']) + len(c) + l + other for p, c, l in zip(prompts, completions, level)]\n"
    )
    assert scores(spec, ["ab", "c"], level=[100, 200], unused=[1, 2]) == [9 + 2 + 100 + 7, 9 + 1 + 200 + 7]


def test_a_function_with_kwargs_gets_everything(own: Own) -> None:
    spec = own("def mine(completions, **rest):\n    return [float(len(rest))] * len(completions)\n")
    assert scores(spec, ["a", "b"], **{"answer": [1, 2], "odd name": [3, 4]}) == [4, 4]


def test_a_file_may_hold_dataclasses(own: Own) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    spec = own(text + "def mine(completions):\n    return [A(1).x for _ in completions]\n")
    assert scores(spec, ["a"]) == [1]


def test_numbers_of_other_libraries_are_numbers(own: Own) -> None:
    spec = own("import torch\ndef mine(completions):\n    return torch.tensor([0.5] * len(completions))\n")
    assert scores(spec, ["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(completions, anwser): ...", "rewards.py, `mine`: needs `anwser`, which is not there"),
        ("def mine(completions, anwser): ...", "did you mean `answer`?"),
        ("def mine(completions, anwser): ...", "only names of prompts, completions, completion_ids, answer"),
        ("def mine(completions, /): ...", "`completions` cannot be given by its name"),
        ("def mien(completions): ...", "there is no function `mine` in it\n  expected: one of: mien"),
        ("mine = 5", "there is no function `mine` in it"),
        ("x = 1\ndef mine(:", "rewards.py, line 2: cannot be loaded: SyntaxError"),
        ("\nimport nothing_like_it", "rewards.py, line 2: cannot be loaded: ModuleNotFoundError"),
        ("raise SystemExit", "cannot be loaded: SystemExit"),
        ("\nimport sys; sys.exit(0)", "rewards.py, line 2: cannot be loaded: SystemExit: 0"),
        ("import os; os._exit(0)", "rewards.py, line 1: cannot be loaded: SystemExit: os._exit(0)"),
        ("raise KeyboardInterrupt", "rewards.py, line 1: cannot be loaded: KeyboardInterrupt"),
        ("def f(): f()\nf()", "rewards.py, line 1: cannot be loaded: RecursionError"),
        ("\nexec('x = (')", "rewards.py, line 2: cannot be loaded: SyntaxError"),
        ("async def mine(completions): return [1.0]", "`mine`: is an async function, and nothing awaits it"),
        ("async def mine(completions): yield 1.0", "`mine`: is an async generator, and nothing awaits it"),
        ("def mine(completions): yield 1.0", "`mine`: has a `yield`, so it returns a generator"),
        ("class mine:\n    def __init__(self, completions): ...", "`mine`: is a class"),
        ("class A:\n    async def __call__(self, completions): ...\nmine = A()", "`mine`: is an async function"),
        (PARTIAL + "async def f(completions, x): ...\nmine = partial(f, x=1)", "`mine`: is an async function"),
        (PARTIAL + "mine = partial(int, base=3)", "`mine`: is a class"),
        ("def mine(*lists): ...", "`mine`: takes none of the arguments of rewards"),
        ("mine = len", "`mine`: `obj` cannot be given by its name"),
        ("def mine(completions): ...\nmine.__signature__ = 5", "`mine`: its parameters cannot be read"),
    ],
)
def test_functions_that_cannot_be_used(own: Own, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rewards([Reward(**own(text))], KNOWN)
    assert message in str(caught.value)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_rewards([Reward(name="mine", file=str(tmp_path / "nowhere.py"))], KNOWN)
    (tmp_path / "rewards.txt").write_text("def mine(completions): ...")
    with pytest.raises(UserError, match="is not a Python file"):
        load_rewards([Reward(name="mine", file=str(tmp_path / "rewards.txt"))], KNOWN)


def test_built_in_rewards_are_checked_against_the_names_too() -> None:
    with pytest.raises(UserError, match="reward `exact_number`: needs `answer`"):
        load_rewards([Reward(name="exact_number")], ("prompts", "completions"))
    with pytest.raises(UserError, match="an endpoint gives texts only"):
        load_rewards([Reward(name="length", target=5)], ("prompts", "completions"))
    assert load_rewards([Reward(name="length", target=5, unit="characters")], ("prompts", "completions"))


@pytest.mark.parametrize(
    "text",
    [
        PARTIAL + "def f(completions, x): return [x] * len(completions)\nmine = partial(f, x=1)",
        "class A:\n    def __call__(self, completions): return [1.0] * len(completions)\nmine = A()",
        "mine = lambda completions: [True for _ in completions]",
        "import numpy\ndef mine(completions): return numpy.ones(len(completions), dtype=bool)",
        "import numpy\ndef mine(completions): return [numpy.float32(1)] * len(completions)",
        "import pandas\ndef mine(completions): return pandas.Series([1] * len(completions), index=[7, 5])",
        "import torch\ndef mine(completions): return [torch.tensor(1, dtype=torch.float16) for _ in completions]",
        "from decimal import Decimal\ndef mine(completions): return tuple(Decimal(1) for _ in completions)",
        "def mine(completions): return {c: 1 for c in completions}.values()",
    ],
)
def test_functions_and_numbers_of_other_kinds(own: Own, text: str) -> None:
    assert scores(own(text), ["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 values for 2 completions"),
        ("return [1.0] * 3", "returned 3 values for 2 completions"),
        ("return {c: 1.0 for c in completions}", "returned an object, not a list"),
        ("return frozenset(completions)", "returned a frozenset, not a list"),
        ("return '12'", "returned a string, not a list"),
        ("async def later(): return [1.0, 1.0]\n    return later()", "returned a coroutine, not a list"),
        ("import numpy; return numpy.int64(1)", "returned an int64, not a list"),
        ("import torch; return torch.tensor(1.0)", "returned a Tensor, not a list"),
        (
            "import torch; return torch.tensor([[1.0], [float('nan')]])",
            "returned a Tensor, not a finite number or None",
        ),
        ("import torch; return torch.tensor([1.0, float('nan')])", "returned nan, not a finite number or None"),
        ("import numpy; return [1.0, numpy.float32('nan')]", "returned nan, not a finite number or None"),
        ("return [1.0, 10**400]", "returned inf, not a finite number or None"),
        ("return [1.0, 1j]", "returned a complex, not a finite number or None"),
        ("return [1.0, object()]", "returned an object, not a finite number or None"),
        ("return 1.0", "returned a number, not a list"),
        ("return None", "returned null, not a list"),
        ("return (1.0 for _ in completions)", "returned a generator, not a list"),
        ("return [1.0, float('nan')]", "returned nan, not a finite number or None"),
        ("return [1.0, float('inf')]", "returned inf, not a finite number or None"),
        ("return [1.0, '1']", "returned a string, not a finite number or None"),
        ("return [1.0, [1]]", "returned a list, not a finite number or None"),
        ("return [1 / (c != 'second one') for c in completions]", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_reward_returns_is_checked(own: Own, body: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        scores(own(f"def mine(completions):\n    {body}\n"), ["first one", "second one"])
    assert f"the reward `mine` {message}" in str(caught.value)
    assert "prompt: 'How many?'" in str(caught.value)
    of_all = "not a list" in message or "2 completions" in message or "Tensor" in message
    assert f"completion: '{'first one' if of_all else 'second one'}'" in str(caught.value)
    assert str(caught.value).split(": the reward")[0].endswith("line 2" if message.startswith("failed") else "line 1")


def test_a_failure_names_the_line_and_shortens_the_completion(own: Own) -> None:
    spec = own("def mine(completions):\n    text = 'x'\n    raise KeyError('lost')\n")
    with pytest.raises(UserError) as caught:
        scores(spec, ["long " * 100])
    assert "rewards.py, line 3: the reward `mine` failed: KeyError: 'lost'" in str(caught.value)
    assert "long ..." in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raising", "message"),
    [
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("exit()", "failed: SystemExit"),
        ("import os; os._exit(0)", "failed: SystemExit: os._exit(0)"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("raise GeneratorExit", "failed: GeneratorExit"),
        ("raise MemoryError", "failed: MemoryError"),
        ("raise BaseExceptionGroup('several', [KeyboardInterrupt()])", "failed: BaseExceptionGroup: several"),
        ("return mine(completions)", "failed: RecursionError: maximum recursion depth exceeded"),
        ("from prefold.errors import StageError; raise StageError('no')", "failed: StageError: no"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "failed: Mute"),
        ("return [type('A', (), {'__float__': lambda self: exit()})()] * len(completions)", "failed: SystemExit"),
        ("return type('A', (), {'__len__': lambda self: 1 / 0})()", "failed: ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_whatever_is_raised_is_a_failure_of_the_reward(
    own: Own, raising: str, message: str, on_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = f"    if 'bad' in completions:\n        {raising}\n    return [1.0] * len(completions)\n"
    spec = own(f"def mine(completions):\n{body}")
    if on_error == "skip":
        assert scored(spec | {"on_error": "skip"}, ["good", "bad"]) == Scores([1.0, None], frozenset({1}))
        assert message in caplog.text
        return
    with pytest.raises(UserError) as caught:
        scores(spec, ["good", "bad"])
    assert re.search(rf"rewards\.py(, line [23])?: the reward `mine` {re.escape(message)}", str(caught.value))
    assert "completion: 'bad'" in str(caught.value)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell may have had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_no_failure_of_the_reward(own: Own) -> None:
    pressed = "import os, signal\ndef press(): os.kill(os.getpid(), signal.SIGINT)\n"
    for body in ("press()", "\n    try: press()\n    except BaseException: pass"):
        with pytest.raises(KeyboardInterrupt):
            scores(own(f"{pressed}def mine(completions):\n    {body}\n    return [1.0]\n"), ["a"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_first_ctrl_c_in_training_lets_the_reward_end_and_a_second_does_not(own: Own) -> None:
    pressed = "    for _ in completions: os.kill(os.getpid(), signal.SIGINT)\n"
    spec = own(f"import os, signal\ndef mine(completions):\n{pressed}    return [1.0] * len(completions)\n")
    with Interruption() as interruption:
        assert scores(spec, ["a"]) == [1.0] and interruption.caught
    with Interruption(), pytest.raises(KeyboardInterrupt):
        scores(spec, ["a", "b"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_process_of_a_reward_ends_as_ever(own: Own) -> None:
    body = (
        "    child = os.fork()\n    if not child: os._exit(7)\n    return [os.WEXITSTATUS(os.waitpid(child, 0)[1])]\n"
    )
    assert scores(own(f"import os\ndef mine(completions):\n{body}"), ["a"]) == [7.0]


def test_a_reward_changes_its_own_copies_only(own: Own) -> None:
    change = "    for values in (prompts, completions, completion_ids, level): values[0], values[1:] = None, []\n"
    inner = "    prompts[0][0]['content'] = 'changed'; level[0]['a'].append(5); level[1].clear()\n"
    spec = own(f"def mine(prompts, completions, completion_ids, level):\n{inner}{change}    return [1.0, 1.0]\n")
    prompt, cell = [Message(role="user", content="How many?")], {"a": [1]}
    texts, ids, cells = ["a", "b"], [[1], [2]], [cell, cell]
    rewards = load_rewards([Reward(**spec)] * 2, (*KNOWN, "level"))
    assert [each.values for each in score(rewards, [prompt] * 2, texts, ids, {"level": cells})] == [[1.0, 1.0]] * 2
    assert prompt == PROMPT and cell == {"a": [1]} and cells == [cell, cell]
    assert texts == ["a", "b"] and ids == [[1], [2]]


STATES = """
import os, sys, tempfile, torch
def mine(completions):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    sys.setrecursionlimit(5000)
    sys.stdout = sys.stderr = None
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    return [1.0] if completions == ["good"] else 1 / 0
"""


def test_a_reward_changes_nothing_of_the_process(own: Own) -> None:
    before = [read() for read, _ in user_code.STATE]
    assert scores(own(STATES), ["good"]) == [1.0]
    with pytest.raises(UserError, match="ZeroDivisionError"):
        scores(own(STATES), ["bad"])
    assert [read() for read, _ in user_code.STATE] == before
    assert torch.empty(1).device.type == "cpu"


def test_a_failure_that_no_single_completion_causes(own: Own) -> None:
    spec = own("def mine(completions):\n    assert len(completions) < 2\n    return [0.0]\n")
    with pytest.raises(UserError, match="for 2 completions together, though for none of them alone"):
        scores(spec, ["a", "b"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / (c != 'bad') for c in completions]", "failed: ZeroDivisionError"),
        ("return [float('nan') if c == 'bad' else 1.0 for c in completions]", "returned nan"),
        ("return [1.0 for c in completions if c != 'bad']", "returned 3 values for 4 completions"),
        ("return ['x' if c == 'bad' else 1.0 for c in completions]", "returned a string"),
    ],
)
def test_failures_that_may_be_skipped_are_counted_and_never_0(
    own: Own, body: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = own(f"def mine(completions):\n    {body}\n") | {"on_error": "skip"}
    found = scored(spec, ["good", "bad", "fine", "good"])
    assert found == Scores([1.0, None, 1.0, 1.0], frozenset({1}))
    assert message in caplog.text and "skipped: 1 of 4 completions get no score of it" in caplog.text
    caplog.clear()
    assert scored(spec, ["good"]) == Scores([1.0]) and not caplog.text


def test_all_of_them_may_fail(own: Own) -> None:
    spec = own("def mine(completions):\n    return 1.0\n") | {"on_error": "skip"}
    assert scored(spec, ["a", "b"]) == Scores([None, None], frozenset({0, 1}))


def test_what_cannot_be_loaded_is_not_skipped(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        scores({"name": "reward_model", "model": str(tmp_path / "none"), "on_error": "skip"}, ["a"])


def test_a_failure_of_a_built_in_reward_is_no_fault_of_the_user() -> None:
    broken = LoadedReward("length", lambda completions: 1 / 0)
    with pytest.raises(StageError, match="the reward `length` failed: ZeroDivisionError"):
        score([broken], [PROMPT], ["a"], None, {})


def test_weights_add_up_what_is_said() -> None:
    rewards = [LoadedReward("a", lambda: [], 2.0), LoadedReward("b", lambda: [], -1.0)]
    assert weighted(rewards, [Scores([1.0, None, None]), Scores([3.0, 4.0, None])]) == [-1.0, -4.0, None]
