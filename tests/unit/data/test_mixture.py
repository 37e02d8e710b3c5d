"""The sources of a recipe become train and held-out examples; whatever is left out is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datasets
import pytest
from data_samples import assistant, example, pair, text_rows, user
from tiny_tokenizer import NO_END, THINKING, make_tokenizer
from transformers import PreTrainedTokenizerFast

from prefold.data.duplicates import Match
from prefold.data.examples import Example, Examples
from prefold.data.findings import SourceCount, fingerprint
from prefold.data.mixture import Prepared, hold_out, load_split, unpaired
from prefold.data.preference import RowId, Unpaired
from prefold.errors import UserError
from prefold.recipe import Benchmark, Data, Source
from prefold.trees.packing import TokenTree

Write = Callable[..., str]
BAD = {"prompt": "Why?", "chosen": "", "rejected": "No."}
SAME = {"prompt": "Why?", "chosen": "So.", "rejected": " So. "}


def make_data(train: Sequence[str], held_out: Sequence[str] = (), **settings: Any) -> Data:
    sources = {"train": [Source(path=path) for path in train], "eval": [Source(path=path) for path in held_out]}
    return Data(**sources, **settings)


def kinds(prepared: Prepared) -> dict[str, tuple[str, int, list[int]]]:
    found = prepared.report.findings
    return {finding.kind: (finding.severity, finding.count, [row.row for row in finding.rows]) for finding in found}


def prompts(examples: Examples) -> list[str]:
    return [record.prompt[-1]["content"] for record in examples.records]


def test_each_side_of_a_pair_takes_its_own_context_along() -> None:
    given = {"enable_thinking": False}
    whole = Example(
        replace(pair(), template_kwargs=given), TokenTree((1,), ((2, 3), (4, 5, 6)), (((0, 1),), ((1, 2),)))
    )
    asked, origin = (user("Why?"),), whole.record.origin
    assert unpaired(whole) == [
        Example(Unpaired(asked, (assistant("So."),), True, origin, given), TokenTree((1,), ((2, 3),), (((0, 1),),))),
        Example(
            Unpaired(asked, (assistant("No."),), False, origin, given), TokenTree((1,), ((4, 5, 6),), (((1, 2),),))
        ),
    ]
    assert [each.tree.context for each in unpaired(replace(whole, tree=replace(whole.tree, context=())))] == [(), ()]


def test_sources_follow_each_other_in_the_order_of_their_rows(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    first = write("first.jsonl", [*text_rows(2, "A{}"), BAD, SAME])
    second = write(
        "second.json",
        '[{"chosen": [{"role": "user", "content": "B"}, {"role": "assistant", "content": "x"}], '
        '"rejected": [{"role": "user", "content": "B"}, {"role": "assistant", "content": "y"}]}]',
    )
    held_out = write("held_out.jsonl", text_rows(1, "C{}"))
    prepared = load_split(make_data([first, second], [held_out]), chatml, seed=1)
    assert (prompts(prepared.train), prompts(prepared.held_out)) == (["A0", "A1", "B"], ["C0"])
    assert prepared.train[1].record.origin == RowId(first, 2)
    assert prepared.report.sources == (
        SourceCount(first, "text", 4, 2, examples=2),
        SourceCount(second, "conversations", 1, 1, examples=1),
        SourceCount(held_out, "text", 1, 1, examples=1),
    )
    assert kinds(prepared) == {
        "empty_text": ("warning", 1, [3]),
        "identical": ("warning", 1, [4]),
        "small_held_out": ("warning", 1, []),
    }
    assert (prepared.report.train.trees, prepared.report.held_out.trees) == (3, 1)
    assert chatml.decode(prepared.train[0].tree.completions[0]) == "Good 0<|im_end|>\n"


def test_odd_rows_are_used_and_counted(write: Write) -> None:
    path = write("pairs.jsonl", text_rows(3))
    thinking = load_split(make_data([path]), make_tokenizer(THINKING), seed=1)
    endless = load_split(make_data([path]), make_tokenizer(NO_END), seed=1)
    assert kinds(thinking)["prompt_not_prefix"] == ("warning", 3, [1, 2, 3])
    assert kinds(endless)["no_end_token"] == ("warning", 3, [1, 2, 3])
    assert len(thinking.train) == len(endless.train) == 3


@pytest.mark.parametrize("kind", ["pairs", "prompts"])
def test_a_system_message_for_all(kind: Any, write: Write, chatml: PreTrainedTokenizerFast) -> None:
    """Before every prompt and once; a row with another one of its own is left out."""
    rows = [{**row, "system": own} for row, own in zip(text_rows(3), ("", "Be brief.", "Be long."), strict=True)]
    rows = rows if kind == "pairs" else [{"prompt": row["prompt"], "system": row["system"]} for row in rows]
    data = make_data([write("rows.jsonl", rows)], system="Be brief.")
    prepared = load_split(data, chatml, seed=1, kind=kind)
    assert [[turn["content"] for turn in record.prompt] for record in prepared.train.records] == [
        ["Be brief.", "Question 0"],
        ["Be brief.", "Question 1"],
    ]
    assert chatml.decode(prepared.train[0].tree.prompt).count("Be brief.") == 1
    assert kinds(prepared)["bad_message"][1:] == (1, [3])


# ---- policies ---------------------------------------------------------------------------------------------------


@pytest.fixture
def some_long(write: Write) -> str:
    long = {"prompt": "Why? " * 100, "chosen": "So.", "rejected": "No."}
    return write("pairs.jsonl", [*text_rows(2), long, {"prompt": "Why?", "chosen": "So. " * 100, "rejected": "No."}])


def test_overlong_drop(some_long: str, chatml: PreTrainedTokenizerFast) -> None:
    prepared = load_split(make_data([some_long], max_length=200), chatml, seed=1)
    assert kinds(prepared)["overlong"] == ("warning", 2, [3, 4]) and len(prepared.train) == 2


def test_overlong_truncate_prompt(some_long: str, chatml: PreTrainedTokenizerFast) -> None:
    prepared = load_split(make_data([some_long], max_length=200, overlong="truncate_prompt"), chatml, seed=1)
    assert kinds(prepared)["overlong"] == ("warning", 1, [4])
    assert kinds(prepared)["prompt_truncated"] == ("warning", 1, [3])
    assert prepared.report.train.longest == 200
    assert chatml.decode(prepared.train[2].tree.prompt).endswith("Why? <|im_end|>\n<|im_start|>assistant\n")


def test_overlong_error(some_long: str, chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        load_split(make_data([some_long], max_length=200, overlong="error", bad_rows="drop"), chatml, seed=1)
    message = str(caught.value)
    assert (
        message.startswith(f"{some_long}, row 3: ")
        and "`max_length` 200" in message
        and "`data.overlong: drop`" in message
    )


def test_bad_rows_error_names_the_first(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("pairs.jsonl", [*text_rows(1), SAME, BAD])
    with pytest.raises(UserError) as caught:
        load_split(make_data([path], bad_rows="error"), chatml, seed=1)
    assert str(caught.value) == (
        f"{path}, row 2: `chosen` and `rejected` are the same\n  to do: mend the row, or set `data.bad_rows: drop`"
    )


def test_bad_rows_error_lets_overlong_rows_be_dropped(some_long: str, chatml: PreTrainedTokenizerFast) -> None:
    assert len(load_split(make_data([some_long], max_length=200, bad_rows="error"), chatml, seed=1).train) == 2


def test_no_usable_row_left(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("pairs.jsonl", [BAD, BAD, SAME, BAD, BAD, BAD])
    with pytest.raises(UserError) as caught:
        load_split(make_data([path]), chatml, seed=1)
    rows = [(1, "`chosen` is empty"), (2, "`chosen` is empty"), (3, "`chosen` and `rejected` are the same")]
    rows += [(4, "`chosen` is empty"), (5, "`chosen` is empty")]
    assert str(caught.value) == (
        "`data.train`: no usable row is left of 6: 5 empty_text, 1 identical"
        + "".join(f"\n    {path}, row {row}: {message}" for row, message in rows)
        + "\n  to do: mend the rows; the first ones are named above"
    )


def test_no_usable_held_out_row_left(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    train = write("pairs.jsonl", [*text_rows(2), BAD])
    held_out = write("held_out.jsonl", [BAD, {**SAME, "chosen": "x" * 2000}])
    with pytest.raises(UserError, match=r"`data.eval`: no usable row is left of 2: 1 empty_text, 1 overlong\n"):
        load_split(make_data([train], [held_out]), chatml, seed=1)


def test_if_all_rows_are_overlong_the_advice_is_to_raise_the_limit(
    write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"raise `data\.max_length`"):
        load_split(make_data([write("pairs.jsonl", text_rows(2))], max_length=5), chatml, seed=1)


def test_a_missing_template_is_reported_before_the_files_are_read() -> None:
    with pytest.raises(UserError, match="no chat template"):
        load_split(make_data(["nowhere.jsonl"]), make_tokenizer(None), seed=1)


def test_every_row_is_used_or_counted_with_its_reason(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rows = [*text_rows(20), *text_rows(2), BAD, SAME, 5, {"prompt": 1, "chosen": "a", "rejected": "b"}]
    rows = [row if row == 5 else {"score": 1, **row} for row in rows]
    rows += [{"score": "high", "prompt": "a", "chosen": "b", "rejected": "c"}] + [{"score": 0}] * 3
    test = write("test.jsonl", [{"question": "Question 7"}, {"question": "Question 19"}, {"question": None}])
    source = Source(path=write("pairs.jsonl", rows), where="score > 0", count=23)
    data = Data(
        train=[source], duplicates="drop_exact", decontaminate=[Benchmark(path=test, column="question")], shuffle=True
    )
    prepared = load_split(data, chatml, seed=3)
    (counts,) = prepared.report.sources
    about_sets = ("small_held_out", "length_bias", "telling_opening")
    found = {kind: count for kind, (_, count, _) in kinds(prepared).items() if kind not in about_sets}
    left_out = sum(found.values())
    assert counts.rows_in == 30 == counts.rows_used + counts.rows_filtered + counts.rows_not_drawn + left_out
    assert (counts.rows_filtered, counts.rows_not_drawn, counts.rows_used) == (3, 2, len(prepared.train))
    assert (found["where_failed"], found["broken_row"]) == (1, 1)


def test_shuffle_gives_the_order_of_datasets(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    paths = [write("a.jsonl", text_rows(6, "A{}")), write("b.jsonl", text_rows(6, "B{}"))]
    plain = prompts(load_split(make_data(paths), chatml, seed=9).train)
    expected = datasets.Dataset.from_dict({"prompt": plain}).shuffle(seed=9)["prompt"]
    assert prompts(load_split(make_data(paths, shuffle=True), chatml, seed=9).train) == list(expected) != plain


# ---- repeats and benchmarks -------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"


def test_repeats_are_kept_or_dropped_as_the_recipe_says(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "Count: " + LONG, "chosen": "So.", "rejected": "No."}
    path = write(
        "pairs.jsonl", [pair, pair, {**pair, "prompt": "Count: " + LONG + " eighteen"}, {**pair, "chosen": "Yes."}]
    )
    for policy, used, dropped in (
        ("keep", [1, 2, 3, 4], None),
        ("drop_exact", [1, 3, 4], [2]),
        ("drop_near", [1, 4], [2, 3]),
    ):
        prepared = load_split(make_data([path], duplicates=policy, bad_rows="error"), chatml, seed=1)
        assert [one.record.origin.row for one in prepared.train] == used
        found = kinds(prepared)
        assert found.get("repeated") == (dropped and ("note", len(dropped), dropped))
        assert ("duplicate" in found) == (policy == "keep")


def test_a_repeat_of_a_row_that_is_not_used_is_used(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    near = [{"prompt": "Count: " + LONG + " 18" * extra, "chosen": "So.", "rejected": "No."} for extra in (2, 0)]
    data = make_data([write("pairs.jsonl", near)], duplicates="drop_near", max_length=158)
    prepared = load_split(data, chatml, seed=1)
    assert [one.record.origin.row for one in prepared.train] == [2]


def test_pairs_with_text_of_a_benchmark_are_dropped_and_reported(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rows = [*text_rows(3), {"prompt": "Now count: " + LONG, "chosen": "So.", "rejected": "No."}]
    path = write("pairs.jsonl", rows)
    test = write("test.csv", f"id,question\n1,{LONG}\n2,Unseen question of a benchmark\n")
    data = Data(
        train=[Source(path=path)], eval=[Source(path=path)], decontaminate=[Benchmark(path=test, column="question")]
    )
    prepared = load_split(data, chatml, seed=1)
    assert len(prepared.train) == 3 and len(prepared.held_out) == 4
    assert kinds(prepared)["contaminated"] == ("warning", 1, [4])
    words = " ".join(LONG.split()[:13])
    assert prepared.report.contamination == (Match(RowId(path, 4), RowId(test, 1), words),)
    assert prepared.report.as_json()["contamination"] == [
        {"row": {"source": path, "row": 4}, "benchmark": {"source": test, "row": 1}, "words": words}
    ]


# ---- holding out ------------------------------------------------------------------------------------------------


def test_equal_prompts_stay_on_one_side() -> None:
    examples = Examples.of(example(row, prompt=f"Question {row % 40}", chosen=f"Answer {row}") for row in range(120))
    train, held_out = hold_out(examples, 0.25, seed=3)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert len(held_out) == 30 and len(train) == 90
    rows = [one.record.origin.row for one in train]
    assert rows == sorted(rows)


def test_the_draw_hangs_on_the_seed_and_not_on_the_order_of_rows() -> None:
    examples = Examples.of(example(row, prompt=f"Question {row}") for row in range(50))
    held_out = set(prompts(hold_out(examples, 0.2, seed=3)[1]))
    assert set(prompts(hold_out(examples[::-1], 0.2, seed=3)[1])) == held_out
    assert set(prompts(hold_out(examples, 0.2, seed=4)[1])) != held_out


@pytest.mark.parametrize("fraction, number", [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_both_sides_get_something(fraction: float, number: int) -> None:
    train, held_out = hold_out(
        Examples.of(example(row, prompt=f"Question {row}") for row in range(4)), fraction, seed=1
    )
    assert (len(train), len(held_out)) == (4 - number, number)


def test_a_prompt_with_too_many_pairs_is_held_out_only_if_there_is_no_smaller_one() -> None:
    crowd = [example(row, prompt="Crowd") for row in range(8)]
    couple = [example(row, prompt="Couple") for row in (8, 9)]
    for seed in range(10):
        assert prompts(hold_out(Examples.of(crowd + couple), 0.05, seed)[1]) == ["Couple", "Couple"]


def test_a_single_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError, match="all usable rows have the same prompt"):
        hold_out(Examples.of([example(1), example(2, chosen="Yes.")]), 0.5, seed=1)


def test_load_split_holds_out_and_repeats_itself(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("pairs.jsonl", text_rows(100))
    prepared, again = (load_split(make_data([path], eval_fraction=0.5), chatml, seed=5) for _ in range(2))
    assert (len(prepared.train), len(prepared.held_out)) == (50, 50)
    assert prepared == again and fingerprint(prepared.held_out) == fingerprint(again.held_out)
    assert prepared.report.sources == (SourceCount(path, "text", 100, 100, examples=100),)
    assert "small_held_out" not in kinds(prepared) and "prompt_in_both_splits" not in kinds(prepared)


def test_held_out_prompts_that_are_trained_on_are_found(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    train, held_out = write("pairs.jsonl", text_rows(3)), write("held_out.jsonl", text_rows(5)[2:])
    prepared = load_split(make_data([train], [held_out]), chatml, seed=1)
    assert kinds(prepared)["prompt_in_both_splits"] == ("warning", 1, [1])
