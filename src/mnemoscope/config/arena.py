"""How many prompts an arena asks, and how long its methods may fit."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mnemoscope.config.model import Frozen


class ArenaConfig(Frozen):
    """Sizes of an arena; the same for all methods."""

    seed: int = Field(0, ge=0, description="draws every list, every control and every first weight")
    threads: int = Field(1, ge=1, le=4096, description="threads of all passes; results depend on it in the last bits")
    conflicts: int = Field(156, ge=6, description="test conflicts, at most")
    kept: int = Field(48, ge=1, description="test prompts that agree with memory, and as many bare questions, at most")
    varied: int = Field(12, ge=0, description="test conflicts of each list of changed prompts; 0: none of these lists")
    long: int = Field(
        0, ge=0, le=10**6, description="tokens of other text amid which texts stand; 0: none of these lists"
    )
    tune_conflicts: int = Field(40, ge=6, description="tune conflicts, at most")
    tune_kept: int = Field(16, ge=1, description="tune prompts of either other kind, at most")
    fit_conflicts: int = Field(200, ge=6, description="fit conflicts, at most")
    rephrasings: int = Field(3, ge=1, description="other phrasings of each fit and tune conflict, to find pairs")
    fit_kept: int = Field(48, ge=1, description="fit prompts of either other kind, at most")
    pairs: int = Field(160, ge=2, description="pairs of the fit split, at most")
    steps: int = Field(20, ge=1, description="of whatever is learned by gradients")
    batch: int = Field(16, ge=1, description="prompts of each of these steps")
    errors: float = Field(1.0, ge=0, description="standard errors within which settings on tune are equally good")
    controls: int = Field(2, ge=0, description="draws of the control of equal norm")
    refits: int = Field(1, ge=0, le=4, description="of what is trained, on answers of other items: its control")
    fits: int = Field(3, ge=1, description="of what is trained, or as good as the best on tune within a tenth")
    written: int = Field(156, ge=0, description="test conflicts whose answers are generated, for exact match; 0: none")
    tokens: int = Field(12, ge=1, description="that are generated behind each")
    cuts: int = Field(48, ge=0, description="places in neutral text, and generated answers, that are measured; 0: none")
    following: int = Field(16, ge=2, description="tokens behind each of these places")
    batch_size: int = Field(32, ge=1, description="prompts per pass, at most")

    @model_validator(mode="after")
    def _check_long(self) -> Self:
        if self.long and not self.varied:
            raise ValueError("varied: 0, and long texts are amid these prompts; allowed is 1 or more")
        return self
