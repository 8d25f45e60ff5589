"""64-bit hashes of texts seen so far, to drop duplicates in a stream."""

from __future__ import annotations

import hashlib


class Seen:
    """A set of texts by their hashes; among a million, two share a hash with probability 3e-8."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def add(self, *parts: str) -> bool:
        """Add a text, given in parts, and return whether it is new."""
        text, before = "".join(f"{len(part)}:{part}" for part in parts), len(self)
        self._hashes.add(hashlib.blake2b(text.encode(), digest_size=8).digest())
        return len(self) > before

    def update(self, other: Seen) -> None:
        """Add all texts of another set."""
        self._hashes |= other._hashes

    def __len__(self) -> int:
        """Number of different texts."""
        return len(self._hashes)
