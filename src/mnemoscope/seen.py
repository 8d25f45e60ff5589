"""64-bit hashes of texts seen so far, to drop duplicates in a stream."""

from __future__ import annotations

import hashlib

import numpy as np

FRESH = 2**15  # hashes held in a set before they are merged into the sorted array


class Seen:
    """A set of texts in eight bytes each; among a million, two share a hash with probability 3e-8."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._fresh: set[int] = set()

    def add(self, *parts: str) -> bool:
        """Add a text, given in parts, and return whether it is new."""
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(f"{len(part)}:{part}".encode())
        number = int.from_bytes(digest.digest())
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        if number in self._fresh or (place < len(self._sorted) and int(self._sorted[place]) == number):
            return False
        self._fresh.add(number)
        if len(self._fresh) >= FRESH:
            self._settle()
        return True

    def update(self, other: Seen) -> None:
        """Add all texts of another set."""
        other._settle()
        self._settle()
        self._sorted = np.union1d(self._sorted, other._sorted)

    def __len__(self) -> int:
        """Number of different texts."""
        return len(self._sorted) + len(self._fresh)

    def _settle(self) -> None:
        fresh = np.sort(np.fromiter(self._fresh, np.uint64, len(self._fresh)))
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, fresh), fresh)
        self._fresh.clear()
