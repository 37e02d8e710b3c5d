"""JSON over HTTP: requests that are retried after temporary failures, with one error message in the end.

The key of a server is read from an environment variable alone, and is in no message and no file. Temporary failures are
a missing connection, a timeout, some statuses, and half a reply. Retries wait longer each time, or as long as the
server asks for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import httpx2

from prefold.errors import UserError

LONGEST_WAIT = 120.0
"""Seconds to wait at most before a retry, also if a server asks for more."""
CONNECTING = 20.0
"""Seconds that connecting may take."""
_ABOUT_THE_REQUEST = (400, 413, 422)
_SHOWN_CHARACTERS = 200
_LONG = 20_000
"""Characters of a reply that are processed to show some of them."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Refused(UserError):
    """The server rejects this request, but may accept others: a prompt that is too long, or filtered."""


class Missing(UserError):
    """HTTP 404."""


class Gone(UserError):
    """The server cannot be reached, or gives no answer, in any try."""


class Passing(Exception):
    """A temporary failure; `wait`: the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0):
        self.wait = wait
        super().__init__(what)


@dataclass(frozen=True)
class Connection:
    """A connection to the server at an address.

    Args:
        url: the base, e.g. `http://localhost:8000/v1`.
        key_name: the environment variable that may hold a key.
        timeout: seconds that a reply may take.
        passing: whether a status stands for a temporary failure.
        most: connections at a time.

    Raises:
        UserError: the address is invalid, or the key cannot be sent.
    """

    url: str
    key_name: str
    timeout: float
    passing: Callable[[int], bool]
    most: int = 100

    def __post_init__(self) -> None:
        try:
            parsed = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.userinfo:
            raise UserError("the address of an endpoint holds a password", advice=f"put the key in {self.key_name}")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError("is not the address of an endpoint", where=self.url, expected="http://localhost:8000/v1")
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"{self.key_name} holds characters that no key has", advice="look for a stray space or new line"
            )

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_name, "").strip()

    @cached_property
    def _client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits, timeout = httpx2.Limits(max_connections=self.most), httpx2.Timeout(self.timeout, connect=CONNECTING)
        return httpx2.Client(headers=headers, timeout=timeout, limits=limits)

    def exchange(
        self, address: str, body: Any, waits: Sequence[float], read: Callable[[Any, str], Result], advice: str = ""
    ) -> Result:
        """Send a request until its reply can be read.

        Args:
            body: is sent as JSON; None: a GET.
            waits: seconds before each retry.
            read: called with the reply, as an object (or text that is no JSON) and as messages show it; may raise
                `Passing`.
            advice: what to do if the server cannot be reached.

        Raises:
            UserError: the server cannot be reached, or refuses.
        """
        for number in range(len(waits) + 1):
            try:
                return self._once(address, body, read)
            except Passing as passing:
                if number == len(waits):
                    raise Gone(f"{passing} ({number + 1} tries)", where=self.url, advice=advice) from None
                time.sleep(min(max(waits[number], passing.wait), LONGEST_WAIT))
        raise AssertionError

    def _once(self, address: str, body: Any, read: Callable[[Any, str], Result]) -> Result:
        try:
            response = self._client.request("GET" if body is None else "POST", address, json=body)
        except httpx2.ConnectTimeout:
            raise Passing(f"cannot be reached: no connection within {CONNECTING:g} s") from None
        except httpx2.TimeoutException:
            raise Passing(f"no answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise Passing(f"cannot be reached: {self.safe(error) or type(error).__name__}") from None
        status = response.status_code
        if self.passing(status):
            raise Passing(f"HTTP {status}: {self._complaint(response)}", _retry_after(response))
        if not response.is_success:
            kind = Refused if status in _ABOUT_THE_REQUEST else Missing if status == 404 else UserError
            raise kind(f"HTTP {status}: {self._complaint(response)}", where=self.url, advice=self._advice(status))
        shown = self.safe(response.text[:_LONG])
        try:
            reply = response.json()
        except ValueError:
            reply = response.text
        return read(reply, shown)

    def _advice(self, status: int) -> str:
        return {
            401: f"set the environment variable {self.key_name}",
            403: f"set the environment variable {self.key_name} to a key that may use this model",
            404: "check the address (most end in /v1) and the name of the model",
        }.get(status, "")

    def _complaint(self, response: httpx2.Response) -> str:
        """The server's error message."""
        try:
            reply = response.json()
            error = reply.get("error") or reply.get("detail") or reply.get("message")
            text = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            text = response.text
        return self.safe(text or response.reason_phrase)

    def safe(self, text: object) -> str:
        """One short line without the key."""
        shown = str(text).replace(self._key, "***") if self._key else str(text)
        line = " ".join(shown.split())
        return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."


def _retry_after(response: httpx2.Response) -> float:
    """Seconds by the header Retry-After, which has a number or a date; 0 without it."""
    wait = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return float(wait)
    with suppress(ValueError, TypeError):
        return (parsedate_to_datetime(wait) - datetime.now(UTC)).total_seconds()
    return 0.0


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Items with the function's results, as they come.

    The threads are daemons: neither an error nor Ctrl-C waits for calls in progress.
    """
    waiting = deque(items)
    results: SimpleQueue[tuple[Item, Result] | BaseException] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                results.put((item, function(item)))
            except BaseException as error:
                results.put(error)
                return

    for _ in range(min(workers, len(items))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        waiting.clear()
