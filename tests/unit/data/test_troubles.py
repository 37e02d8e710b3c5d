"""No trouble with data passes without a finding, or a refusal, that names its cause."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tiny_tokenizer import make_tokenizer
from troubles import REFUSED, TROUBLES, Trouble

from prefold.data.mixture import load_split
from prefold.errors import UserError
from prefold.recipe import Data, Source, make_section

Write = Callable[..., str]


def _lines(trouble: Trouble) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in trouble.rows)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_it_does_not_pass_unseen(trouble: Trouble, write: Write) -> None:
    source = make_section(Source, {"path": write("pairs.jsonl", _lines(trouble)), **trouble.source})
    held_out = [Source(path=write("held_out.jsonl", [*trouble.held_out]))] if trouble.held_out else []
    tokenizer = make_tokenizer(trouble.template, bos="<|im_start|>")
    data = Data(train=[source], eval=held_out, **trouble.settings)
    try:
        report = load_split(data, tokenizer, seed=1, kind=trouble.kind).report
    except UserError as refusal:
        assert trouble.expected.startswith(REFUSED), refusal
        assert trouble.expected.removeprefix(REFUSED) in str(refusal)
        return
    kinds = {finding.kind: finding for finding in report.findings}
    assert trouble.expected in kinds, (trouble.expected, list(kinds))
    assert len(kinds[trouble.expected].message) < 200 and kinds[trouble.expected].advice


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [trouble.name for trouble in TROUBLES]
    assert len(names) == len(set(names)) >= 40
