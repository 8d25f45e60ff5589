"""Recited or solved: what a checkpoint does with the items of a benchmark, and with fresh variants of them."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.auditing.items import Item, Variant
    from mnemoscope.auditing.named import named_items
    from mnemoscope.auditing.run import audit

__getattr__, __all__ = handed_on(__name__, __file__)
