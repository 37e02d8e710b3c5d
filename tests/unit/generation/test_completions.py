"""Groups of completions: what is sampled, where it ends, and what rewards say about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer

from prefold.data.preference import Message, Prompt, RowId
from prefold.errors import UserError
from prefold.generation.engine import Sampling, require_end_token, sample
from prefold.generation.sampling import Completion
from prefold.rewards.scoring import LoadedReward, names_of, scored_groups

TOKENIZER = make_tokenizer(CHATML)
END = TOKENIZER.eos_token_id
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12)]


def model(**changes: Any) -> Any:
    return tiny_llama(
        vocab_size=len(TOKENIZER), eos_token_id=END, pad_token_id=END, bos_token_id=None, **changes
    ).eval()


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 12, "num_answers": 4, "temperature": 1.0, **changes})


def test_a_group_depends_on_its_prompt_and_seed_alone() -> None:
    base = model()
    both = sample(base, TOKENIZER, PROMPTS, sampling(), [1, 2])
    torch.manual_seed(99)
    [second] = sample(base, TOKENIZER, PROMPTS[1:], sampling(seed=7), [2])
    assert [one.token_ids for one in second] == [one.token_ids for one in both[1]]
    assert [len(group) for group in both] == [4, 4]
    assert sample(base, TOKENIZER, PROMPTS[:1], sampling(), [3])[0] != both[0]


def test_completions_end_with_the_end_token_or_are_not_finished() -> None:
    base = model()
    with torch.no_grad():
        base.lm_head.weight[END] *= 6  # so that many end
    every = [one for group in sample(base, TOKENIZER, PROMPTS * 4, sampling(), range(8)) for one in group]
    assert {one.finished for one in every} == {True, False}
    for one in every:
        assert (one.token_ids[-1] == END) == one.finished
        assert END not in one.token_ids[:-1]
        assert one.finished or len(one.token_ids) == 12
        assert one.text == TOKENIZER.decode(one.token_ids, skip_special_tokens=True)


def test_an_end_token_is_required() -> None:
    endless = model()
    endless.generation_config.eos_token_id = None
    require_end_token(endless, TOKENIZER)  # the tokenizer names one
    with pytest.raises(UserError, match="no completion would ever end"):
        require_end_token(endless, make_tokenizer(CHATML, eos=None))  # type: ignore[arg-type]


def test_rewards_of_groups() -> None:
    def length(completion_ids: Any, prompts: Any, answer: Any) -> list[float | None]:
        assert [prompt[-1]["content"] for prompt in prompts] == ["a", "a", "b", "b"]
        assert answer == [1, 1, None, None]
        return [None if len(ids) == 3 else float(len(ids)) for ids in completion_ids]

    prompts = [
        Prompt((Message(role="user", content=text),), columns, RowId("p", 1))
        for text, columns in (("a", {"answer": 1}), ("b", {}))
    ]
    groups = [[Completion((1,) * size, "x", True) for size in sizes] for sizes in ((1, 2), (3, 4))]
    rewards = [LoadedReward("length", length, 2.0), LoadedReward("length", length)]
    first, second = scored_groups(rewards, prompts, groups, ["answer"])
    assert first.scores == {"length": [1.0, 2.0], "length-2": [1.0, 2.0]}
    assert first.rewards == [3.0, 6.0]
    assert second.rewards == [None, 12.0]
    assert (first.prompt, first.completions) == (prompts[0], groups[0])


def test_failures_of_groups_are_counted() -> None:
    def picky(completions: Any) -> list[float | None]:
        return [1.0 / len(text) for text in completions]

    prompt = Prompt((Message(role="user", content="a"),), {}, RowId("p", 1))
    groups = [[Completion((1,), text, True) for text in texts] for texts in (("x", ""), ("", ""), ("x", "xx"))]
    rewards = [LoadedReward("picky", picky, on_error="skip"), LoadedReward("kind", lambda completions: [1.0] * 6)]
    found = scored_groups(rewards, [prompt] * 3, groups, [])
    assert [group.failed for group in found] == [{"picky": 1}, {"picky": 2}, {"picky": 0}]
    assert [group.rewards for group in found] == [[2.0, 1.0], [1.0, 1.0], [2.0, 1.5]]


def test_names_of_rewards() -> None:
    rewards = [LoadedReward(name, len) for name in ("a", "b", "a", "a")]  # type: ignore[arg-type]
    assert names_of(rewards) == ["a", "b", "a-2", "a-3"]
