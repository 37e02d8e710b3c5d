"""`where`, `weight` and `count` say which rows of a source are used; the others are counted."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from prefold.data.selection import Selection, benchmark_texts, select_rows
from prefold.errors import UserError
from prefold.recipe import Benchmark, Source, make_recipe

Write = Callable[..., str]


def selected(*sources: Source, seed: int = 42) -> tuple[list[list[Any]], list[Selection]]:
    """The column `place` of the rows of every source, and the selections with their counts."""
    selections = select_rows(sources, seed)
    return [[row.value["place"] for row in selection.rows if row.value] for selection in selections], selections


def numbered(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"place": place, **columns} for place in range(number)]


def test_where_is_counted_by_source(write: Write) -> None:
    rows: list[Any] = [
        {"place": 0, "score": 7},
        {"place": 1, "score": 2},
        5,
        {"place": 3, "score": "7"},
        {"place": 4, "score": 9},
    ]
    path, other = write("pairs.jsonl", rows), write("other.jsonl", numbered(3))
    kept, (selection, unfiltered) = selected(Source(path=path, where="score > 5"), Source(path=other))
    assert kept == [[0, 4], [0, 1, 2]]
    assert (selection.rows_in, selection.rows_filtered, selection.rows_not_drawn) == (5, 1, 0)
    assert [(problem.kind, problem.origin.row) for problem in selection.problems] == [("where_failed", 4)]
    assert (unfiltered.rows_in, unfiltered.rows_filtered, unfiltered.problems) == (3, 0, [])


@pytest.mark.parametrize(
    "condition, message",
    [
        ("plase > 5", r"no row has the column `plase`[^\n]*\n  to do: did you mean `place`\?"),
        ("place > 5", r"`where` leaves none of its 3 rows\n"),
        ('place > "5"', r"none of its 3 rows; it fails for 3: place and '5': a number beside a string"),
    ],
)
def test_a_condition_that_leaves_no_row_is_an_error(write: Write, condition: str, message: str) -> None:
    path = write("pairs.jsonl", numbered(3))
    with pytest.raises(UserError, match=message):
        selected(Source(path=path, where=condition))


@pytest.mark.parametrize("seed", [0, 42])
def test_a_draw_is_that_of_datasets(write: Write, seed: int) -> None:
    path = write("pairs.jsonl", numbered(50))
    expected = datasets.Dataset.from_list(numbered(50)).filter(lambda row: row["place"] >= 7)
    expected = expected.shuffle(seed=seed).select(range(20))["place"]
    kept, (selection,) = selected(Source(path=path, count=20, where="place >= 7"), seed=seed)
    assert kept == [list(expected)] and len(set(kept[0])) == 20
    assert (selection.rows_in, selection.rows_filtered, selection.rows_not_drawn) == (50, 7, 23)


def test_a_share_of_the_rows_is_drawn(write: Write) -> None:
    path = write("pairs.jsonl", numbered(10))
    expected = datasets.Dataset.from_list(numbered(10)).shuffle(seed=3).select(range(2))["place"]
    kept, (selection,) = selected(Source(path=path, count=0.29), seed=3)
    assert (kept, selection.rows_not_drawn) == ([list(expected)], 8)
    with pytest.raises(UserError, match=r"`count: 0\.05` of 10 rows is less than a row"):
        selected(Source(path=path, count=0.05))


def test_a_draw_is_from_the_rows_that_can_be_read(write: Write) -> None:
    path = write("pairs.jsonl", [5, *numbered(4), "x"])
    (selection,) = select_rows([Source(path=path, count=4)], seed=1)
    assert sorted((row.origin.row, row.value is None) for row in selection.rows) == [
        (1, True), (2, False), (3, False), (4, False), (5, False), (6, True)
    ]  # fmt: skip
    with pytest.raises(UserError, match="only 4 rows to draw from, but `count: 5`"):
        selected(Source(path=path, count=5))


@pytest.mark.parametrize(
    "sizes, weights, expected",
    [
        ((100, 100), (0.7, 0.3), [100, 42]),
        ((100, 10), (0.7, 0.3), [23, 10]),
        ((30, 30, 30), (2, 1, None), [30, 15, 30]),
        ((10, 10, 10), (0.1, 0.1, 0.1), [10, 10, 10]),
        ((7, 21), (1, 3), [7, 21]),
        ((5,), (0.2,), [5]),
    ],
)
def test_weights_give_the_largest_mixture_without_repeats(
    write: Write, sizes: Sequence[int], weights: Sequence[float | None], expected: list[int]
) -> None:
    paths = [write(f"{place}.jsonl", numbered(size)) for place, size in enumerate(sizes)]
    kept, selections = selected(
        *[Source(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    )
    assert [len(set(rows)) for rows in kept] == [len(rows) for rows in kept] == expected
    assert [selection.rows_not_drawn for selection in selections] == [
        size - number for size, number in zip(sizes, expected, strict=True)
    ]
    # No source can give more: one of those with a weight is used up.
    assert any(size == number for size, number in zip(sizes, expected, strict=True))


def test_a_weight_that_no_row_is_left_for_is_an_error(write: Write) -> None:
    sources = [Source(path=write("a.jsonl", numbered(2)), weight=1), Source(path=write("b.jsonl", [{}]), weight=0.01)]
    with pytest.raises(UserError, match=r"b\.jsonl: no row of it would be used"):
        select_rows(sources, seed=1)


def test_a_streamed_source_gives_its_first_rows_and_reads_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def load_dataset(path: str, **settings: Any) -> Any:
        return (read.append(place) or {"place": place} for place in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    kept, (selection,) = selected(Source(path="org/huge", streaming=True, count=3, where="place >= 2"))
    assert kept == [[2, 3, 4]] and len(read) == 5
    assert (selection.rows_in, selection.rows_filtered) == (5, 2)


def test_too_few_streamed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **settings: [{"place": 1}])
    with pytest.raises(UserError, match="only 1 rows to draw from"):
        selected(Source(path="org/small", streaming=True, count=3))


def test_sources_without_weight_and_count_are_read_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **settings: ({"place": place} for place in range(10**9)))
    (selection,) = select_rows([Source(path="org/huge", where="place > 1")], seed=1)
    assert next(selection.rows).value == {"place": 2} and selection.rows_in == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight": 0.5, "count": 3}, "give either `weight` or `count`"),
        ({"weight": 0.5, "streaming": True}, "`weight` needs the number of rows"),
        ({"weight": 0}, "greater than 0"),
        ({"count": 2.5}, "a whole number of rows, or a share of the rows below 1"),
        ({"count": 0.5, "streaming": True}, "a share in `count` needs the number of rows"),
        ({"cuont": 3}, "did you mean `count`"),
    ],
)
def test_sources_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    source = {"path": "pairs.jsonl", **settings}
    recipe = {"method": "dpo", "model": {"name": "m"}, "data": {"train": [source]}, "output_dir": "x"}
    with pytest.raises(UserError, match=message):
        make_recipe(recipe)


# Stand-ins with the columns of seven public preference sets, as one tutorial mixes them: rows and how many pass.
SEVEN: list[tuple[str, dict[str, Any], list[dict[str, Any]], int]] = [
    (
        "capybara.parquet",
        {"where": "len(chosen) > 2 and chosen_rating >= 5"},
        [
            {
                "source": "Airoboros",
                "conversation": [{"input": "a", "output": "b"}],
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * turns,
                "chosen_rating": rating,
                "chosen_model": "gpt-4",
                "rejected_rating": 2.0,
            }
            for turns, rating in ((2, 5.0), (2, 4.0), (1, 5.0), (3, None))
        ],
        1,
    ),
    (
        "intel-orca.jsonl",
        {"where": 'status != "tie" and chosen_score >= 5 and in_gsm8k_train == false', "count": 2},
        [
            {
                "input": "a",
                "chosen": "b",
                "rejected": "c",
                "rating": [9.0, 1.0],
                "status": status,
                "chosen_score": score,
                "in_gsm8k_train": known,
            }
            for status, score, known in (
                ("swapped", 9.0, False),
                ("unchanged", 8.0, False),
                ("tie", 9.0, False),
                ("swapped", 4.0, False),
                ("swapped", 9.0, True),
                ("unchanged", 5.0, False),
                ("unchanged", None, False),
            )
        ],
        2,
    ),
    (
        "ultrafeedback.jsonl.gz",
        {"where": 'column("chosen-rating") >= 4 and source not in ["truthful_qa"] and column("chosen-model") != null'},
        [
            {
                "source": source,
                "prompt": "a",
                "chosen": [],
                "rejected": [],
                "chosen-rating": rating,
                "chosen-model": model,
            }
            for source, rating, model in (("flan", 4.5, "gpt-4"), ("truthful_qa", 5.0, "gpt-4"), ("flan", 5.0, None))
        ],
        1,
    ),
    (
        "math.csv",
        {"where": "number(chosen_rating) > number(rejected_rating) and len(instruction) > 0"},
        [
            {
                "metadata": "{}",
                "instruction": "a",
                "chosen_response": "b",
                "chosen_rating": rating,
                "rejected_rating": "2",
            }
            for rating in ("4", "1", "3")
        ],
        2,
    ),
    (
        "toxic.json",
        {},
        [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3,
        3,
    ),
    (
        "prm.jsonl",
        {"weight": 1},
        [{"prompt": f"a{row}", "chosen": "b", "rejected": "c", "is_chosen_correct": True} for row in range(8)],
        6,
    ),
    (
        "truthy.jsonl",
        {"weight": 0.5, "where": 'lower(source) == "truthy_dpo" and system != null'},
        [
            {
                "id": str(row),
                "source": "Truthy_DPO",
                "system": "" if row else None,
                "prompt": "a",
                "chosen": "b",
                "rejected": "c",
            }
            for row in range(4)
        ],
        3,
    ),
]


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return str(path)


def test_a_mixture_of_seven_sources_is_read_filtered_drawn_and_counted(tmp_path: Path) -> None:
    sources = [{"path": write_rows(tmp_path, name, rows), **settings} for name, settings, rows, _ in SEVEN]
    recipe = make_recipe(
        {"method": "dpo", "model": {"name": "m"}, "data": {"train": sources, "shuffle": True}, "output_dir": "x"}
    )
    selections = select_rows(recipe.data.train, recipe.train.seed)
    for selection, (name, _, rows, used) in zip(selections, SEVEN, strict=True):
        assert len(list(selection.rows)) == used, name
        assert selection.rows_in == len(rows) == used + selection.rows_filtered + selection.rows_not_drawn, name


@pytest.mark.parametrize(
    "row, message",
    [
        ({"questions": "a"}, "row 1, `question`: there is no such column; did you mean `questions`"),
        ({"question": ["a"]}, "row 1, `question`: it is a list"),
        (5, "row 1, `question`: not a JSON object"),
    ],
)
def test_a_benchmark_needs_its_texts(write: Write, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(benchmark_texts(Benchmark(path=write("test.jsonl", [row]), column="question")))
