"""A push that fails costs itself and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefold.errors import StageError
from prefold.training.pushes import Pushes


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StageError("me/model: the connection to the Hub broke\n  more"), "me/model: the connection to the Hub broke"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"), "OSError"),  # where the files are gathered
    ],
)
def test_a_push_that_fails_is_said(
    error: Exception, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(checkpoint: Path) -> None:
        raise error

    Pushes(fail).on_save(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4), None)
    said = " ".join(capfd.readouterr().err.split())
    assert said == f"checkpoint-4 was not pushed, and the run goes on: {reason}"
