"""The token boundary with the chat templates of published models, and against TRL's own tokenization.

The templates are read from the installed packages. Their vocabularies are not at hand, so a tokenizer of bytes is given
each template's control tokens: whatever melts at a boundary in it could melt in a real one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest
import trl
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefold.data.chat import Tokenized, fit, tokenize_all
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Message, Preference, Problem, RowId, messages
from prefold.data.templates import give_keywords, moving_date
from prefold.recipe import Data, Source
from prefold.trees.packing import TokenTree, pack

ORIGIN = RowId("pairs.jsonl", 3)
CONVERSATIONS = 8


class Family(NamedTuple):
    """What is known of the models that use a template. `ends` are the control tokens behind an answer."""

    bos: str | None
    eos: str
    ends: tuple[str, ...]
    asks_for_thought: bool = False
    """It asks for an answer by an open thought, which is not how it writes a finished answer without one."""
    takes_system: bool = True
    alternates: bool = False


IM_END = Family(None, "<|im_end|>", ("<|im_end|>",))
LLAMA = Family("<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>",))
GEMMA = Family("<bos>", "<eos>", ("<end_of_turn>",), alternates=True)
GEMMA_4 = Family("<bos>", "<eos>", ("<turn|>",))
PHI = Family("<s>", "<|endoftext|>", ("<|end|>", "<|endoftext|>"))
COHERE = Family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",), alternates=True)
DEEPSEEK = Family("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",), asks_for_thought=True)
# By the beginning of the template's name; the longest that fits.
FAMILIES = {
    "cohere": COHERE,
    "cohere2": COHERE._replace(ends=("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")),
    "deepseek": DEEPSEEK,
    "diffusion_gemma": GEMMA_4,
    "gemma": GEMMA._replace(takes_system=False),
    "gemma3": GEMMA,
    "gemma4": GEMMA_4,
    # What ends its answers is the next turn's `<|user|>`, which the template for inference does not write.
    "glm4moe": Family(None, "<|endoftext|>", ()),
    "glm4moe_training": Family(None, "<|endoftext|>", ("<|user|>",)),
    "gptoss": Family("<|startoftext|>", "<|return|>", ("<|return|>",)),
    "lfm2": IM_END._replace(bos="<|startoftext|>"),
    "llama3": LLAMA,
    "muse_glimmer": Family("<|begin_of_text|>", "<|eot|>", ("<|eot|>",)),
    "nemotron": IM_END._replace(bos="<s>", asks_for_thought=True),
    "phi3": PHI,
    "qwen": IM_END,
    "qwen3_5_think": IM_END._replace(asks_for_thought=True),
    "qwen3_6": IM_END._replace(asks_for_thought=True),
    "qwen3_8": IM_END._replace(asks_for_thought=True),
}
# They read content in parts and drop it, or fail, where it is text.
VISION = ("idefics3", "llava_next", "smolvlm")

FOLDER = Path(trl.__file__).parent / "chat_templates"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
FAMILY_OF = {
    name: FAMILIES[max(filter(name.startswith, FAMILIES), key=len)]
    for name in FILES
    if name.startswith(tuple(FAMILIES))
}
NAMES = list(FAMILY_OF)
CONTROL = re.compile(
    r"<\|[\w▁]+\|?>|<｜[\w▁]+｜>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>|<(?:bos|eos|\w+_TOKEN)>|\[gMASK\]|<sop>"
)


if not FILES:
    pytest.skip("this TRL brings no chat templates", allow_module_level=True)


def make_tokenizer(template: str, family: Family, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, but for two newlines or spaces in a row; control tokens are the template's."""
    pairs = [("Ċ", "Ċ"), ("Ġ", "Ġ")]
    vocabulary = {piece: place for place, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"".join(pair): len(vocabulary) + place for place, pair in enumerate(pairs)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    known = {family.eos, *family.ends} | ({family.bos} if family.bos else set())
    backend.add_special_tokens(sorted({*CONTROL.findall(template), *known}))
    if adds_bos and family.bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(f"{family.bos} $A", None, [bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, chat_template=template
    )


def tokenizer_of(name: str, **options: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer(FILES[name].read_text(encoding="utf-8"), FAMILY_OF[name], **options)


# ---- conversations ----------------------------------------------------------------------------------------------


def turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def random_text(draw: random.Random, plain: bool = False) -> str:
    """Words that no other text has, with or without white space around them."""
    edges = [""] if plain else ["", "", " ", "  ", "\n", "\n\n", " \n", "\t"]
    letters = "ab é\n漢😀.,{}%'\"" if not plain else "abé"
    inside = "".join(draw.choice(letters) for _ in range(draw.randint(0, 20)))
    return f"{draw.choice(edges)}w{inside}w{draw.getrandbits(40)}{draw.choice(edges)}"


def random_pair(draw: random.Random, family: Family, plain: bool = False) -> Preference:
    prompt = []
    if family.takes_system and draw.random() < 0.6:
        prompt.append(turn("system", "" if draw.random() < 0.2 else random_text(draw, plain)))
    for _ in range(draw.randint(0, 4)):
        prompt += [turn("user", random_text(draw, plain)), turn("assistant", random_text(draw, plain))]
    prompt.append(turn("user", random_text(draw, plain)))
    chosen, rejected = (turn("assistant", random_text(draw, plain)) for _ in range(2))
    return Preference(tuple(prompt), (chosen,), (rejected,), ORIGIN)


def random_pairs(name: str, plain: bool = False) -> list[Preference]:
    draw = random.Random(name)
    return [random_pair(draw, FAMILY_OF[name], plain) for _ in range(CONVERSATIONS)]


def written(messages: Iterable[Message], tokenizer: PreTrainedTokenizerFast, asks: bool = False) -> list[int]:
    """Ids of a conversation as transformers has them."""
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=asks, return_dict=False)


def tokenized(pairs: list[Preference], tokenizer: PreTrainedTokenizerFast) -> list[Tokenized]:
    found = tokenize_all(pairs, tokenizer)
    assert all(isinstance(one, Tokenized) for one in found), found
    return found


def common_beginning(*lists: Sequence[Any]) -> list[Any]:
    return [items[0] for items in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False))]


# ---- the rules of the boundary ----------------------------------------------------------------------------------


def assert_boundary(pair: Preference, one: Tokenized, tokenizer: PreTrainedTokenizerFast) -> None:
    conversations = [written((*pair.prompt, *answer), tokenizer) for answer in pair.answers]
    assert [list(one.tree.prompt + ids) for ids in one.tree.completions] == conversations
    ask = written(pair.prompt, tokenizer, asks=True)
    assert list(one.tree.prompt) == common_beginning(ask, *conversations)
    assert ("prompt_not_prefix" in one.oddities) == (len(one.tree.prompt) < len(ask))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_completion_are_the_templates_own_ids(name: str) -> None:
    pairs, tokenizer = random_pairs(name), tokenizer_of(name)
    for pair, one in zip(pairs, tokenized(pairs, tokenizer), strict=True):
        assert_boundary(pair, one, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_one_bos_and_one_end(name: str) -> None:
    """Also where the tokenizer adds a BOS to bare text, and pads with EOS."""
    family, tokenizer = FAMILY_OF[name], tokenizer_of(name, adds_bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    for one in tokenized(random_pairs(name), tokenizer):
        for completion in one.tree.completions:
            assert [token for token in completion if token in ends] == ends
            behind = completion[completion.index(ends[-1]) + 1 :] if ends else ()
            assert not tokenizer.decode(list(behind)).strip()
            places = [
                place for place, token in enumerate(one.tree.prompt + completion) if token == tokenizer.bos_token_id
            ]
            assert places in ([], [0])
        targets = pack([one.tree]).targets.tolist()
        assert all(targets.count(end) == 2 for end in ends)


@pytest.mark.parametrize("name", NAMES)
def test_the_oddities_are_the_templates_and_no_others(name: str) -> None:
    family = FAMILY_OF[name]
    expected = ("prompt_not_prefix",) * family.asks_for_thought + ("no_end_token",) * (not family.ends)
    expected += ("empty_thought",) * (name.removesuffix("_training") in ("glm4moe", "qwen3"))
    for one in tokenized(random_pairs(name, plain=True), tokenizer_of(name)):
        assert one.oddities == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_default_system_prompt_stands_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    default = default_system(tokenizer)
    without = [pair for pair in random_pairs(name) if pair.prompt[0]["role"] != "system"]
    assert without
    for one in tokenized(without, tokenizer):
        for completion in one.tree.completions:
            assert not default or tokenizer.decode(one.tree.prompt + completion).count(default) == 1


def default_system(tokenizer: PreTrainedTokenizerFast) -> str:
    """What stands before the first user's turn and before no other; empty for most templates."""
    conversation = [turn("user", "first question"), turn("assistant", "reply"), turn("user", "second question")]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    before = text.partition("first question")[0]
    between = text.partition("reply")[2].partition("second question")[0]
    opening = "".join(common_beginning(before[::-1], between[::-1]))[::-1]
    return before.removesuffix(opening).removeprefix(tokenizer.bos_token or "").strip()


def test_some_templates_have_a_default_system_prompt() -> None:
    assert "assistant" in default_system(tokenizer_of("qwen2_5")) and not default_system(tokenizer_of("qwen3"))
    assert sum(bool(default_system(tokenizer_of(name))) for name in NAMES) > 10


def test_every_template_is_known() -> None:
    assert len(NAMES) >= 40
    assert [name for name in FILES if name not in FAMILY_OF and not name.startswith(VISION)] == []


@pytest.mark.real_model
def test_smollm2_is_real(smollm2: Path) -> None:
    """A whole real tokenizer: its BOS begins every turn, and its default system prompt stands once."""
    tokenizer, draw = AutoTokenizer.from_pretrained(smollm2), random.Random(0)
    pairs = [random_pair(draw, IM_END) for _ in range(CONVERSATIONS)]
    for pair, one in zip(pairs, tokenized(pairs, tokenizer), strict=True):
        assert_boundary(pair, one, tokenizer)
        assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in one.tree.completions)
        assert tokenizer.decode(one.tree.prompt).count("<|im_start|>system") == 1
    assert_same_as_trl(pairs, tokenizer)


# ---- what a template refuses ------------------------------------------------------------------------------------


def refused(pair: Preference, name: str) -> Problem:
    tokenizer = tokenizer_of(name)
    with pytest.raises(TemplateError):
        written(pair.prompt, tokenizer, asks=True)
    (problem,) = tokenize_all([pair], tokenizer)
    assert isinstance(problem, Problem) and problem.origin == ORIGIN
    return problem


@pytest.mark.parametrize("name", [name for name in NAMES if not FAMILY_OF[name].takes_system])
def test_a_system_message_that_the_template_refuses(name: str) -> None:
    pair = Preference(
        (turn("system", "A"), turn("user", "B")), (turn("assistant", "C"),), (turn("assistant", "D"),), ORIGIN
    )
    problem = refused(pair, name)
    assert problem.kind == "template_refused" and "ystem role not supported" in problem.message


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILY_OF[name].alternates])
def test_turns_that_do_not_alternate(name: str) -> None:
    pair = Preference(
        (turn("user", "A"), turn("user", "B")), (turn("assistant", "C"),), (turn("assistant", "D"),), ORIGIN
    )
    problem = refused(pair, name)
    assert problem.kind == "template_refused" and "alternate" in problem.message


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(VISION)])
def test_a_template_that_reads_content_in_parts_gives_no_pair(name: str) -> None:
    tokenizer = make_tokenizer(FILES[name].read_text(encoding="utf-8"), IM_END)
    for problem in tokenize_all(random_pairs("qwen3"), tokenizer):
        assert isinstance(problem, Problem) and problem.kind in ("template_refused", "identical")


# ---- tool turns and thoughts ------------------------------------------------------------------------------------

TOOL = {"name": "get_time", "description": "What time it is.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
QUESTION = [turn("user", "What time is it?")]
# Those that write calls and what tools return; the others must refuse them.
WRITE_TOOLS = (
    *("deepseekv3", "gemma4", "diffusion_gemma", "glm4moe", "gptoss", "lfm2_v2", "lfm2_2_5"),
    *("llama3_1", "llama3_2", "muse_glimmer", "nemotron", "qwen"),
)
REFUSE_TOOLS = ("qwen2_5_vl",)
# They write what is thought before an answer.
WRITE_THOUGHTS = ("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "nemotron", "qwen3", "lfm2_2_5")
READ_NO_THOUGHTS = ("qwen3_instruct_2507", "qwen3_vl")


def call(name: str, arguments: dict[str, Any], as_text: bool) -> Message:
    given = json.dumps(arguments) if as_text else arguments
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": given}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def result(text: str, name: str) -> Message:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": "call00001"}


def steps(as_text: bool) -> list[Message]:
    return [
        call("get_time", {"city": "Rome", "digits": 24}, as_text),
        result("seven in the evening", "get_time"),
        call("get_zone", {"place": "Roma"}, as_text),
        result("central European", "get_zone"),
        turn("assistant", "It is seven."),
    ]


def scored(ids: Sequence[int], context: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    starts, stops = [0, *(stop for _, stop in context)], [*(start for start, _ in context), len(ids)]
    return [tokenizer.decode(list(ids[start:stop])) for start, stop in zip(starts, stops, strict=True)]


def writes_tools(name: str) -> bool:
    return name.startswith(WRITE_TOOLS) and not name.startswith(REFUSE_TOOLS)


@pytest.mark.parametrize("name", list(filter(writes_tools, NAMES)))
def test_tool_turns_are_the_templates_own_and_only_the_assistants_are_scored(name: str) -> None:
    tokenizer, as_text = tokenizer_of(name), name == "deepseekv3"
    raw = steps(as_text)
    answer = messages(raw, "`chosen`")
    record = Preference(
        tuple(QUESTION), tuple(answer), (turn("assistant", "No."),), ORIGIN, template_kwargs={"tools": TOOLS}
    )
    [found] = tokenize_all([record], tokenizer)
    assert isinstance(found, Tokenized), found
    whole = tokenizer.apply_chat_template([*QUESTION, *raw], tools=TOOLS, return_dict=False)
    ids, [context, _] = found.tree.completions[0], found.tree.context
    assert list(found.tree.prompt + ids) == whole
    texts = scored(ids, context, tokenizer)
    own = ["get_time", "get_zone", "It is seven."]
    assert len(texts) == 3 and all(word in text for word, text in zip(own, texts, strict=True))
    assert not any(word in text for text in texts for word in ("evening", "central"))
    headers = ("<|im_start|>", "<|start_header_id|>", "<｜User｜>", "<｜tool▁output▁begin｜>", "<tool_response>")
    assert not any(header in text for text in texts for header in headers)
    ends = tuple(end for end in FAMILY_OF[name].ends if end != "<|return|>") or ("<|call|>", "</tool_call>")
    assert all(text.rstrip().endswith((*ends, "<|tool_response>", "<|observation|>")) for text in texts[:2]), texts


@pytest.mark.parametrize("name", [name for name in NAMES if not writes_tools(name)])
def test_tool_turns_that_a_template_does_not_write_are_refused(name: str) -> None:
    record = Preference(tuple(QUESTION), tuple(messages(steps(False), "`chosen`")), (turn("assistant", "No."),), ORIGIN)
    [problem] = tokenize_all([record], tokenizer_of(name))
    assert isinstance(problem, Problem) and problem.kind == "template_refused"


def with_thoughts(field: str) -> Message:
    return {**turn("assistant", "It is seven."), field: "The clock says seven."}


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_are_written_or_named(name: str) -> None:
    """Under any name that they have, and the ids are the template's own."""
    tokenizer = tokenizer_of(name)
    fields = ("reasoning_content", "reasoning", "thinking")
    # transformers 5.18 does not know that these are the same: only the template's own name is written.
    wanted = max((written([*QUESTION, with_thoughts(field)], tokenizer) for field in fields), key=len)
    for field in fields:
        record = Preference(tuple(QUESTION), (with_thoughts(field),), (turn("assistant", "No."),), ORIGIN)
        [found] = tokenize_all([record], tokenizer)
        assert isinstance(found, Tokenized), found
        assert list(found.tree.prompt + found.tree.completions[0]) == wanted
        text = tokenizer.decode(found.tree.completions[0])
        is_written = name.startswith(WRITE_THOUGHTS) and not name.startswith(READ_NO_THOUGHTS)
        assert ("The clock says seven." in text) == is_written
        named = {"unread_field", "text_dropped"} & set(found.oddities)
        assert bool(named) == (not is_written)


@pytest.mark.parametrize("name", NAMES)
def test_several_turns_of_an_answer_are_scored_without_the_user_between(name: str) -> None:
    tokenizer = tokenizer_of(name)
    answer = (turn("assistant", "First words."), turn("user", "And then?"), turn("assistant", "Last words."))
    record = Preference(tuple(QUESTION), answer, (turn("assistant", "No."),), ORIGIN)
    [found] = tokenize_all([record], tokenizer)
    assert isinstance(found, Tokenized), found
    assert list(found.tree.prompt + found.tree.completions[0]) == written([*QUESTION, *answer], tokenizer)
    texts = scored(found.tree.completions[0], found.tree.context[0], tokenizer)
    assert len(texts) == 2 and "First words." in texts[0] and "Last words." in texts[1]
    [(start, stop)] = found.tree.context[0]
    assert "And then?" in tokenizer.decode(list(found.tree.completions[0][start:stop]))
    assert "header_trained" not in found.oddities


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("gptoss", "llama3_2"))])
def test_a_date_is_fixed_by_a_keyword(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert moving_date(tokenizer, QUESTION)
    give_keywords(tokenizer, {"strftime_now": "2025-06-30"})
    assert moving_date(tokenizer, QUESTION) is None
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert "2025-06-30" in text or "30 Jun 2025" in text


# ---- TRL --------------------------------------------------------------------------------------------------------


def trl_trees(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[TokenTree]:
    """What TRL's DPOTrainer makes of rows before it truncates and pads them."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    given = datasets.Dataset.from_list(rows).to_iterable_dataset()
    found = DPOTrainer._prepare_dataset(trainer, given, tokenizer, settings, "train")
    return [
        TokenTree(tuple(row["prompt_ids"]), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))) for row in found
    ]


def as_row(pair: Preference) -> dict[str, Any]:
    return {"prompt": list(pair.prompt), "chosen": list(pair.chosen), "rejected": list(pair.rejected)}


def assert_same_as_trl(pairs: list[Preference], tokenizer: PreTrainedTokenizerFast) -> None:
    assert [one.tree for one in tokenized(pairs, tokenizer)] == trl_trees([as_row(pair) for pair in pairs], tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_messages_become_the_ids_that_trl_trains_on(name: str) -> None:
    assert_same_as_trl(random_pairs(name), tokenizer_of(name))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Prepared]:
    def load_rows(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Prepared:
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(rows))
        return load_split(Data(train=[Source(path=str(path))], **settings), tokenizer, seed=1)

    return load_rows


def text_rows() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{column: random_text(draw) for column in ("prompt", "chosen", "rejected")} for _ in range(CONVERSATIONS)]


def whole(pair: Preference) -> dict[str, Any]:
    """The pair without a prompt column."""
    return {"chosen": [*pair.prompt, *pair.chosen], "rejected": [*pair.prompt, *pair.rejected]}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bare_text_becomes_the_ids_that_trl_trains_on(load: Callable[..., Prepared], adds_bos: bool) -> None:
    tokenizer = make_tokenizer("", LLAMA, adds_bos)
    rows = [*text_rows(), {"prompt": "Why?", "chosen": "So.<|eot_id|>", "rejected": "No."}]
    assert list(load(rows, tokenizer, template="none").train.trees) == trl_trees(rows, tokenizer)


@pytest.mark.parametrize("name", ["llama3", "gptoss"])
def test_whole_conversations_become_the_ids_that_trl_trains_on(load: Callable[..., Prepared], name: str) -> None:
    rows, tokenizer = [whole(pair) for pair in random_pairs(name)], tokenizer_of(name)
    assert list(load(rows, tokenizer, max_length=4096).train.trees) == trl_trees(rows, tokenizer)


def test_bare_text_is_put_into_the_template_where_trl_leaves_it_out(load: Callable[..., Prepared]) -> None:
    # TRL takes the type of the data for the type of the model: text is never put into a chat model's template, though
    # programs will talk to the model by it.
    tokenizer, row = tokenizer_of("llama3"), {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (ours,) = load([row], tokenizer).train.trees
    (theirs,) = trl_trees([row], tokenizer)
    assert list(ours.prompt) == written([turn("user", row["prompt"])], tokenizer, asks=True)
    assert list(theirs.prompt) == tokenizer(row["prompt"])["input_ids"]


def test_an_answer_begins_with_the_assistants_own_words_where_trl_begins_later(load: Callable[..., Prepared]) -> None:
    # TRL cuts where the messages part: the first message of the answers, where they share it, is prompt and not trained
    # on, and the prompt asks the assistant to speak twice in a row.
    pair = random_pairs("llama3")[0]
    first = turn("assistant", "Let me think.")
    row = {side: [*turns[:-1], first, turns[-1]] for side, turns in whole(pair).items()}
    tokenizer = tokenizer_of("llama3")
    (ours,) = load([row], tokenizer).train.trees
    (theirs,) = trl_trees([row], tokenizer)
    assert list(ours.prompt) == written(pair.prompt, tokenizer, asks=True)
    assert list(theirs.prompt) == written([*pair.prompt, first], tokenizer, asks=True)


def test_a_pair_that_is_too_long_is_left_out_where_trl_cuts_its_end() -> None:
    # TRL keeps the first `max_length` tokens of each sequence: the end of the answer goes, and its end token with it.
    tokenizer = tokenizer_of("llama3")
    (one,) = tokenized(random_pairs("llama3")[:1], tokenizer)
    length = one.tree.longest - 1
    prompt, chosen, rejected = map(list, (one.tree.prompt, *one.tree.completions))
    row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    cut = DataCollatorForPreference(pad_token_id=0, max_length=length)([row])["input_ids"].tolist()
    assert min(ids.count(tokenizer.eos_token_id) for ids in cut) < min(
        (one.tree.prompt + ids).count(tokenizer.eos_token_id) for ids in one.tree.completions
    )
    dropped = fit(one, Data(train=[Source(path="unused")], max_length=length))
    assert isinstance(dropped, Problem) and dropped.kind == "overlong"
    kept = fit(one, Data(train=[Source(path="unused")], max_length=length, overlong="truncate_prompt"))
    assert kept == TokenTree(one.tree.prompt[1:], one.tree.completions)
