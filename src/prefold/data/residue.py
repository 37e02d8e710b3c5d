"""What other formats and wrong decoding leave in texts: markers of templates, placeholders of media, escapes.

A marker that only templates write counts anywhere. One that ordinary text may contain (`### Response:`, `&lt;`) counts
together with its counterpart, at the end of a prompt, or if the whole text is written like that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")


@dataclass(frozen=True)
class _Hit:
    """A marker in a text; `all_markers` are those of the record, without white space."""

    match: re.Match[str]
    in_prompt: bool
    in_last_turn: bool
    all_markers: frozenset[str]


_ASKED_BY = {
    "###Response:": {"###Instruction:"},
    "###Assistant:": {"###Human:", "###User:"},
    "ASSISTANT:": {"USER:"},
    "Assistant:": {"Human:"},
}


def _is_turn(hit: _Hit) -> bool:
    marker = _bare(hit.match[0])
    if marker in _ASKED_BY:
        ends_prompt = hit.in_last_turn and not hit.match.string[hit.match.end() :].strip()
        return ends_prompt or bool(_ASKED_BY[marker] & hit.all_markers)
    return any(marker in asking and answering in hit.all_markers for answering, asking in _ASKED_BY.items())


def _is_placeholder(hit: _Hit) -> bool:
    """Whether a marker is at the start or end of a line of the prompt, and not an HTML element with a closing tag."""
    text, marker = hit.match.string, hit.match[0]
    before, after = text[: hit.match.start()].rpartition("\n")[2], text[hit.match.end() :].partition("\n")[0]
    return hit.in_prompt and not (before.strip() and after.strip()) and f"</{marker[1:]}" not in text


@lru_cache(16)
def _is_escaped(text: str) -> bool:
    """Whether a text is escaped for HTML throughout, and does not just mention an entity."""
    entities = _ENTITY.findall(text)
    plain = _ENTITY.sub("", text)
    return not re.search("[<>&]|``", plain) and (len(entities) > 1 or bool(re.search(rf"\w{_ENTITY.pattern}\w", text)))


@lru_cache(16)
def _has_written_newlines(text: str) -> bool:
    """Whether a text of one line has several line ends written as two characters, not counting quotes and code."""
    unquoted = re.sub(r"`[^`]*`|\"[^\"]*\"|'[^']*'", "", text)
    return "\n" not in text.strip() and len(re.findall(r"(?<=[\w.,:;!?)\]*n])\\n(?![a-z])", unquoted)) > 1


_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|#0?39|#x27);")
# Kind of finding, pattern, and whether a match counts. Patterns that begin with a literal character are fast.
_RULES: tuple[tuple[str, str, Callable[[_Hit], bool]], ...] = (
    (
        "template_residue",
        r"<\|[A-Za-z0-9_]{2,24}\|>|<\uff5c[^\uff5c\n]{2,24}\uff5c>|<\|turn>|<turn\|>|</?(?:start|end)_of_turn>"
        r"|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|\[gMASK\]"
        r"|Below is an instruction that describes a task|A chat between a curious (?:user|human)|\n\nHuman:",
        lambda hit: True,
    ),
    ("template_residue", "</s>", lambda hit: "<s>" not in hit.match.string),
    ("template_residue", r"### ?(?:Instruction|Response):(?=[ \t]*(?:\n|\Z))", _is_turn),
    ("template_residue", r"### ?(?:Human|Assistant|User):|\n\nAssistant:|USER: |ASSISTANT:", _is_turn),
    ("media_placeholder", "<(?:image|video|audio)>", _is_placeholder),
    ("escaped_text", _ENTITY.pattern, lambda hit: _is_escaped(hit.match.string)),
    ("escaped_text", r"\\n", lambda hit: _has_written_newlines(hit.match.string)),
    (
        "wrong_decoding",
        "\u00e2\u20ac[\u2122\u0153\u009d\u201c\u201d\u02dc\u00a6\u00a2]|\u00e2\u0080[\u0090-\u00bf]"
        "|\u00c3[\u00a1-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00ef\u00bf\u00bd|\u00f0\u0178",
        lambda hit: True,
    ),
)
_MARKERS = re.compile("|".join(pattern for _, pattern, _ in _RULES))


def residue_of(prompt: Sequence[str], answers: Sequence[str]) -> dict[str, list[str]]:
    """The markers in the texts of a record, by kind of finding."""
    texts = [*((text, True) for text in prompt), *((text, False) for text in answers)]
    matches = [(match, in_prompt) for text, in_prompt in texts for match in _MARKERS.finditer(text)]
    if not matches:
        return {}
    beginnings = {"Human:" for text, _ in texts if text.lstrip().startswith("Human:")}
    all_markers = frozenset({_bare(match[0]) for match, _ in matches} | beginnings)
    seen: dict[str, list[str]] = {}
    for match, in_prompt in matches:
        hit = _Hit(match, in_prompt, in_prompt and match.string is prompt[-1], all_markers)
        kind, _, counts = next(rule for rule in _RULES if re.fullmatch(rule[1], match[0]))
        if counts(hit) and (marker := match[0].strip()) not in seen.setdefault(kind, []):
            seen[kind].append(marker)
    return {kind: markers for kind, markers in seen.items() if markers}


def _bare(marker: str) -> str:
    return "".join(marker.split())
