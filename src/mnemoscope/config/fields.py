"""What the parts of a configuration have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MethodName = Literal["nmd", "standardized-nmd", "gradient", "logistic", "whitened", "pca", "learned"]
SiteName = Literal["block", "attention", "mlp", "neuron"]


class Frozen(BaseModel):
    """Data that validate, do not change and know no other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def as_several(value: Any) -> Any:
    """One value where several are allowed."""
    return value if isinstance(value, list | tuple) else (value,)
