"""A model with the interface of lm-evaluation-harness, on the tree engine.

Tokens, truncation and defaults are those of the harness's own model for transformers (`lm_eval.models.huggingface`,
0.4.13), so that scores are the same. What requests have in common is computed once: a question for all its answers,
few-shot examples for all questions that have the same ones. Each of several processes computes a share of the requests
and receives all responses. Left out: encoder-decoder models, and cutting the thinking from completions.
Data in: the harness's requests; data out: its responses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefold import ranks
from prefold.errors import UserError
from prefold.files import write_text
from prefold.generation.engine import LocalEngine, end_tokens
from prefold.generation.sampling import Sampling
from prefold.terminal import progress_bar
from prefold.trees.attention import evaluating, unwrapped
from prefold.trees.forest import Text
from prefold.trees.reader import Reader, choose_reader
from prefold.trees.reference import model_digest

VERSION = "1"
"""Part of the key of cached responses; to be raised when the numbers of this engine change."""
MAX_GEN_TOKS = 256
"""Most tokens of a completion if the task does not say."""
DEFAULTS = {"top_p": 1.0, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}
"""What transformers samples with if neither the task nor the model says."""


class TreeLM(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """
    Args:
        model: with or without adapters, whole or quantised.
        cache: folder in which responses are cached by weights and requests; None for no cache.
        label: what the progress bar says.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, cache: Path | None = None, label: str = "requests"
    ):
        super().__init__()
        if tokenizer.eos_token_id is None:
            what = "the tokenizer names no end-of-text token, which the harness asks with"
            raise UserError(what, where=str(tokenizer.name_or_path), expected="`eos_token` in tokenizer_config.json")
        self.tokenizer, self.label = tokenizer, label
        self._model, self._base, self._cache = model, unwrapped(model), cache
        self._identity = _identity(model, tokenizer) if cache is not None else ""
        self._device = self._base.device
        self._reader: Reader | None = None
        self._longest_checked = 0

    # ---- properties and tokens, as of the harness's own model for transformers ----

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return int(resolve_max_length(self._base.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **settings))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ends: Any = {"add_generation_prompt": add_generation_prompt}
        ends["continue_final_message"] = not add_generation_prompt
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))
        except jinja2.exceptions.TemplateError:  # some templates accept no system message
            without_system = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(without_system, tokenize=False, **ends))

    # ---- log-likelihoods ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = (self._context_and_answer(*request.args) for request in requests)
        return self._loglikelihood_tokens(("", *pair) for pair in pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Any] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            own = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [("", *make_disjoint_window(window)) for window in own]
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        return totals

    def _context_and_answer(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """An answer without a context follows the prefix token, which it may start with itself."""
        if context:
            return cast("tuple[list[int], list[int]]", self._encode_pair(context, answer))
        ids = self.tok_encode(answer, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if ids[:1] != [self.prefix_token_id] else (ids[:1], ids[1:])

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-prob in nats and whether it is the greedy answer, of each request's answer after its context."""
        known: dict[int, int] = {}
        texts = [self._text(context, answer, known) for _, context, answer in requests]
        answers = self._remembered("texts", [(text.tokens, text.scored) for text in texts], lambda: self._read(texts))
        return [(float(logprob), bool(greedy)) for logprob, greedy in answers]

    def _text(self, context: list[int], answer: list[int], known: dict[int, int]) -> Text:
        """Context and answer, cut at the start to what fits. `known` keeps one object for each id, since the tokenizer
        makes a new one every time."""
        if len(answer) > self.max_length:
            what = f"asks for an answer of {len(answer):,} tokens, and the model reads {self.max_length:,}"
            raise UserError(what, where=self.label, advice="leave out the task, or take a model that reads more")
        tokens = (known.setdefault(token, token) for token in (context + answer)[-(self.max_length + 1) :])
        return Text(tuple(tokens), len(answer))

    def _read(self, texts: Sequence[Text]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(texts)  # for answers without tokens
        indices = [index for index, text in enumerate(texts) if text.scored]
        scored = [texts[index] for index in indices]
        if not scored:
            return answers
        longest = max(len(text.tokens) for text in scored)
        with progress_bar(self.label, len(scored)) as advance, evaluating(self._model):
            if self._reader is None or longest > self._longest_checked:
                self._reader, self._longest_checked = choose_reader(self._model, scored), longest
            for row, likelihoods in self._reader.read(scored):
                for number, likelihood in zip(row, likelihoods, strict=True):
                    answers[indices[number]] = likelihood
                advance(advance=len(row))
        return answers

    # ---- completions ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts: dict[int, str] = {}
        for settings, indices in by_settings.items():
            contexts = [requests[index].args[0] for index in indices]
            texts.update(zip(indices, self._write(contexts, json.loads(settings), indices), strict=True))
        return [texts[index] for index in range(len(requests))]

    def _write(self, contexts: Sequence[str], settings: dict[str, Any], seeds: Sequence[int]) -> list[str]:
        """A completion of each context, cut before the first stop text."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        end = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        until = handle_stop_sequences(kwargs.pop("until"), eos=end)
        sampling = self._sampling(kwargs, until)
        longest = self.max_length - sampling.max_new_tokens
        if longest <= 0:
            what = f"asks for {sampling.max_new_tokens:,} new tokens, and the model has room for {self.max_length:,}"
            raise UserError(what, where=self.label, expected="generation_kwargs: {max_gen_toks: fewer}")
        prompts = [self._prompt(context, longest) for context in contexts]

        def write() -> list[str]:
            with progress_bar(self.label, len(prompts)) as advance:
                answers = LocalEngine(self._model, self.tokenizer).sample(prompts, sampling, seeds, advance)
            ids = [list(completion.token_ids) for [completion] in answers]
            texts = (str(self.tokenizer.decode(own, skip_special_tokens=True)) for own in ids)
            return [str(postprocess_generated_text(text, until, None)) for text in texts]

        drawn = [(prompt, seed if sampling.temperature else 0) for prompt, seed in zip(prompts, seeds, strict=True)]
        return list(self._remembered(f"completions {sampling!r} {until!r}", drawn, write))

    def _prompt(self, context: str, longest: int) -> list[int]:
        """The last `longest` tokens of a context."""
        has_bos = has_bos_prefix(context, getattr(self.tokenizer, "bos_token", None))
        ids = self.tokenizer.encode(context, **({"add_special_tokens": False} if has_bos else {}))
        return list(ids[-longest:]) or [self.prefix_token_id]

    def _sampling(self, kwargs: dict[str, Any], until: Sequence[str]) -> Sampling:
        """A task's generation settings; what it leaves open is the model's own, as in transformers' `generate`."""
        kwargs, own = dict(kwargs), self._base.generation_config
        given_temperature = kwargs.pop("temperature", None)
        sampled = bool(kwargs.pop("do_sample")) and given_temperature != 0
        temperature = float(given_temperature or 1.0) if sampled else 0.0
        given = {name: (kwargs.pop(name, None), getattr(own, name, None), DEFAULTS[name]) for name in DEFAULTS}
        chosen: Any = {name: next(value for value in values if value is not None) for name, values in given.items()}
        if not sampled:
            chosen = {"repetition_penalty": chosen["repetition_penalty"]}
        most = int(kwargs.pop("max_gen_toks"))
        if kwargs.pop("num_beams", 1) != 1 or kwargs:
            names = ", ".join(f"`{name}`" for name in kwargs) or "`num_beams`"
            what = f"has generation settings that are not known here: {names}"
            known = ("until", "max_gen_toks", "do_sample", "temperature", *DEFAULTS)
            raise UserError(what, where=self.label, expected=", ".join(known))
        ends = dict.fromkeys([*end_tokens(self._base.generation_config, self.tokenizer), self.eot_token_id])
        stop = tuple(text for text in until if text)
        return Sampling(most, 1, temperature, stop=stop, end_tokens=tuple(ends), **chosen)

    # ---- cache ----

    def _remembered(self, kind: str, requests: Sequence[Any], compute: Callable[[], list[Any]]) -> list[Any]:
        """What `compute` returns, cached for this model and these requests."""
        if self._cache is None:
            return compute()
        digest = hashlib.sha256()
        for part in (self._identity, kind, *map(repr, requests)):
            digest.update(f"{part}\n".encode())
        file = self._cache / f"{digest.hexdigest()[:32]}.json"
        text: str | None = ranks.from_first(lambda: file.read_text(encoding="utf-8") if file.is_file() else None)
        if text is None:
            text = json.dumps(compute())
            if ranks.is_first():
                write_text(file, text)
        return list(json.loads(text))


def _identity(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a model responds to a request."""

    def adapters(module: nn.Module) -> object:
        if not isinstance(module, BaseTunerLayer):
            return ""
        scaling = getattr(module, "scaling", None)
        return module.active_adapters, module.disable_adapters, module.merged_adapters, scaling

    base = unwrapped(model)
    digest = model_digest(model, model.state_dict().items(), adapters, f"{VERSION} {base.device.type} {base.dtype}")
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(str(base.generation_config).encode())
    return str(digest.hexdigest())
