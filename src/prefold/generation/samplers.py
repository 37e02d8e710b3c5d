"""A model's answers to many prompts: the interface that local models and endpoints share, and local models.

Answers depend on the prompts, the settings and the seed, and not on what was answered before: interrupted work
continues with the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from prefold.data.chat import render, require_chat_template
from prefold.data.preference import Prompt, whole_prompt
from prefold.data.templates import REFUSALS
from prefold.device import choose_device
from prefold.errors import UserError
from prefold.generation.answers import model_named
from prefold.generation.engine import ROWS, LocalEngine
from prefold.generation.journal import Journal, key_of
from prefold.generation.opening import open_model
from prefold.generation.sampling import Completion, Sampling
from prefold.models.fetch import fetch
from prefold.models.gate import require_prompts
from prefold.models.load import require_model
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Model
from prefold.terminal import progress_bar
from prefold.trees.memory import free_memory

REFUSALS_IN_A_ROW = 10
"""Refused prompts in a row after which the model is given up."""


class Answer(NamedTuple):
    """A model's answer, perhaps empty; `finished`: not cut off by the length limit."""

    text: str
    finished: bool = True


Answers = list[Answer] | UserError
"""The answers to a prompt, or why it has none."""


class Sampler(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Any:
        """What the answers depend on besides the prompt: model and settings."""

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        """The answers to the prompts at the indices `wanted`, in any order."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of answers; None if the tokenizer is not known."""


def answers_of(sampler: Sampler, prompts: Sequence[Prompt], work: Journal) -> list[list[Answer] | None]:
    """A model's answers, from the journal or newly sampled; None for refused prompts.

    Raises:
        UserError: all prompts are refused, or many in a row.
    """
    keys = [key_of("answers", sampler.identity, index, whole_prompt(prompt)) for index, prompt in enumerate(prompts)]
    missing = [index for index, key in enumerate(keys) if key not in work]
    refusals: list[UserError] = []
    label = f"answers of {Path(sampler.name).name[:24]}"
    with progress_bar(label, len(prompts), len(prompts) - len(missing)) as advance:
        for index, answers in sampler.sample(prompts, missing) if missing else ():
            if isinstance(answers, UserError):
                refusals.append(answers)
                if len(refusals) == REFUSALS_IN_A_ROW:
                    raise answers
                continue
            refusals.clear()
            work.add(keys[index], answers)
            advance(advance=1)
    if refusals and not any(key in work for key in keys):
        raise refusals[-1]
    return [[Answer(*answer) for answer in work[key]] if key in work else None for key in keys]


class LocalModel:
    """A local model, loaded for the first answer and released after the last one. A model that cannot be used is
    refused at once. `section`: how to load it; by default, by its name."""

    def __init__(self, name: str, sampling: Sampling, section: Model | None = None):
        self.name, self._sampling, self._section = name, sampling, section or model_named(name)
        require_model(self._section)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self._section)

    @property
    def _files(self) -> Path:
        return fetch(self._section.name, self._section.revision)

    @property
    def identity(self) -> Any:
        section, files = self._section, files_of(self._files)
        files += files_of(Path(section.adapter).expanduser()) if section.adapter else []
        return self.name, files, asdict(self._sampling), section.chat_template_kwargs

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        tokenizer = tokenizer_of(self._section)
        require_chat_template(tokenizer)
        rendered: dict[int, list[int]] = {}
        for index in wanted:
            try:
                rendered[index] = render(prompts[index].prompt, tokenizer, given=prompts[index].template_kwargs)
            except REFUSALS as error:
                where = str(prompts[index].origin)
                yield index, UserError(f"the chat template refuses the prompt: {error}", where=where)
        yield from self._answered(rendered, tokenizer)

    def _answered(
        self, rendered: Mapping[int, list[int]], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[int, Answers]]:
        """The answers to prompts given as token ids, by index."""
        # Random numbers depend on a prompt's own index, so its answers are the same if others are answered already.
        indices, ids = list(rendered), list(rendered.values())
        new_tokens = self._sampling.max_new_tokens
        model = open_model(self._section, "`pairs`", tokens=ROWS.get(choose_device().type, 64) * new_tokens)
        require_prompts(model, tokenizer, ids, self._sampling.max_new_tokens)
        for done, completions in LocalEngine(model, tokenizer).stream(ids, self._sampling, indices):
            yield indices[done], as_answers(completions)
        del model
        free_memory()

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def as_answers(completions: Sequence[Completion]) -> Answers:
    return [Answer(completion.text.strip(), completion.finished) for completion in completions]


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model folder: other weights under its name are another model."""
    files = [(file.name, file.stat()) for kind in ("safetensors", "json", "jinja") for file in folder.glob(f"*.{kind}")]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
