"""A model's answers to many prompts, by a model of this machine or one behind an endpoint.

What a prompt is answered with depends on the prompts, the settings and the seed, and not on what was answered before:
work that was stopped goes on with the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from prefold.data.chat import render, require_chat_template
from prefold.data.preference import Prompt
from prefold.errors import UserError
from prefold.generation.answers import open_model, run_recipe
from prefold.generation.endpoint import Answer, Endpoint, Refused, in_parallel
from prefold.generation.engine import LocalEngine
from prefold.generation.journal import Journal, key_of
from prefold.generation.sampling import Sampling
from prefold.models.fetch import fetch
from prefold.models.load import load_tokenizer
from prefold.terminal import progress_bar
from prefold.trees.memory import free_memory

Answers = list[Answer] | UserError
"""The answers to a prompt, or why it has none."""
REFUSALS_IN_A_ROW = 10
"""Prompts without an answer after which nothing more is expected."""


class Sampler(Protocol):
    @property
    def name(self) -> str: ...

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        """For each prompt what its answers depend on, as a key."""

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        """The answers to the prompts at the wanted places (and perhaps to others), in any order."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of answers; None where the tokenizer is not known."""


def answers_of(sampler: Sampler, prompts: Sequence[Prompt], work: Journal) -> list[list[Answer] | None]:
    """A model's answers, from the work file or anew; None where the prompt is refused.

    Raises:
        UserError: all prompts are refused, or many in a row.
    """
    keys = sampler.keys(prompts)
    missing = [place for place, key in enumerate(keys) if key not in work]
    refusals: list[UserError] = []
    label = f"answers of {Path(sampler.name).name[:24]}"
    with progress_bar(label, len(prompts), len(prompts) - len(missing)) as advance:
        for place, answers in sampler.sample(prompts, missing) if missing else ():
            if isinstance(answers, UserError):
                refusals.append(answers)
                if len(refusals) == REFUSALS_IN_A_ROW:
                    raise answers
                continue
            refusals.clear()
            if keys[place] not in work:
                work.add(keys[place], answers)
                advance(1, "")
    if refusals and not any(key in work for key in keys):
        raise refusals[-1]
    return [[Answer(*one) for one in work[key]] if key in work else None for key in keys]


class LocalModel:
    """A model that is loaded here, when the first answer is asked for, and released after the last one."""

    def __init__(self, name: str, sampling: Sampling):
        self.name, self._sampling = name, sampling

    @cached_property
    def _folder(self) -> Path:
        return Path(self.name).expanduser() / "merged" if run_recipe(self.name) else fetch(self.name)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder)

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        model = (self.name, files_of(self._folder), asdict(self._sampling))
        return [key_of("answers", model, place, prompt.prompt) for place, prompt in enumerate(prompts)]

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        model, tokenizer = open_model(self.name)
        require_chat_template(tokenizer)
        fit: dict[int, list[int]] = {}
        for place in wanted:
            ids = _ids_of(prompts[place], tokenizer)
            if isinstance(ids, UserError):
                yield place, ids
            else:
                fit[place] = ids
        # A prompt's own place, so that its answers stay the same where others have theirs already.
        places = list(fit)
        for index, completions in LocalEngine(model, tokenizer).stream(list(fit.values()), self._sampling, places):
            yield places[index], [Answer(one.text.strip(), one.finished) for one in completions]
        del model
        free_memory()

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _ids_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int] | UserError:
    """The prompt's tokens, or why it has none."""
    try:
        return render(prompt.prompt, tokenizer)
    except (TemplateError, TypeError) as error:
        where = f"{prompt.origin.source}, row {prompt.origin.row}"
        return UserError(f"the chat template refuses the prompt: {error}", where=where)


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an endpoint. One request for each answer: many servers give only one at a time."""

    endpoint: Endpoint
    sampling: Sampling
    concurrency: int

    @property
    def name(self) -> str:
        return self.endpoint.model

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        model = (self.endpoint.url, self.endpoint.model, asdict(self.sampling))
        return [key_of("answers", model, place, prompt.prompt) for place, prompt in enumerate(prompts)]

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        def answers(place: int) -> Answers:
            try:
                return [self._answer(prompts[place], place, number) for number in range(self.sampling.num_answers)]
            except Refused as refused:
                return refused

        return in_parallel(answers, wanted, self.concurrency)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        return None

    def _answer(self, prompt: Prompt, place: int, number: int) -> Answer:
        drawn = self.sampling
        # Few servers know the other fields, and some refuse those that they do not know.
        optional = {"top_p": (drawn.top_p, 1.0), "top_k": (drawn.top_k, 0), "min_p": (drawn.min_p, 0.0)}
        return self.endpoint.ask(
            prompt.prompt,
            max_tokens=drawn.max_new_tokens,
            temperature=drawn.temperature,
            seed=seed_of(drawn.seed, place, number),
            **{name: value for name, (value, default) in optional.items() if value != default},
        )


def seed_of(*parts: int) -> int:
    """A seed below 2^31 for a part of the work."""
    return int(key_of(*parts)[:8], 16) >> 1


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model folder: other weights under its name are another model."""
    found = [
        (file.name, file.stat()) for ending in ("safetensors", "json", "jinja") for file in folder.glob(f"*.{ending}")
    ]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
