"""Context-aware decoding against the question as it is asked bare, which nobody has who serves: an oracle."""

from __future__ import annotations

from mnemoscope.interventions.contract import Contrast
from mnemoscope.interventions.methods.cad import SETTINGS, joined

ABOUT = "context-aware decoding against the bare question, an oracle"
ORACLE = True
CONTRAST: Contrast = "bare"
__all__ = ["ABOUT", "CONTRAST", "ORACLE", "SETTINGS", "joined"]
