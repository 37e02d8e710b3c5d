"""`where:` keeps the rows that its condition holds for, says where it cannot be read, and runs nothing."""

from __future__ import annotations

from typing import Any

import pytest

from prefold.errors import UserError
from prefold.recipe import make_recipe
from prefold.recipe.where import Mismatch, Where, WhereError

ROW: dict[str, Any] = {
    "rating": 7,
    "margin": -0.5,
    "clean": False,
    "name": "Orca",
    "nothing": None,
    "tags": ["math", 1],
    "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ""}],
    "meta": {"split": "train", "two words": {"deep": 3}},
    "chosen-model": "gpt-4",
    "true": "a column",
}


@pytest.mark.parametrize(
    "condition, kept",
    [
        ("rating >= 5 and clean == false", True),
        ("rating >= 5 and clean == true", False),
        ("rating >= 5 and clean == True", False),
        ("rating == 7.0", True),
        ("5 < rating <= 7", True),
        ("5 < rating < 7", False),
        ("7 > rating or margin < -0.25", True),
        ("not clean", True),
        ("not (rating > 5 and not clean)", False),
        ("clean or rating != 7", False),
        ('name == "Orca"', True),
        ("name < 'Z'", True),
        ('lower(name) == "orca"', True),
        ("len(name) == 4", True),
        ("len(chosen) == 2", True),
        ("len(chosen[-1].content) > 0", False),
        ('chosen[0]["role"] == "user"', True),
        ("chosen[5].role == 'user'", False),
        ('rating in [1, 7, "x"]', True),
        ("rating not in (1, 7)", False),
        ('name not in ["Orca-2"]', True),
        ("clean in [0]", False),
        ('"rc" in name', True),
        ("'math' in tags", True),
        ("'arc' not in tags", True),
        ('meta.split == "train"', True),
        ('meta["two words"].deep > 2', True),
        ('column("chosen-model") == "gpt-4"', True),
        ('column("true") == "a column"', True),
        ('column("meta").split == "train"', True),
        ('number("3") > 2', True),
        ("number(rating) > 2", True),
        # What is null or not there compares false, whichever way it is asked.
        ("nothing == 1", False),
        ("nothing != 1", False),
        ("nothing < 1", False),
        ("1 > nothing", False),
        ("nothing in [1]", False),
        ("nothing not in [1]", False),
        ("1 in nothing", False),
        ("len(nothing) > 0", False),
        ("lower(nothing) == 'a'", False),
        ("number(nothing) > 0", False),
        ("absent == 1", False),
        ("not absent > 1", True),
        ("meta.absent.deeper > 1", False),
        ("nothing", False),
        ("not nothing", True),
        ("nothing == null", True),
        ("nothing != None", False),
        ("null == name", False),
        ("name != null and nothing == null", True),
        ("absent == null", True),
        # As YAML folds it.
        ("  rating > 5\n  and clean == false\n", True),
    ],
)
def test_rows_are_kept_for_which_the_condition_holds(condition: str, kept: bool) -> None:
    assert Where(condition)(ROW) is kept


@pytest.mark.parametrize(
    "condition, message",
    [
        ('rating > "5"', "rating and '5': a number beside a string"),
        ("name == 5", "name and 5: a string beside a number"),
        ("clean == 0", "true or false beside a number"),
        ("clean != 'false'", "true or false beside a string"),
        ("tags < tags", "a list has no order"),
        ("meta > meta", "an object has no order"),
        ("clean <= clean", "true or false has no order"),
        ("name", "`name` is a string, not true or false"),
        ("rating and clean", "`rating` is a number, not true or false"),
        ("not name", "`name` is a string, not true or false"),
        ("len(rating) > 1", "len(rating): a number has no length"),
        ("lower(rating) == 'a'", "lower(rating): a number is not text"),
        ("number(name) > 1", "number(name): a string that is no number"),
        ("name.first == 'a'", "`name.first`: a string has no `first`"),
        ("meta[0] == 1", "`meta.0`: an object has no `0`"),
        ("1 in name", "a number cannot be in a string"),
        ("'a' in meta", "a string cannot be in an object"),
    ],
)
def test_values_of_the_wrong_type_fail(condition: str, message: str) -> None:
    with pytest.raises(Mismatch) as caught:
        Where(condition)(ROW)
    assert message in str(caught.value)


def test_and_and_or_stop_where_the_answer_is_known() -> None:
    assert Where("name != null or len(rating) > 1")(ROW) is True
    assert Where("rating == 0 and len(rating) > 1")(ROW) is False


@pytest.mark.parametrize(
    "condition, message",
    [
        ("rating >=", "at character 10: invalid syntax"),
        ("rating = 5", "at character 8: invalid syntax"),
        ("rating > 5 && clean", "at character 13: invalid syntax"),
        ("(rating > 5", "at character 1: '(' was never closed"),
        ("", "at character 1"),
        ("rating > 5; clean", "at character 11"),
        ("a\0b", "cannot be read"),
        ("rating + 1 > 5", "`rating + 1` at character 1 cannot be used"),
        ("len(name) > 3 and 'é' == name * 2", "`name * 2` at character 26 cannot be used"),
        ("__import__('os').system('ls') == 0", "`__import__('os').system('ls')` at character 1 cannot"),
        ("open('x')", "`open('x')` at character 1"),
        ("len(name, name) > 1", "cannot be used"),
        ("len(obj=name) > 1", "cannot be used"),
        ("column(name) == 1", "cannot be used"),
        ("(lambda: 1)() == 1", "cannot be used"),
        ("[x for x in tags] == tags", "cannot be used"),
        ("f'{name}' == name", "cannot be used"),
        ("b'a' == name", "cannot be used"),
        ("1j == rating", "cannot be used"),
        ("... == rating", "cannot be used"),
        ("name if clean else name", "cannot be used"),
        ("(rating := 5) > 3", "cannot be used"),
        ("rating in [name]", "`name` at character 12 cannot be used"),
        ("rating is 5", "cannot be used"),
        ("rating < null", "cannot be used"),
        ("name[0:1] == 'a'", "cannot be used"),
        ("name[rating] == 'a'", "cannot be used"),
        ("{'a': 1} == meta", "cannot be used"),
        ("-name < 1", "cannot be used"),
        ("not " * 5000 + "clean", ""),
        ("(" * 500 + "clean" + ")" * 500, ""),
    ],
)
def test_what_is_no_condition_is_refused(condition: str, message: str) -> None:
    with pytest.raises(WhereError) as caught:
        Where(condition)
    assert message in str(caught.value)


def test_a_recipe_names_the_field_of_a_condition_that_cannot_be_read() -> None:
    source = {"path": "pairs.jsonl", "where": "rating >="}
    recipe = {"method": "dpo", "model": {"name": "m"}, "data": {"train": [source]}, "output_dir": "x"}
    with pytest.raises(UserError, match=r"`data\.train\.0\.where`: cannot be read at character 10"):
        make_recipe(recipe)


def asked(condition: str, *rows: dict[str, Any]) -> Where:
    where = Where(condition)
    for row in rows:
        where(row)
    return where


@pytest.mark.parametrize(
    "condition, expected",
    [
        ("ratting > 1", "no row has the column `ratting` of `where: ratting > 1`\n  to do: did you mean `rating`?"),
        ("rating > 1 and zzzz == 1", "no row has the column `zzzz`"),
        ("meta.splitt == 'a'", "`meta.splitt`"),
    ],
)
def test_a_column_that_no_row_has_is_an_error_with_the_nearest_name(condition: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        asked(condition, ROW, {**ROW, "other": 1}).require_known_columns("pairs.jsonl")
    assert expected in str(caught.value) and str(caught.value).startswith("pairs.jsonl: ")


def test_a_column_that_some_row_has_is_known() -> None:
    asked("sometimes == 1", ROW, {"sometimes": None}, ROW).require_known_columns("pairs.jsonl")
    asked("nothing.inner == 1", ROW).require_known_columns("pairs.jsonl")
    asked("absent == 1").require_known_columns("pairs.jsonl")
