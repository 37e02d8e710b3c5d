"""Completions of a step from servers: they get the weights, and it is checked that they sample with them.

At the start the log-probs that each server gives are compared with the policy's, for the base model and for an adapter
of random weights: their difference is the rounding of two engines. From then on, a server whose log-probs are further
off than a few times that is reported, with the figure and the step, before its completions are trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold import ranks
from prefold.errors import UserError
from prefold.files import new_folder, remove, sha256_of
from prefold.generation.agreement import (
    TOKENS,
    Drawn,
    Positions,
    difference,
    positions_of,
    some_of,
    why_not_as_told,
)
from prefold.generation.engine import end_tokens
from prefold.generation.sampling import Completion, Sampling
from prefold.terminal import Advance, say
from prefold.training.saved_state import save_weights
from prefold.trees.attention import unwrapped
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, holding

if TYPE_CHECKING:  # training itself calls no endpoint
    from prefold.generation.servers import Server, Servers

MEASURED_PROMPTS, MEASURED_LENGTH = 4, 32
"""Prompts of the comparison at the start, and tokens of each completion."""
MOST = 0.1
"""Largest mean difference of log-probs in nats that bfloat16 explains; more is another model."""
LEAST, LEEWAY = 1e-4, 5.0
"""Nats that rounding explains in any case, and the multiple of the difference at the start that it explains."""
MERGED = 0.005
"""Nats that rounding a merged model to 16 bits explains."""
PROBE = 0.5
"""Nats by which the adapter of random weights changes log-probs at least: far more than rounding."""

ADVICE = "see which model and adapter it serves, and with which settings; docs/servers.md says how to start it"

Weights = dict[str, Tensor]


class ServedCompletions:
    """Called with the number of a step and prompts, returns a group of completions for each, and metrics. All processes
    call it: the first one sends the requests, and comparing with a sharded policy takes all of them.

    Args:
        scorer: of the policy, a PEFT model.
        folder: where adapters are written for the servers.
        label: prefix of the adapters' names on the servers.
    """

    def __init__(
        self,
        servers: Servers,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        folder: Path,
        label: str,
    ):
        self.servers, self.scorer, self.sampling = servers, scorer, sampling
        self.folder, self.label = folder.resolve(), label
        self.model: Any = scorer.model
        self.ends = end_tokens(unwrapped(scorer.model).generation_config, tokenizer)
        self.allowed: dict[str, float] = {}
        self.step, self.name, self.furthest = -1, "", 0.0
        self.before: Weights = {}
        self.now: Weights = {}

    def __call__(
        self, step: int, prompts: Sequence[tuple[int, ...]]
    ) -> tuple[list[list[Completion]], dict[str, float]]:
        if not self.allowed:
            self._measure(prompts[:MEASURED_PROMPTS])
        if step != self.step:
            self._hand_over(f"step-{step + 1}")
            self.before, self.now, self.step, self.furthest = self.now, trained_weights(self.model), step, 0.0
        answered = self._answered(prompts, self.sampling, self.name)
        groups = [group for _, group in answered]
        for server in self.servers.all:
            own = [index for index, (by, _) in enumerate(answered) if by is server]
            proven = self._proven(server, [(prompts[index], groups[index]) for index in own]) if own else []
            for index, group in zip(own, proven, strict=True):
                groups[index] = group
        return groups, {"sampling/server_logp_difference": self.furthest}

    def __enter__(self) -> ServedCompletions:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Remove the adapters from the folder, and from the servers unless an error, of which one may be the cause."""
        if not ranks.is_first():
            return
        if error is None:
            take_back(self.servers, self.name)
        if self.name:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- weights ----

    def _hand_over(self, name: str) -> None:
        """Load the current weights into the servers."""
        folder, before = self.folder / name, self.name
        with new_folder(folder) if ranks.is_first() else nullcontext(folder) as aside:
            save_weights(self.model, aside)
        self.name = ranks.from_first(lambda: hand_over(self.servers, folder, self.label))
        if not ranks.is_first():
            return
        if before != self.name:
            take_back(self.servers, before)
        for other in self.folder.iterdir():
            if other.name != name:
                remove(other)

    def _answered(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, name: str | None, only: Server | None = None
    ) -> Sequence[tuple[Server, list[Completion]]]:
        def ask() -> list[tuple[int, list[Completion]]]:
            answered = self.servers.sample(prompts, sampling, self.ends, name, only)
            return [(self.servers.all.index(server), group) for server, group in answered]

        answered = [(self.servers.all[number], group) for number, group in ranks.from_first(ask)]
        require_known_tokens(answered, self.model)
        return answered

    # ---- proof ----

    def _measure(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Measure how far each server's log-probs are from the policy's with the same weights."""
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, MEASURED_LENGTH))
        figures: dict[str, float] = {}
        with self.model.disable_adapter():
            for server in self.servers.all:
                figures[server.url] = self._figure(server, prompts, sampling, None, "the base model")
        with holding(self.model, self._probe(prompts[0])):
            self._hand_over("probe")
            for server in self.servers.all:
                figure = self._figure(server, prompts, sampling, self.name, "an adapter of random weights")
                figures[server.url] = max(figure, figures[server.url])
        for url, figure in figures.items():
            self.allowed[url] = max(LEAST, LEEWAY * figure)
            allowed = f"more than {self.allowed[url]:.1e} stops the run"
            say(f"  {url}: log-probs differ by {figure:.1e} nats in the mean; {allowed}")

    def _figure(
        self, server: Server, prompts: Sequence[tuple[int, ...]], sampling: Sampling, name: str | None, weights: str
    ) -> float:
        answered = self._answered(prompts, sampling, name, server)
        drawn = [(prompt, group) for prompt, (_, group) in zip(prompts, answered, strict=True)]
        return self._compared(server, some_of(drawn, TOKENS), sampling, MOST, f"with {weights}")[1]

    def _proven(self, server: Server, drawn: Sequence[Drawn]) -> list[list[Completion]]:
        """The completions that a server has sampled, checked. If sampling truncates the distribution, their log-probs
        become those of the whole one."""
        sampling, when = self.sampling, f"step {self.step + 1}"
        some = list(drawn) if sampling.truncates else some_of(drawn, TOKENS)
        positions, figure = self._compared(server, some, sampling, self.allowed[server.url], when)
        self.furthest = max(self.furthest, figure)
        if not sampling.truncates:
            return [list(group) for _, group in drawn]
        whole = iter((positions.given + positions.kept).tolist())
        return [
            [replace(each, logprobs=tuple(next(whole) for _ in each.token_ids)) for each in group] for _, group in drawn
        ]

    def _compared(
        self, server: Server, drawn: Sequence[Drawn], sampling: Sampling, allowed: float, when: str
    ) -> tuple[Positions, float]:
        """The policy's log-probs of completions, and their mean difference from those that came with the completions.

        Raises:
            UserError: the difference is too large, with its cause; or the tokens are not drawn as they should be.
        """
        positions = positions_of(self.scorer, drawn, sampling)
        figure, why = difference(positions, sampling), why_not_as_told(positions, sampling)
        from_plain = float((positions.given - positions.plain).abs().mean())
        # If these are the unprocessed log-probs, their distance to the policy's is rounding.
        allowed = min(allowed, max(LEAST, LEEWAY * from_plain))
        if figure <= allowed and why is None:
            return positions, figure
        are_plain = from_plain <= allowed
        if why and (figure <= allowed or are_plain):
            raise server.error(f"{why} ({when})", ADVICE)
        what = f"its log-probs are {figure:.2g} nats off the policy's in the mean, rounding explains {allowed:.2g}"
        what = f"{what} ({when})"
        if are_plain:
            cause = "they are those of the model before `temperature`, `top_p` and the like"
            advice = "start it with `--logprobs-mode processed_logprobs`"
            raise server.error(f"{what}; {cause}: it ignores these settings, or its log-probs do", advice)
        suspects: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "the base model, without the adapter": self.model.disable_adapter,
            "the step before": lambda: holding(self.model, self.before),
        }
        for name, weights in suspects.items():
            with weights():
                if difference(positions_of(self.scorer, drawn, sampling), sampling) <= allowed:
                    raise server.error(f"{what}; they are those of {name}", ADVICE)
        cause = "it has other weights (another base model, adapter or precision)"
        raise server.error(f"{what}; {cause}, or reads or draws otherwise than it says", ADVICE)

    def _probe(self, prompt: tuple[int, ...]) -> Weights:
        """The trained weights with noise added to those that LoRA initialises with zeros, enough to be noticed."""
        tree, generator = TokenTree(prompt, (prompt,)), torch.Generator().manual_seed(0)
        weights = trained_weights(self.model)
        noise = {
            name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items() if "_B" in name
        }
        with torch.no_grad():
            before = self.scorer.score([tree]).tokens
            for power in range(-10, 10):
                probe = {name: weight + 2.0**power * noise.get(name, 0.0) for name, weight in weights.items()}
                with holding(self.model, probe):
                    if float((self.scorer.score([tree]).tokens - before).abs().mean()) >= PROBE:
                        break
        return probe


class ServedEngine:
    """Samples completions of a model as `LocalEngine` does, from servers.

    Args:
        model: the same model here, with its adapter merged; the servers' log-probs of some tokens must agree with it.
        adapter: of the model; None: the model is the base that they serve.
        folder: where the adapter is written for the servers.
        label: prefix of the adapter's name on the servers.
        rounding: by server, how far its log-probs were from those of the base; filled if there is no adapter.
    """

    def __init__(
        self,
        servers: Servers,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Path | None,
        folder: Path,
        label: str,
        rounding: dict[str, float],
    ):
        self.servers, self.model, self.adapter, self.rounding = servers, model, adapter, rounding
        self.folder, self.label = folder.resolve(), label
        self.ends = end_tokens(unwrapped(model).generation_config, tokenizer)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Advance = lambda **changes: None,
    ) -> list[list[Completion]]:
        """See `LocalEngine.sample`; servers draw with seeds of their own, so `numbers` change nothing.

        Raises:
            UserError: a server is gone, takes fewer tokens, has other weights, or does not sample as requested.
        """
        return ranks.from_first(lambda: self._sample([tuple(prompt) for prompt in prompts], settings, advance))

    def _sample(
        self, prompts: Sequence[tuple[int, ...]], settings: Sampling, advance: Advance
    ) -> list[list[Completion]]:
        if not prompts:
            return []
        self.servers.require_length(max(map(len, prompts)) + settings.max_new_tokens)
        with self._handed_over() as name:
            answered = self.servers.sample(prompts, settings, self.ends, name, advance=advance)
        require_known_tokens(answered, self.model)
        for server in self.servers.all:
            drawn = [(prompt, group) for prompt, (by, group) in zip(prompts, answered, strict=True) if by is server]
            if drawn:
                self._compare(server, some_of(drawn, TOKENS), settings)
        return [group for _, group in answered]

    def _compare(self, server: Server, drawn: Sequence[Drawn], settings: Sampling) -> None:
        positions = positions_of(Scorer(self.model, 0, None), drawn, settings)
        figure, why = difference(positions, settings), why_not_as_told(positions, settings)
        allowed, known = MOST, self.rounding.get(server.url)
        if self.adapter is None:
            self.rounding[server.url] = max(figure, known or 0.0)
        elif known is not None:
            allowed = max(MERGED, LEEWAY * known)
        if why or not figure <= allowed:
            off = f"its log-probs are {figure:.2g} nats off the model's in the mean, rounding explains {allowed:.2g}"
            raise server.error(why or off, ADVICE)

    @contextmanager
    def _handed_over(self) -> Iterator[str | None]:
        if self.adapter is None:
            yield None
            return
        name, folder = "", self.folder / "adapter"
        try:
            with new_folder(folder) as aside:
                shutil.copytree(self.adapter, aside, dirs_exist_ok=True)
            name = hand_over(self.servers, folder, self.label)
            yield name
        finally:
            take_back(self.servers, name)
            shutil.rmtree(self.folder, ignore_errors=True)


def hand_over(servers: Servers, folder: Path, label: str) -> str:
    """Load the adapter in a folder into servers; returns its name, which no other weights of any run have."""
    contents = f"{folder.parent} {sha256_of(folder / 'adapter_model.safetensors')}"
    name = f"{label}-{sha256(contents.encode()).hexdigest()[:16]}"
    servers.load(name, folder)
    return name


def take_back(servers: Servers, name: str) -> None:
    for server in servers.all if name else ():
        with suppress(UserError):
            server.unload(name)


def require_known_tokens(answered: Sequence[tuple[Server, list[Completion]]], model: nn.Module) -> None:
    """Raises UserError: a server draws tokens that the model has no embeddings for."""
    vocabulary = len(cast(Tensor, unwrapped(model).get_input_embeddings().weight))
    for server, group in answered:
        if max(token for completion in group for token in completion.token_ids) >= vocabulary:
            raise server.error(f"draws tokens that the model does not have, which has {vocabulary:,}", ADVICE)


def trained_weights(model: nn.Module) -> Weights:
    """A copy of the trained weights on the CPU, by name."""
    return {
        name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters() if weight.requires_grad
    }
