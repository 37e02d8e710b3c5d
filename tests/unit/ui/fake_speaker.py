"""Stands for `prefold.ui.speaker` where no model is wanted: it says the words it is told, one after the other."""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from typing import Any


def write(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def lines() -> Any:
    """Lines of the standard input as they come, None where none is there yet."""
    rest = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            if not (read := os.read(0, 65536)):
                sys.exit()
            *whole, rest = (rest + read).split(b"\n")
            yield from map(json.loads, whole)
        else:
            yield None


def fits(run: str, which: str) -> bool:
    """Where there is memory for one model, whoever has it writes its name in a file and locks it until its process
    ends."""
    if not os.path.exists(f"{run}/small"):
        return True
    try:
        fcntl.flock(loaded := os.open(f"{run}/small", os.O_WRONLY | os.O_APPEND), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(loaded, f"{which}\n".encode())
    except OSError:
        return False
    return True


def main(run: str, which: str) -> None:
    if which == "before" and os.path.exists(f"{run}/cannot"):
        return write(error="out of memory: the model does not fit")
    if not fits(run, which):
        return write(error="needs more memory", too_large=True)
    write(ready=True)
    given = lines()
    for request in given:
        if request is None or "stop" in request:
            continue
        number, said = request["number"], request["messages"][-1]["content"]
        if said == "die":
            os._exit(9)
        if said == "fail":
            write(number=number, error="the prompt is too long")
            continue
        words = ["word"] * 10**6 if said == "go on" else f"{which} {request['attempt']}: {said}".split()
        text = ""
        for word in words:
            write(number=number, text=f"{word} ")
            text += f"{word} "
            if said == "go on":
                time.sleep(0.02)
                if (next(given) or {}).get("stop") == number:
                    break
        stopped = said == "go on"
        write(number=number, answer=text.strip(), finished=not stopped, stopped=stopped)


main(*sys.argv[1:])
