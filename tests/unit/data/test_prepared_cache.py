"""What was tokenized once is not tokenized again, unless something has changed that decides it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_samples import text_rows
from tiny_tokenizer import CHATML, LLAMA3, make_tokenizer
from transformers import PreTrainedTokenizerFast

from prefold.data import mixture, prepared_cache
from prefold.data.mixture import Prepared, load_split
from prefold.data.prepared_cache import prepare
from prefold.data.templates import give_keywords
from prefold.errors import UserError
from prefold.recipe import Benchmark, Data, Source

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries."""
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each call of the tokenizer was given."""
    calls: list[int] = []
    kept = mixture.tokenize_all

    def counted(records: Any, *args: Any) -> Any:
        calls.append(len(records))
        return kept(records, *args)

    monkeypatch.setattr(mixture, "tokenize_all", counted)
    return calls


def tokenizer(template: str = CHATML, **settings: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, **{"bos": "<|im_start|>", **settings})


@pytest.fixture
def data(write: Write) -> Data:
    """Something of everything that can be found and left out."""
    first = [*text_rows(8, "A{}"), {"prompt": "Why?", "chosen": "", "rejected": "No."}, *text_rows(1, "A{}")]
    second = [{**row, "rating": number} for number, row in enumerate(text_rows(9, "B{}"))]
    texts = write("benchmark.jsonl", [{"question": text_rows(1, "A{}")[0]["chosen"]}])
    return Data(
        train=[
            Source(path=write("first.jsonl", first), weight=2),
            Source(path=write("second.jsonl", second), weight=1, where="rating > 0"),
        ],
        decontaminate=[Benchmark(path=texts, column="question")],
        eval_fraction=0.3,
        shuffle=True,
        duplicates="drop_exact",
    )


def test_the_second_call_finds_all_of_the_first(data: Data, tokenized: list[int], cached: Path) -> None:
    first = prepare(data, tokenizer(), seed=1)
    assert sum(tokenized) > 0 and [path.name[0] for path in cached.iterdir()] != ["."]
    tokenized.clear()
    again = prepare(data, tokenizer(), seed=1)
    assert tokenized == []
    assert again == first and again.report.as_json() == first.report.as_json()
    assert again == load_split(data, tokenizer(), seed=1)
    assert list(again.held_out.trees) == list(first.held_out.trees) and again.report.findings


def test_held_out_files_are_kept_too(write: Write, tokenized: list[int]) -> None:
    train, held_out = (write(name, text_rows(3, name + " {}")) for name in ("train.jsonl", "held_out.jsonl"))
    data = Data(train=[Source(path=train)], eval=[Source(path=held_out)])
    first = prepare(data, tokenizer(), seed=1)
    tokenized.clear()
    again = prepare(data, tokenizer(), seed=1)
    assert tokenized == [] and again == first and len(again.held_out) == 3


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "prompts"])
def test_records_of_each_kind_come_back(write: Write, tokenized: list[int], kind: Any) -> None:
    rows = [{**row, "answer": {"numbers": [1, 2.5, None]}} for row in text_rows(3)]
    data = Data(train=[Source(path=write("rows.jsonl", rows))])
    first = prepare(data, tokenizer(), seed=1, kind=kind)
    tokenized.clear()
    assert prepare(data, tokenizer(), seed=1, kind=kind) == first and tokenized == []


def changed_data(data: Data, **settings: Any) -> Data:
    return Data(**{**data.model_dump(), **settings})


def in_file(name: str, change: Callable[[str], str]) -> Callable[[Data, Path], None]:
    def apply(data: Data, folder: Path) -> None:
        path, when = folder / name, (folder / name).stat()
        path.write_text(change(path.read_text()))
        os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))  # of the same age all the same

    return apply


@pytest.mark.parametrize(
    "change",
    [
        in_file("first.jsonl", lambda text: text.replace("A7", "A6")),
        in_file("second.jsonl", lambda text: text.replace('"rating": 5', '"rating": 0')),
        in_file("benchmark.jsonl", lambda text: text.replace("question", "questions")),
    ],
    ids=["rows", "a column of `where`", "a benchmark"],
)
def test_a_file_that_has_changed_is_read(
    data: Data, tokenized: list[int], tmp_path: Path, change: Callable[[Data, Path], None]
) -> None:
    first = prepare(data, tokenizer(), seed=1)
    tokenized.clear()
    change(data, tmp_path)
    try:
        assert prepare(data, tokenizer(), seed=1) != first and tokenized
    except UserError as error:
        assert "no such column" in str(error)


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_fraction": 0.4},
        {"shuffle": False},
        {"duplicates": "keep"},
        {"decontaminate": []},
        {"system": "Be brief."},
        {"max_length": 900},
        {"overlong": "truncate_prompt"},
        {"seed": 2},
        {"kind": "unpaired"},
        {"template": LLAMA3},
        {"eos": "<|eot|>"},
        {"adds_bos": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_setting_is_seen(data: Data, tokenized: list[int], settings: dict[str, Any]) -> None:
    prepare(data, tokenizer(), seed=1)
    tokenized.clear()
    own = {name: settings[name] for name in settings if name in ("template", "eos", "adds_bos")}
    call = {"seed": 1, **{name: settings[name] for name in settings if name in ("seed", "kind")}}
    of_data = {name: value for name, value in settings.items() if name not in {*own, *call}}
    prepare(changed_data(data, **of_data), tokenizer(**own), **call)
    assert sum(tokenized) > 0


@pytest.mark.parametrize("fields", [{"weight": 1}, {"count": 3, "weight": None}, {"where": "len(chosen) > 0"}])
def test_which_rows_are_used_is_seen(data: Data, tokenized: list[int], fields: dict[str, Any]) -> None:
    prepare(data, tokenizer(), seed=1)
    tokenized.clear()
    sources = data.model_dump()["train"]
    prepare(changed_data(data, train=[{**sources[0], **fields}, *sources[1:]]), tokenizer(), seed=1)
    assert sum(tokenized) > 0


def test_the_code_and_the_day_are_seen_where_they_decide(
    data: Data, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(prepared_cache.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2100, 1, 1)

    dated = CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    for template in (CHATML, dated):
        prepare(data, tokenizer(template), seed=1)
    tokenized.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prepared_cache, "date", Tomorrow)
        prepare(data, tokenizer(CHATML), seed=1)
        assert tokenized == []
        prepare(data, tokenizer(dated), seed=1)
        assert tokenized != []
    tokenized.clear()
    monkeypatch.setattr(prepared_cache, "_code", lambda: "another")
    prepare(data, tokenizer(), seed=1)
    assert tokenized != []


def test_what_the_template_is_given_is_seen_and_a_fixed_day_lasts(
    data: Data, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(prepared_cache.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2100, 1, 1)

    def given(**keywords: str) -> PreTrainedTokenizerFast:
        one = tokenizer("{{ strftime_now('%d') }}{{ style }}" + CHATML)
        give_keywords(one, keywords)
        return one

    fixed = {"strftime_now": "2025-06-30", "style": "brief"}
    prepare(data, given(**fixed), seed=1)
    tokenized.clear()
    monkeypatch.setattr(prepared_cache, "date", Tomorrow)
    prepare(data, given(**fixed), seed=1)
    assert tokenized == []
    for other in ({"style": "long"}, {"strftime_now": "2025-07-01"}):
        prepare(data, given(**fixed | other), seed=1)
        assert tokenized != []
        tokenized.clear()


def test_a_new_file_in_a_folder_is_seen(write: Write, tmp_path: Path, tokenized: list[int]) -> None:
    (tmp_path / "rows").mkdir()
    write("rows/a.jsonl", text_rows(2, "A{}"))
    data = Data(train=[Source(path=str(tmp_path / "rows"))])
    assert len(prepare(data, tokenizer(), seed=1).train) == 2
    write("rows/b.jsonl", text_rows(2, "B{}"))
    assert len(prepare(data, tokenizer(), seed=1).train) == 4
    shutil.move(tmp_path / "rows" / "a.jsonl", tmp_path / "rows" / "c.jsonl")
    tokenized.clear()
    assert prepare(data, tokenizer(), seed=1).train[0].record.origin.source.endswith("b.jsonl") and tokenized


# ---- the Hub ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_known_by_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenized: list[int], streaming: bool
) -> None:
    load, folder = datasets.load_dataset, tmp_path / "hub"
    folder.mkdir()

    def load_local(path: str, **settings: Any) -> Any:
        return load(str(folder), **settings, cache_dir=str(tmp_path / "downloads"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.chdir(tmp_path)
    data = Data(train=[Source(path="org/set", streaming=streaming)])
    calls = []
    for number in (3, 3, 4):
        content = "".join(json.dumps(row) + "\n" for row in text_rows(number))
        if not (folder / "train.jsonl").is_file() or (folder / "train.jsonl").read_text() != content:
            (folder / "train.jsonl").write_text(content)
        tokenized.clear()
        assert len(prepare(data, tokenizer(), seed=1).train) == number
        calls.append(sum(tokenized))
    # Of a stream nothing tells what it holds but reading it.
    assert calls == [3, 3 if streaming else 0, 4]


# ---- entries ----------------------------------------------------------------------------------------------------


def test_a_damaged_entry_is_made_again(data: Data, cached: Path, tokenized: list[int]) -> None:
    first = load_split(data, tokenizer(), seed=1)
    prepare(data, tokenizer(), seed=1)
    for name in ("train.arrow", "train.npy", "held_out.npy", "facts.json"):
        [entry] = cached.iterdir()
        content = (entry / name).read_bytes()
        for broken in (content[: len(content) // 2], None):
            (entry / name).unlink() if broken is None else (entry / name).write_bytes(broken)
            tokenized.clear()
            assert prepare(data, tokenizer(), seed=1) == first and tokenized, name


def test_an_error_leaves_nothing(write: Write, cached: Path) -> None:
    data = Data(train=[Source(path=write("pairs.jsonl", text_rows(2)))], max_length=3)
    with pytest.raises(UserError, match="no usable row is left"):
        prepare(data, tokenizer(), seed=1)
    assert list(cached.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    data: Data, tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = mixture.tokenize_all

    def meanwhile(*args: Any) -> Any:
        with (tmp_path / "second.jsonl").open("a") as opened:
            opened.write(json.dumps({**text_rows(1, "C{}")[0], "rating": 4}) + "\n")
        return kept(*args)

    monkeypatch.setattr(mixture, "tokenize_all", meanwhile)
    assert isinstance(prepare(data, tokenizer(), seed=1), Prepared)
    assert list(cached.iterdir()) == []


@pytest.mark.parametrize("trouble", ["another was faster", "no space"])
def test_data_are_prepared_where_they_cannot_be_kept(
    data: Data, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    replace, wanted = os.replace, load_split(data, tokenizer(), seed=1)

    def fail(source: Any, target: Any) -> None:
        if trouble == "no space":
            raise OSError(28, "No space left on device")
        Path(target).mkdir()
        (Path(target) / "facts.json").touch()
        replace(source, target)  # a folder with something in it

    monkeypatch.setattr(os, "replace", fail)
    prepared = prepare(data, tokenizer(), seed=1)
    assert not any(cached.glob(".*")) and prepared == wanted


def test_a_cache_that_is_no_folder_is_done_without(data: Data, tmp_path: Path, tokenized: list[int]) -> None:
    (tmp_path / "cache").touch()
    assert prepare(data, tokenizer(), seed=1) == load_split(data, tokenizer(), seed=1)


def test_old_entries_go_and_readers_keep_what_they_read(
    write: Write, cached: Path, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(number: int) -> Prepared:
        data = Data(train=[Source(path=write(f"{number}.jsonl", text_rows(40, f"{number} {{}}")))])
        return prepare(data, tokenizer(), seed=1)

    first = prepared(0)
    [entry] = cached.iterdir()
    monkeypatch.setattr(prepared_cache, "LIMIT", 2.5 * sum(file.stat().st_size for file in entry.iterdir()))
    os.utime(entry, (1, 1))
    prepared(1)
    prepared(0)  # used, and so the newest
    [other] = [path for path in cached.iterdir() if path != entry]
    os.utime(other, (2, 2))
    (cached / ".left.4194305.tmp").mkdir()
    prepared(2)
    assert entry in cached.iterdir() and other not in cached.iterdir() and len(list(cached.iterdir())) == 2
    shutil.rmtree(entry)
    assert len(first.train) == 40 and len(list(first.train.trees)) == 40
