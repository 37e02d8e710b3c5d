"""A conversation in the terminal, streamed; with `--compare`, each turn answered by the base model as well."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prefold.data.preference import Message
from prefold.generation.answers import open_model
from prefold.generation.engine import answer
from prefold.generation.sampling import Sampling
from prefold.recipe import Chat


class Speaker:
    """One model in the conversation, with its own memory of it."""

    def __init__(self, label: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None):
        self.label, self.model, self.tokenizer = label, model, tokenizer
        self.opening = [Message(role="system", content=system)] if system else []
        self.messages = list(self.opening)

    def reply(self, text: str, sampling: Sampling) -> None:
        """Answer on stdout as the tokens come."""
        self.messages.append(Message(role="user", content=text))
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        [[reply]] = answer(self.model, self.tokenizer, [self.messages], sampling, streamer=streamer)
        self.messages.append(Message(role="assistant", content=reply))


def chat_loop(name: str, compare: bool, settings: Chat) -> None:
    console, sampling = Console(highlight=False), Sampling.of(settings)
    speakers = [Speaker("before", *open_model(name, base=True), settings.system)] if compare else []
    speakers.append(Speaker("after" if compare else "model", *open_model(name), settings.system))
    console.print("An empty line or Ctrl-D ends; /new starts over.", style="dim")
    while text := _line():
        for speaker in speakers:
            if text == "/new":
                speaker.messages = list(speaker.opening)
                continue
            console.print(Text(f"{speaker.label}: ", style="bold cyan"), end="")
            speaker.reply(text, sampling)


def _line() -> str:
    try:
        return input("you: ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
