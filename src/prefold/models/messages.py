"""Messages of transformers: kept out of the terminal, or turned into errors that the user can correct."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import logging

from prefold.errors import UserError, first_line

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for a folder that is no valid model: each kind of file has a reader of its own."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice out of the terminal; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(what: str, where: str, raised: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """For reading a part of a model by transformers, quietly. Raises UserError: `what`, and why."""
    try:
        with quiet():
            yield
    except raised as error:
        if "trust_remote_code" in str(error):
            what = f"{what}: it needs Python code of its own, which prefold does not run"
            raise UserError(what, where=where, expected="an architecture that transformers knows") from None
        raise UserError(f"{what}: {first_line(error)}", where=where) from None
