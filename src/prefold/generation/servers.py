"""vLLM servers: completions of token ids, by the model that they serve, or by it with an adapter loaded into them.

Each request has all settings, since a server has defaults of its own, but no seed: on a CPU, one crashes vLLM's engine.
Replies are compared with the requests; what they do not tell is checked by `generation/agreement.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefold.errors import UserError
from prefold.generation.engine import end_tokens
from prefold.generation.http import Connection, Gone, Missing, Passing, Refused, in_parallel
from prefold.generation.samplers import Answers, LocalModel, as_answers
from prefold.generation.sampling import Completion, Sampling
from prefold.recipe import Generation
from prefold.terminal import Advance

T = TypeVar("T")

KEY = "VLLM_API_KEY"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds before each retry: a server may be gone for two minutes."""
START = "start it as docs/servers.md says"
_PROBED = "The 3 naïve cats' sum is 1,204.50 €:\n\n\tdef f(x):  return x\n"
"""A text that tokenizers split differently."""


def may_pass(status: int) -> bool:
    """Whether a status is temporary. vLLM gives 500 for an adapter that it cannot load, or if its engine is dead."""
    return status in (408, 429, 502, 503, 504)


@dataclass
class Server:
    """`in_flight`: requests that it has not answered yet."""

    url: str
    timeout: float
    concurrency: int
    in_flight: int = field(default=0, repr=False)

    @cached_property
    def connection(self) -> Connection:
        return Connection(self.url.rstrip("/"), KEY, self.timeout, may_pass, self.concurrency)

    @cached_property
    def base(self) -> tuple[str, int]:
        """The name of the model that it serves without an adapter, and the most tokens of a prompt with its
        completion."""

        def read(reply: Any, shown: str) -> tuple[str, int]:
            try:
                card = next(card for card in reply["data"] if not card.get("parent"))
                return str(card["id"]), int(card["max_model_len"])
            except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
                raise self.error(f"does not list the model that it serves: {shown}", START) from None

        return self._exchange("/models", None, read)

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError: the server splits a text into other tokens."""
        ids = tokenizer(_PROBED, add_special_tokens=False, verbose=False)["input_ids"]
        root = self.connection.url.removesuffix("/v1")
        body = {"model": self.base[0], "prompt": _PROBED, "add_special_tokens": False}

        def read(reply: Any, shown: str) -> Any:
            return reply.get("tokens") if isinstance(reply, dict) else None

        if self.connection.exchange(f"{root}/tokenize", body, WAITS, read) != ids:
            what = f"has another tokenizer than the run: it serves `{self.base[0]}`"
            raise self.error(what, "have it serve the model of the recipe, with its tokenizer")

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter into the server, from a folder that the server reads."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        try:
            self._exchange("/load_lora_adapter", body, lambda reply, shown: None)
        except Gone:
            raise
        except UserError as error:
            advice = "it must reach that folder by this path, and be started with `--enable-lora`, a `--max-lora-rank` "
            advice += "that is no smaller than `lora.r`, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            raise self.error(f"does not take the adapter in {folder}: {error.what}", advice) from None

    def unload(self, name: str) -> None:
        self.connection.exchange(
            f"{self.connection.url}/unload_lora_adapter", {"lora_name": name}, (), lambda reply, shown: None
        )

    def complete(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        ends: Sequence[int],
        name: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Completion]:
        """`num_answers` completions of a prompt by the model or adapter of that name; `logprobs` are those that the
        server gives."""
        body = {
            "model": name,
            "prompt": list(prompt),
            "n": sampling.num_answers,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(ends),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }

        def read(reply: Any, shown: str) -> list[Completion]:
            if isinstance(reply, str):
                raise Passing(f"its reply is not JSON: {shown}")
            try:
                if reply["model"] != name:
                    raise self.error(f"answers as `{reply['model']}` where `{name}` was asked for", START)
                choices = sorted(reply["choices"], key=lambda choice: choice["index"])
                if [choice["index"] for choice in choices] != list(range(sampling.num_answers)):
                    what = f"ignores `n`: {len(choices)} completions where {sampling.num_answers} were asked for"
                    raise self.error(what, START)
                return [self._completion(choice, prompt, sampling, ends, tokenizer) for choice in choices]
            except (LookupError, TypeError, AttributeError):
                what = f"its reply holds no completions with token ids and log-probs: {shown}"
                raise self.error(what, "it must be vLLM 0.11 or later") from None

        try:
            return self._exchange("/completions", body, read)
        except Missing as error:
            what = f"no longer has the adapter that it was given: it was restarted, or has dropped it ({error.what})"
            raise self.error(what, "see that it stays up, and go on with `prefold run`") from None

    def _completion(
        self,
        choice: dict[str, Any],
        prompt: Sequence[int],
        sampling: Sampling,
        ends: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Completion:
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        read, reason, most = choice["prompt_token_ids"], choice["finish_reason"], sampling.max_new_tokens
        if reason not in ("stop", "length"):
            raise Passing(f"a completion was broken off ({reason})")
        finished = bool(ids) and ids[-1] in ends
        numbers = [value for value in logprobs if isinstance(value, int | float) and math.isfinite(value)]
        ends_early = not finished and reason == "stop"
        wrong = {
            f"truncates prompts, or reads others: {len(read)} tokens of {len(prompt)}": list(read) != list(prompt),
            f"gives {len(numbers)} log-probs for {len(ids)} tokens": not len(numbers) == len(logprobs) == len(ids),
            "gives an empty completion": not ids,
            f"ignores `max_tokens`: {len(ids)} tokens where {most} are allowed": len(ids) > most,
            f"ends a completion with a token that is no end token of this run ({ids[-1:]})": ends_early,
            f"cuts a completion off after {len(ids)} tokens of {most}": not finished and len(ids) < most,
            "ignores `stop_token_ids`: a completion goes on after an end token": not {*ids[:-1]}.isdisjoint(ends),
        }
        if what := next((what for what, is_so in wrong.items() if is_so), None):
            raise self.error(what, START)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        return Completion(tuple(ids), text, finished, tuple(map(float, logprobs)))

    def _exchange(self, path: str, body: Any, read: Callable[[Any, str], T]) -> T:
        advice = "the run goes on from its last checkpoint once the server is back, or without it in `generation.urls`"
        return self.connection.exchange(self.connection.url + path, body, WAITS, read, advice)

    def error(self, what: str, advice: str = "") -> UserError:
        return UserError(what, where=self.url, advice=advice)


class Servers:
    """Several servers of one model.

    Raises:
        UserError: one of them cannot be reached, or has another tokenizer.
    """

    def __init__(self, section: Generation, tokenizer: PreTrainedTokenizerBase):
        self.all = [Server(url, section.timeout, section.concurrency) for url in section.urls]
        self._tokenizer, self._lock = tokenizer, Lock()
        for server in self.all:
            server.require_tokenizer(tokenizer)

    def require_length(self, longest: int) -> None:
        """Raises UserError: one of them does not take so many tokens, of a prompt with its completion."""
        for server in self.all:
            if (most := server.base[1]) < longest:
                what = f"takes {most:,} tokens at most, and the longest prompt with its completion has {longest:,}"
                raise server.error(what, f"start it with `--max-model-len {longest}`")

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter into all of them."""
        for _ in in_parallel(lambda server: server.load(name, folder), self.all, len(self.all)):
            pass

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Sequence[int],
        name: str | None,
        only: Server | None = None,
        advance: Advance = lambda **changes: None,
    ) -> list[tuple[Server, list[Completion]]]:
        """For each prompt its completions, and the server that sampled them: the one with the fewest requests in
        flight.

        Args:
            name: of an adapter; None: the model without any.
            only: the server to use.
            advance: called for each prompt that is done.
        """
        complete = partial(self.complete, sampling=sampling, ends=ends, name=name, only=only)
        done = {}
        for index, answer in in_parallel(lambda index: complete(prompts[index]), range(len(prompts)), self.concurrency):
            done[index] = answer
            advance(advance=1)
        return [done[index] for index in range(len(prompts))]

    @property
    def concurrency(self) -> int:
        return sum(server.concurrency for server in self.all)

    def complete(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        ends: Sequence[int],
        name: str | None = None,
        only: Server | None = None,
    ) -> tuple[Server, list[Completion]]:
        """`sample` for one prompt."""
        with self._lock:
            server = only or min(self.all, key=lambda server: server.in_flight)
            server.in_flight += 1
        try:
            return server, server.complete(prompt, sampling, ends, name or server.base[0], self._tokenizer)
        finally:
            with self._lock:
                server.in_flight -= 1


class ServedModel(LocalModel):
    """The model that servers serve without an adapter, as a sampler: its local files say how prompts are tokenised."""

    def __init__(self, name: str, sampling: Sampling, section: Generation):
        super().__init__(name, sampling)
        self._settings = section

    @property
    def identity(self) -> Any:
        return "vllm", *super().identity

    def _answered(
        self, rendered: Mapping[int, list[int]], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[int, Answers]]:
        servers, settings = Servers(self._settings, tokenizer), None
        with suppress(OSError):
            settings = GenerationConfig.from_pretrained(self._files)
        ends = end_tokens(settings, tokenizer)

        def answers(index: int) -> Answers:
            try:
                return as_answers(servers.complete(rendered[index], self._sampling, ends)[1])
            except Refused as refused:
                return refused

        yield from in_parallel(answers, list(rendered), servers.concurrency)
