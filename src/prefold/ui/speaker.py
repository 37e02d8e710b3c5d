"""A model in a process of its own, which frees all memory when it ends: `python -m prefold.ui.speaker RUN WHICH`.

Input, one JSON object per line: `{"number", "messages", "settings", "attempt"}` asks for an answer, `{"stop": number}`
ends that answer. Output, likewise: `{"ready": true}` once the model is loaded, or `{"error", "too_large"}`, the latter
true if it needs more memory than is available; then, each with the answer's number, `{"text"}` as it is written, and at
its end `{"answer", "finished", "stopped"}` or `{"error"}`. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prefold.cli import explain
from prefold.errors import UserError
from prefold.generation.answers import model_named, run_recipe
from prefold.generation.chat import CHAT_TOKENS
from prefold.generation.engine import answer
from prefold.generation.opening import open_model
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import seed_of
from prefold.memory import TooLarge
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Chat, Model, make_section


class Stopped(Exception):
    """Abandons an answer that nobody waits for."""


class Lines:
    """Input and output of the process; requests are read in a thread."""

    def __init__(self, given: Iterable[str], out: Any):
        self.out, self.asked, self.stopped = out, SimpleQueue[dict[str, Any]](), -1
        Thread(target=self._read, args=(given,), daemon=True).start()

    def _read(self, given: Iterable[str]) -> None:
        for line in given:
            request = json.loads(line)
            if "stop" in request:
                self.stopped = max(self.stopped, request["stop"])
            else:
                self.asked.put(request)
        os._exit(0)

    def write(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")
        self.out.flush()


class Stream(TextStreamer):
    """Writes the words of an answer as they come; `text` is the answer so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lines: Lines, number: int):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.lines, self.number, self.text = lines, number, ""

    def put(self, value: Any) -> None:
        if self.lines.stopped >= self.number:
            raise Stopped
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self.lines.write(number=self.number, text=text)


def section_of(run: str, which: str) -> tuple[Model, Model]:
    """The settings of a model of a run (`before` or `after` training, or a checkpoint), and those that its tokenizer is
    loaded by. Raises UserError: it is no run folder, or its model gives no answers."""
    recipe = run_recipe(run)
    if recipe is None:
        raise UserError("not a run folder", where=run)
    if recipe.algorithm.kind.scores:
        raise UserError(f"a model of `method: {recipe.method}` gives scores and no answers", where=run)
    if which == "after":
        return (model_named(run),) * 2
    if which == "before":
        return recipe.model, recipe.model
    checkpoint = Path(run) / "checkpoints" / which
    if recipe.lora == "none":
        return recipe.model.whole(checkpoint), recipe.model
    return recipe.model.model_copy(update={"adapter": str(checkpoint)}), recipe.model


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: dict[str, Any], lines: Lines) -> None:
    settings = make_section(Chat, request["settings"])
    sampling = replace(Sampling.of(settings), seed=seed_of(settings.seed, request["attempt"]))
    stream = Stream(tokenizer, lines, request["number"])
    try:
        [[completion]] = answer(model, tokenizer, [request["messages"]], sampling, streamer=stream)
        ended = {"answer": completion.text, "finished": completion.finished, "stopped": False}
    except Stopped:
        ended = {"answer": stream.text.strip(), "finished": False, "stopped": True}
    lines.write(number=request["number"], **ended)


def main(run: str, which: str) -> None:
    # Libraries print to stdout too.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = Lines(sys.stdin, out)
    try:
        section, of_tokenizer = section_of(run, which)
        model, tokenizer = open_model(section, "`talk`", tokens=CHAT_TOKENS), tokenizer_of(of_tokenizer)
    except Exception as error:
        return lines.write(error=explain(error)[0], too_large=isinstance(error, TooLarge))
    lines.write(ready=True)
    while True:
        request = lines.asked.get()
        try:
            reply(model, tokenizer, request, lines)
        except Exception as error:
            lines.write(number=request["number"], error=explain(error)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
