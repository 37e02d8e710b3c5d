"""Findings: what is wrong or odd with the data, by row; and counts of its tokens.

A finding tells a person what was found, in how many rows, in which, and what to do. Only one of severity `error` stops
a run. Nothing is changed here: rows were dropped or cut before, and are only counted here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from jinja2.exceptions import TemplateError

from prefold.data.duplicates import Match
from prefold.data.preference import Preference, Problem, Record, RowId, Unpaired, texts_of
from prefold.data.residue import CONTROL, residue_of
from prefold.errors import counted
from prefold.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefold.data.examples import Examples

Severity = Literal["error", "warning", "note"]
ROWS_SHOWN = 200
FEW_HELD_OUT = 50
_BIASED_SHARE = 0.65
_OPENING_TOKENS = 3
_SHORT_PROMPT = 15
"""Characters up to which an answer may begin with its prompt by chance."""
_OPENING_DIFFERENCE = 0.2
_SHORT_SYSTEM = 8
"""Characters up to which a question may begin with its system text by chance."""
_MARKER = re.compile("`([^`]+)`")


@dataclass(frozen=True)
class Finding:
    """`rows` are the first `ROWS_SHOWN` of the `count` rows concerned; empty if it is about the whole set."""

    kind: str
    severity: Severity
    count: int
    rows: tuple[RowId, ...]
    message: str
    advice: str


@dataclass(frozen=True)
class SourceCount:
    """What became of the rows of the source named `path`: `rows_used` became `examples`, `rows_filtered` were left out
    by `where`, `rows_not_drawn` by `weight` or `count`. The rest of `rows_in` are problems, counted in the findings."""

    path: str
    shape: str
    rows_in: int
    rows_used: int
    rows_filtered: int = 0
    rows_not_drawn: int = 0
    unused: tuple[str, ...] = ()
    """Columns that are not used."""
    examples: int = 0


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a set of trees. `packed` counts each prompt once, `plain` once per completion."""

    trees: int
    prompt: int
    completions: int
    packed: int
    plain: int
    longest: int
    """The most tokens of a prompt and a completion together, which `max_length` bounds."""

    def as_json(self) -> dict[str, Any]:
        """With the share of the plain tokens that are saved, because completions share their prompt."""
        return {**asdict(self), "shared_share": round(1 - self.packed / self.plain, 4) if self.plain else 0.0}


@dataclass(frozen=True)
class DataReport:
    sources: tuple[SourceCount, ...]
    findings: tuple[Finding, ...]
    train: TokenCounts
    held_out: TokenCounts
    contamination: tuple[Match, ...] = ()
    """The rows left out because they contain text of a benchmark, with the words in common."""

    def as_json(self) -> dict[str, Any]:
        return {
            "sources": [asdict(source) | {"unused": list(source.unused)} for source in self.sources],
            "findings": [asdict(finding) | {"rows": list(map(asdict, finding.rows))} for finding in self.findings],
            "tokens": {"train": self.train.as_json(), "held_out": self.held_out.as_json()},
            "contamination": [asdict(match) for match in self.contamination],
        }


_SEEN = ("template_residue", "media_placeholder", "escaped_text", "wrong_decoding")
"""Kinds whose problems name the markers that were seen, each in backticks."""
_DETAILED = (
    *("struck", "flipped", "unread_field", "unread_column", "text_dropped", "header_trained", "empty_thought"),
    *("prompt_not_prefix", "template_refused"),
)
"""Kinds whose finding shows the most frequent messages of its problems."""
# Kind (severity) and what follows the number of rows in the message; below them the advice.
_TABLE = """
broken_row (warning) left out: cannot be read
    write one JSON object per row
where_failed (warning) left out: `where` cannot be evaluated for them
    it compares values of two types; mend the rows, or the condition
missing_field (warning) left out: a field is missing
    add the field or remove the rows
null_field (warning) left out: a field is null
    fill it in or remove the rows
empty_text (warning) left out: a text is empty
    fill it in or remove the rows
not_text (warning) left out: a field is not text
    write the value as a string
bad_message (warning) left out: messages that make no pair
    messages are {role, content}; a prompt ends before the assistant answers
identical (warning) left out: chosen and rejected are the same
    remove the rows
template_refused (warning) left out: the model's chat template refuses them
    the template may know no system message, or want strict turns
prompts_differ (warning) left out: chosen and rejected answer different prompts
    a pair compares answers to one prompt; mend the rows or leave them
tie (note) left out: ties, which prefer neither answer
    nothing to do: a tie teaches nothing
voted_again (note) left out: further votes, which count in the row of the first
    nothing to do: the majority of the votes on two answers makes one pair
voters_differ (note): people differ on which answer is better; the majority decides
    read these answers; `where: len(voters) > 2` keeps those of three or more
withdrawn (note) left out: votes undone or replaced, and the lines that undo them
    nothing to do: the last vote of a voter on two answers counts
small_margin (note) left out: no two ratings far enough apart
    this is what `min_margin` asks for
bad_label (warning) left out: a label says nothing that is understood
    votes are 1 or 2, labels true or false
struck (note) left out: struck by `data.decisions`
    this is what was decided, row by row
flipped (note) whose preference was turned round by `data.decisions`
    this is what was decided, row by row
repeated (note) left out: they repeat earlier ones
    this is what `data.duplicates` asks for
contaminated (warning) left out: text of `data.decontaminate` in them
    `contamination` in data.json has the words in common; cite the share
overlong (warning) left out: longer than `data.max_length`
    raise `data.max_length`, or set `data.overlong: truncate_prompt`
prompt_truncated (warning) lost the beginning of the prompt to fit `data.max_length`
    raise `data.max_length` to keep prompts whole
prompt_not_prefix (warning): the prompt's tokens do not all begin the conversation
    only those in common are the prompt; `model.chat_template_kwargs` may help
media (warning) left out: images, sound or video, which are not trained on
    use rows of text alone
unread_field (warning) with fields that the chat template does not read
    the model never sees them; name them as the template does
unread_column (warning) with a known column that holds something else, so it is not used
    `prefold data` shows what it holds; `columns:` can name another
text_dropped (warning) with words that the chat template leaves out
    put thoughts into a field that it reads, or use a template that writes them
empty_thought (warning) with an empty thought before the answer, which the template writes
    it teaches not to think; see `model.chat_template_kwargs` (enable_thinking)
header_trained (warning): the answer's header is trained as part of the answer
    the template ignores `add_generation_prompt`: generation has no such header
no_end_token (warning): the chat template ends the answer without an end token
    the model will not learn to stop; use a template that ends turns
double_end_token (warning): an answer ends with two end tokens
    the model learns to go on behind the first; remove the one in the data
double_bos (warning): the prompt begins with two BOS tokens
    remove the one in the data, or the one in the chat template
template_residue (warning) with template markers in the text
    the model learns to write turns that nobody wrote; clean the text
media_placeholder (warning) with placeholders of media
    there is no image, video or sound to look at; remove the rows
escaped_text (note) with escapes in place of characters
    the model learns to write them; unescape the text
wrong_decoding (note) with text in a wrong encoding
    it was UTF-8 and was read as Latin-1; decode the file again
system_twice (warning): the prompt has its system text twice
    remove one; what the chat template writes by itself counts as well
control_character (note): control or replacement characters in the text
    the model learns to write them; look at how the text was decoded
prompt_in_answer (warning): an answer begins with the text of its prompt
    the model learns to repeat what it is asked; cut the prompt from the answers
flipped_rating (warning): the row rates rejected above chosen
    the label is likely flipped; check, or filter by `where`
tied_rating (note): the row rates chosen and rejected alike
    the order may be chance; filter by `where` to be sure
"""
_ABOUT_ROWS = {
    kind: (cast(Severity, severity), what, advice)
    for kind, severity, what, advice in re.findall(r"^(\w+) \((\w+)\)((?: |:).+)\n +(.+)$", _TABLE, re.MULTILINE)
}


def oddities_of(record: Record, template: str = "chat", by_template: tuple[str, str] = ("", "")) -> Iterator[Problem]:
    """What is odd about the texts and ratings of a record that is used.

    Args:
        template: with `none`, a prompt may contain the markers of any format.
        by_template: `system_texts_of` the tokenizer.
    """
    prompt, *answers = [[*chain.from_iterable(map(texts_of, part))] for part in (record.prompt, *record.answers)]
    of_answers = [text for answer in answers for text in answer]
    if any(map(CONTROL.search, (*prompt, *of_answers))):
        yield Problem("control_character", "", record.origin)
    for kind, markers in residue_of(prompt if template == "chat" else [], of_answers).items():
        yield Problem(kind, " ".join(f"`{marker}`" for marker in markers), record.origin)
    if _has_system_twice(record, *by_template):
        yield Problem("system_twice", "", record.origin)
    asked = record.prompt[-1]["content"]
    if len(asked) > _SHORT_PROMPT and any(answer[0]["content"].startswith(asked) for answer in record.answers):
        yield Problem("prompt_in_answer", "", record.origin)
    if isinstance(record, Preference) and record.ratings:
        chosen, rejected = record.ratings
        if chosen <= rejected:
            yield Problem("flipped_rating" if chosen < rejected else "tied_rating", "", record.origin)


def _has_system_twice(record: Record, always: str, default: str) -> bool:
    systems = [message["content"].strip() for message in record.prompt if message["role"] == "system"]
    own = [text for text in systems if len(text) > _SHORT_SYSTEM]
    opening = next((message["content"] for message in record.prompt if message["role"] == "user"), "").lstrip()
    begins = own if systems else [default] if len(default) > _SHORT_SYSTEM else []
    return len(set(own)) < len(own) or any(text in always for text in own) or any(map(opening.startswith, begins))


def system_texts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes by itself before the text of a system message, and in place of one; empty if it
    writes nothing there, or takes no system message."""
    system, user = {"role": "system", "content": "\x01"}, {"role": "user", "content": "\x02"}
    try:
        given, silent = (
            str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in ([system, user], [user])
        )
    except (TemplateError, TypeError, ValueError):
        return "", ""
    before, mark, behind = given.partition("\x01")
    if not mark or len(silent) < len(before + behind) or not (silent.startswith(before) and silent.endswith(behind)):
        return before if mark else "", ""
    return before, silent[len(before) : len(silent) - len(behind)].strip()


def about_problems(problems: Sequence[Problem], data: Data) -> list[Finding]:
    """One finding per kind of problem."""
    rows: dict[str, list[RowId]] = {}
    details: dict[str, Counter[str]] = defaultdict(Counter)
    for problem in problems:
        rows.setdefault(problem.kind, []).append(problem.origin)
        seen = _MARKER.findall(problem.message) if problem.kind in _SEEN else [problem.message]
        details[problem.kind].update(seen)
    findings = []
    for kind, origins in rows.items():
        severity, what, advice = _ABOUT_ROWS[kind]
        if kind in _SEEN and details[kind]:
            marker, number = details[kind].most_common(1)[0]
            what += f": `{marker if len(marker) < 25 else marker[:20] + '...'}` in {number}"
        if kind == "overlong" and data.overlong == "truncate_prompt":
            advice = "raise `data.max_length`; these completions alone fill it"
        message = f"{counted(len(origins), 'row')}{what}"
        if kind in _DETAILED and (shown := [detail for detail, _ in details[kind].most_common(2) if detail]):
            message += f"; {'; '.join(shown)}{'; ...' if len(details[kind]) > 2 else ''}"
        findings.append(_of_rows(kind, severity, origins, message, advice))
    return findings


def left_out_in_part(problems: Sequence[Problem]) -> list[Finding]:
    """A finding about single answers or pairs of rankings that were left out of rows that are used."""
    if not problems:
        return []
    kinds = Counter(problem.kind for problem in problems).most_common()
    causes = ", ".join(f"{count} {kind}" for kind, count in kinds)
    what = "answer or pair" if len(problems) == 1 else "answers or pairs"
    message = f"{len(problems)} {what} left out of rows used otherwise: {causes}"
    severity: Severity = "note" if all(_ABOUT_ROWS[kind][0] == "note" for kind, _ in kinds) else "warning"
    origins = list(dict.fromkeys(problem.origin for problem in problems))
    advice = "`data.bad_rows: error` and `data.overlong: error` stop at the first and show it"
    return [Finding("left_out_in_part", severity, len(problems), tuple(origins[:ROWS_SHOWN]), message, advice)]


def duplicate(examples: Examples) -> Finding | None:
    seen: set[bytes] = set()
    repeated = []
    for index, key in enumerate(examples.record_keys):
        if key in seen:
            repeated.append(examples.origins[index])
        seen.add(key)
    message = f"{counted(len(repeated), 'row')} already there, word for word"
    advice = "they count twice; remove them or set `data.duplicates: drop_exact`"
    return _of_rows("duplicate", "note", repeated, message, advice) if repeated else None


def prompt_in_both_splits(train: Examples, held_out: Examples) -> Finding | None:
    trained = set(train.prompt_keys)
    rows = [held_out.origins[index] for index, key in enumerate(held_out.prompt_keys) if key in trained]
    message = f"{counted(len(rows), 'held-out row')} with a prompt that is also trained on"
    advice = "held-out numbers flatter; remove them from one side, or use `eval_fraction`"
    return _of_rows("prompt_in_both_splits", "warning", rows, message, advice) if rows else None


def small_held_out(held_out: Examples) -> Finding | None:
    if len(held_out) >= FEW_HELD_OUT:
        return None
    message = f"only {counted(len(held_out), 'held-out row')}: too few to tell progress from luck"
    if not held_out:
        message = "no held-out rows: nothing will show whether the model got better"
    advice = f"hold out {FEW_HELD_OUT} or more by `data.eval` or `data.eval_fraction`"
    return Finding("small_held_out", "warning", len(held_out), (), message, advice)


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What findings need to know of a pair: hashes of it and of the same pair with its sides swapped, and for each side
    the number of tokens and the first ones."""

    pair: int
    turned: int
    lengths: tuple[int, int]
    openings: tuple[tuple[int, ...], tuple[int, ...]]


def facts_of(examples: Examples) -> list[PairFacts]:
    """In one pass, because each tree is read from disk."""
    return [
        PairFacts(
            hash((tree.prompt, chosen, rejected)),
            hash((tree.prompt, rejected, chosen)),
            (len(chosen), len(rejected)),
            (chosen[:_OPENING_TOKENS], rejected[:_OPENING_TOKENS]),
        )
        for tree in examples.trees
        for chosen, rejected in [tree.completions]
    ]


def contradiction(facts: Sequence[PairFacts], origins: Sequence[RowId]) -> Finding | None:
    pairs = {fact.pair for fact in facts}
    rows = [origins[index] for index, fact in enumerate(facts) if fact.turned in pairs]
    message = f"{counted(len(rows), 'pair')} contradict each other: the same two answers, both ways round"
    advice = "their gradients cancel; keep the right one of each two"
    return _of_rows("contradiction", "warning", rows, message, advice) if rows else None


def length_bias(facts: Sequence[PairFacts]) -> Finding | None:
    """One side longer in more than 65 % of the pairs, and in more than chance would explain. Ties count one half."""
    chosen = sum(fact.lengths[0] > fact.lengths[1] for fact in facts)
    rejected = sum(fact.lengths[0] < fact.lengths[1] for fact in facts)
    # Two standard errors of a count of n pairs are sqrt(n): small sets lean to one side by chance.
    threshold = max((_BIASED_SHARE - 0.5) * len(facts), math.sqrt(len(facts)))
    if abs(chosen - rejected) / 2 <= threshold:
        return None
    shares = [_percent(count, len(facts)) for count in (chosen, rejected)]
    message = f"chosen is the longer one in {shares[0]} of the pairs, rejected in {shares[1]}"
    advice = "the model will learn length: fine where you teach it, else balance the pairs"
    return Finding("length_bias", "note", max(chosen, rejected), (), message, advice)


def telling_opening(facts: Sequence[PairFacts], tokenizer: PreTrainedTokenizerBase) -> Finding | None:
    """First tokens that begin one side's answers far more often than the other's: by 20 percentage points or more, and
    by three standard errors or more."""
    counts: tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]] = (Counter(), Counter())
    for fact in facts:
        for side in (0, 1):
            tokens = fact.openings[side]
            counts[side].update({tokens[: length + 1] for length in range(len(tokens))})
    openings = counts[0].keys() | counts[1].keys()
    if not openings:
        return None
    # Of openings that tell the sides apart equally well, take the longest.
    best = max(openings, key=lambda tokens: (abs(counts[0][tokens] - counts[1][tokens]), len(tokens), tokens))
    either = [counts[side][best] for side in (0, 1)]
    threshold = max(_OPENING_DIFFERENCE * len(facts), 3 * math.sqrt(sum(either)))
    if abs(either[0] - either[1]) < threshold:
        return None
    shares = [_percent(count, len(facts)) for count in either]
    text = json.dumps(tokenizer.decode(list(best)), ensure_ascii=False)
    message = f"{text} begins {shares[0]} of the chosen and {shares[1]} of the rejected answers"
    advice = "the model learns it first: fine where you teach it, else cut it away"
    return Finding("telling_opening", "warning", max(either), (), message, advice)


def about_sets(train: Examples, held_out: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """The findings about a whole set."""
    findings = [duplicate(train), duplicate(held_out), prompt_in_both_splits(train, held_out), small_held_out(held_out)]
    if isinstance(train.records[0], Unpaired):
        findings.append(one_label([isinstance(record, Unpaired) and record.label for record in train.records]))
    if isinstance(train.records[0], Preference):
        facts = facts_of(train)
        findings += [contradiction(facts, train.origins), length_bias(facts), telling_opening(facts, tokenizer)]
    return [finding for finding in findings if finding is not None]


def one_label(labels: Sequence[bool]) -> Finding | None:
    if len(set(labels)) > 1:
        return None
    message = f"all answers are {'' if labels[0] else 'un'}desirable"
    advice = "there is nothing to tell them from; add answers of the other label"
    return Finding("one_label", "error", len(labels), (), message, advice)


def template_unused() -> Finding:
    message = "the model has a chat template, but `data.template: none` trains on bare text"
    advice = "programs will use the template; train on it, unless raw prompts are meant"
    return Finding("template_unused", "warning", 0, (), message, advice)


def date_moves(written: str) -> Finding:
    message = f"the chat template writes today's date, so the tokens change daily: {written}"
    advice = "fix it: `model.chat_template_kwargs: {strftime_now: 2025-06-30}`"
    return Finding("date_moves", "warning", 0, (), message, advice)


def by_severity(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes, each in the order given."""
    order = get_args(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def count_tokens(examples: Examples) -> TokenCounts:
    lengths = examples.lengths
    prompt, packed = sum(prompt for prompt, *_ in lengths), sum(map(sum, lengths))
    plain = packed + sum(prompt * (max(len(completions), 1) - 1) for prompt, *completions in lengths)
    longest = max((prompt + max(completions, default=0) for prompt, *completions in lengths), default=0)
    return TokenCounts(len(lengths), prompt, packed - prompt, packed, plain, longest)


def fingerprint(examples: Examples) -> str:
    """SHA-256 of the trees in order, which tells whether two runs had the same data."""
    digest = hashlib.sha256()
    for tree in examples.trees:
        digest.update(tree.key.encode())
    return digest.hexdigest()


def _of_rows(kind: str, severity: Severity, rows: Sequence[RowId], message: str, advice: str) -> Finding:
    return Finding(kind, severity, len(rows), tuple(rows[:ROWS_SHOWN]), message, advice)


def _percent(count: int, number: int) -> str:
    return f"{100 * count / number:.0f} %"
