"""A conversation in the terminal, streamed; with `--compare`, each turn answered by the base model as well."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prefold.data.preference import Message
from prefold.device import choose_device
from prefold.errors import StageError, UserError, did_you_mean
from prefold.files import write_text
from prefold.generation.answers import model_named, run_recipe
from prefold.generation.engine import answer
from prefold.generation.opening import how_to_keep, open_model
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import seed_of
from prefold.models.tokenizer import tokenizer_of
from prefold.plan.machine import Machine
from prefold.recipe import Chat, make_section
from prefold.recipe.text import parse_yaml
from prefold.terminal import say
from prefold.trees.memory import free_memory

CHAT_TOKENS = 4096
"""Tokens of a conversation that the memory estimate assumes."""

COMMANDS = {
    "/help": ("", "lists these commands"),
    "/retry": ("", "answers your last message anew, with other random numbers"),
    "/new": ("", "starts over; settings and system message stay"),
    "/system": ("TEXT", "changes the system message; without TEXT there is none"),
    "/set": ("FIELD=VALUE", "changes a setting, as in `/set temperature=0.5`; without FIELD shows them"),
    "/save": ("FILE", "adds the conversation to a .jsonl file"),
    "/exit": ("", "ends, as do an empty line, Ctrl-D, and Ctrl-C here; Ctrl-C during an answer stops the answer"),
}
OF_TWO = "adds a pair to a .jsonl file: what `after` said as chosen, or, with `before` behind FILE, what that said"


class WrappedStream(TextStreamer):
    """Writes tokens as they come; on a terminal, lines end between words. `text` is what was written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, column: int = 0):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.column, self.text, self.spaces = console, column, "", ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            self._write(part)
        if stream_end:
            self.console.file.write("\n")
        self.console.file.flush()

    def _write(self, part: str) -> None:
        """Write a line break or a word; spaces wait for the next word."""
        width = self.console.width if self.console.is_terminal else sys.maxsize
        if part.isspace() and part != "\n":
            self.spaces += part
            return
        if part == "\n":
            self.spaces, self.column = "", 0
        else:
            if self.column and self.column + cell_len(self.spaces + part) > width:
                self.console.file.write("\n")
                self.spaces, self.column = "", 0
            part, self.spaces = self.spaces + part, ""
            # A word wider than the terminal continues in its next line.
            self.column = (self.column + cell_len(part) - 1) % width + 1
        self.console.file.write(part)


class Speaker:
    """One model in the conversation, with its own messages; `before` are those before the last turn. It is loaded when
    it first replies, and kept if it `stays`: there is memory for all."""

    def __init__(
        self, label: str, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, stays: bool = True
    ):
        self.label, self.load, self.tokenizer, self.stays = label, load, tokenizer, stays
        self.model: PreTrainedModel | None = None
        self.messages: list[Message] = []
        self.before: list[Message] = []

    def reply(self, text: str, opening: list[Message], sampling: Sampling, console: Console) -> None:
        """Answer on stdout as the tokens come. Ctrl-C ends the answer, and what was written of it is kept."""
        self.before = self.messages
        asked = [*self.messages, Message(role="user", content=text)]
        self.model = self.model or self.load()
        console.print(Text(f"{self.label}: ", style="bold cyan"), end="")
        stream = WrappedStream(self.tokenizer, console, column=len(self.label) + 2)
        try:
            [[completion]] = answer(self.model, self.tokenizer, [[*opening, *asked]], sampling, streamer=stream)
            reply = completion.text
            if not completion.finished:
                limit = sampling.max_new_tokens
                more = f"`/set max_new_tokens={2 * limit}` allows more"
                console.print(f"(cut off after {limit} tokens; {more})", style="dim", markup=False)
        except KeyboardInterrupt:
            stream.end()
            console.print("(stopped)", style="dim")
            reply = stream.text.strip()
        if reply:
            self.messages = [*asked, Message(role="assistant", content=reply)]
        if not self.stays:
            self.model = None
            free_memory()


class Conversation:
    """A conversation with all speakers: its settings and its commands."""

    def __init__(self, speakers: list[Speaker], settings: Chat, console: Console):
        self.speakers, self.settings, self.console = speakers, settings, console
        self.last, self.answered = "", 0
        self.commands = {
            "/help": self.show_help,
            "/retry": self.retry,
            "/new": self.start_over,
            "/system": self.set_system,
            "/set": self.set_field,
            "/save": self.save,
        }

    def take(self, line: str) -> None:
        """Execute a line of the user, a command or a message. Raises UserError, StageError: that is not possible."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.ask(line)
        elif word in self.commands:
            self.commands[word](rest.strip())
        else:
            advice = did_you_mean(word, COMMANDS) or "`/help` lists the commands"
            raise UserError(f"there is no command `{word}`", advice=advice)

    @property
    def opening(self) -> list[Message]:
        return [Message(role="system", content=self.settings.system)] if self.settings.system else []

    def ask(self, text: str) -> None:
        self.last, self.answered = text, self.answered + 1
        # Other random numbers for each answer, the same for both models.
        sampling = replace(Sampling.of(self.settings), seed=seed_of(self.settings.seed, self.answered))
        for speaker in self.speakers:
            speaker.reply(text, self.opening, sampling, self.console)

    def show_help(self, rest: str) -> None:
        for name, (argument, meaning) in COMMANDS.items():
            meaning = OF_TWO if name == "/save" and len(self.speakers) > 1 else meaning
            self.say(f"{f'{name} {argument}':18} {meaning}")

    def retry(self, rest: str) -> None:
        if not self.last:
            raise UserError("there is nothing to answer yet")
        for speaker in self.speakers:
            speaker.messages = speaker.before
        self.ask(self.last)

    def start_over(self, rest: str) -> None:
        self.last = ""
        for speaker in self.speakers:
            speaker.messages = speaker.before = []

    def set_system(self, rest: str) -> None:
        self.settings = self.settings.model_copy(update={"system": rest or None})
        self.say(f"system: {rest or 'none'}")

    def set_field(self, rest: str) -> None:
        name, _, value = (part.strip() for part in rest.partition("="))
        values = self.settings.model_dump()
        if rest:
            self.settings = make_section(Chat, {**values, name: parse_yaml(value, f"/set {rest}")}, "/set")
            values = {name: self.settings.model_dump()[name]}
        for name, value in values.items():
            self.say(f"{name}: {'none' if value is None else value}")

    def save(self, rest: str) -> None:
        file, _, chosen = rest.rpartition(" ")
        file, chosen = (file, chosen) if chosen in ("before", "after") else (rest, "after")
        path = Path(file.strip()).expanduser()
        if path.suffix != ".jsonl":
            raise UserError("a conversation is added to a .jsonl file", advice="`/save FILE.jsonl`")
        if not all(speaker.messages for speaker in self.speakers):
            raise UserError("there is no answer to save yet")
        said = {speaker.label: [*self.opening, *speaker.messages] for speaker in self.speakers}
        row: dict[str, list[Message]] = {"messages": next(iter(said.values()))}
        if len(said) > 1:
            row = {"chosen": said.pop(chosen), "rejected": said.popitem()[1]}
            if row["chosen"] == row["rejected"]:
                raise UserError("both models said the same, which is no pair", advice="`/retry` draws other answers")
            if row["chosen"][:-1] != row["rejected"][:-1]:
                what = "the models said different things before, so their answers are not to one prompt"
                raise UserError(what, advice="`/new`, and `/save` after the first answers")
        try:
            written = path.read_text(encoding="utf-8") if path.exists() else ""
            write_text(path, f"{written}{json.dumps(row, ensure_ascii=False)}\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be written: {error}", where=str(path)) from None
        self.say(f"saved: {path}")

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


def chat_loop(name: str, compare: bool, settings: Chat) -> None:
    console = Console(highlight=False)
    speakers = _speakers(name, compare)
    conversation = Conversation(speakers, settings, console)
    conversation.say("An empty line or Ctrl-D ends; /help lists the commands.")
    while (line := _line()) and line != "/exit":
        try:
            conversation.take(line)
        except (UserError, StageError) as error:
            console.print(Text(str(error), style="red"))


def _speakers(name: str, compare: bool) -> list[Speaker]:
    """The model; with `compare` also the one that the run started from, which replies first. Raises UserError: one of
    them cannot be used, or is too large for the available memory."""
    after = model_named(name)
    sections, stays = {"model": after}, True
    if compare:
        recipe = run_recipe(name)
        if recipe is None:
            raise UserError("`--compare` needs to know the base", where=name, expected="a run folder")
        sections, machine = {"before": recipe.model, "after": after}, Machine.here(choose_device().type)
        needed = [how_to_keep(section, machine, tokens=CHAT_TOKENS).needed for section in sections.values()]
        stays = sum(needed) - machine.process <= machine.memory
        if not stays:
            say("  both models do not fit into memory at once: each is loaded for its turn")
    speakers = [
        Speaker(label, partial(open_model, section, "`chat`", tokens=CHAT_TOKENS), tokenizer_of(section), stays)
        for label, section in sections.items()
    ]
    for speaker in speakers if stays else ():
        speaker.model = speaker.load()
    return speakers


def _line() -> str:
    try:
        return input("you: ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
