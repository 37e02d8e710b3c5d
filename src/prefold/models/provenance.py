"""Origin of the base model and of data sets, and the licence on the base's own card: what a model card needs and the
run folder would not contain otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from prefold.models.fetch import PACKAGES, fetch
from prefold.recipe import Data, Model

LICENCE_FIELDS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def provenance(model: Model, data: Data) -> dict[str, Any]:
    """`{"base": {"hub_id", "revision", "license", ...}, "data_sets": Hub ids}`; None or no key for what is unknown."""
    data_sets = [source.path for source in data.train if _on_hub(source.path)]
    return {"base": _base(model), "data_sets": list(dict.fromkeys(data_sets))}


def _base(model: Model) -> dict[str, Any]:
    if model.name.startswith("pypi:"):
        package = PACKAGES[model.name.removeprefix("pypi:").replace(" ", "")]
        return {"hub_id": package.hub_id, "revision": None, "license": package.licence.lower()}
    try:
        known = metadata_load(fetch(model.name, model.revision) / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # there is no card, or none that can be read
        known = {}
    licence = {name: known[name] for name in LICENCE_FIELDS if isinstance(known.get(name), str)}
    return {"hub_id": model.name if _on_hub(model.name) else None, "revision": model.revision, **licence}


def _on_hub(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()
