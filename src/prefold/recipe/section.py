"""What all sections of a recipe have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def changed(self, *names: str) -> list[str]:
        """Those of these fields that are not at their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
