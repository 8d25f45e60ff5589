"""Context-aware decoding against the question as it is asked bare, which nobody has who serves: an oracle."""

from __future__ import annotations

from mnemoscope.interventions.contract import Contrast
from mnemoscope.interventions.methods.cad import SETTINGS, joined

ORACLE = True
CONTRAST: Contrast = "bare"
__all__ = ["CONTRAST", "ORACLE", "SETTINGS", "joined"]
