"""How many variants an audit asks, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mnemoscope.config.model import Frozen


class AuditConfig(Frozen):
    """Sizes of an audit, and the form of what it asks."""

    seed: int = Field(0, ge=0, description="draws the variants of templates and tasks")
    variants: int = Field(8, ge=1, le=1000, description="of each item, of templates and tasks; a file has its own")
    answers: Literal["number", "choice", "short"] | None = Field(
        None, description="how answers are found; default: numbers of templates, else the first phrase"
    )
    form: str = Field("{prompt}", description="what is asked, with {prompt} in it")
    tokens: int = Field(256, ge=1, le=4096, description="of a reply, at most; of a short one 16")
    batch_size: int = Field(16, ge=1, description="prompts per pass, at most")
    accused: float = Field(0.01, gt=0, lt=0.5, description="share of items without contamination that may be accused")
