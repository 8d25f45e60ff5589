"""Leave out the text: an oracle to memory wherever it can be found, and no rival, as nothing is left to follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.words import Quoted
from mnemoscope.runs.errors import InputError

ORACLE = True


@dataclass(frozen=True, kw_only=True, repr=False)
class Delete(Intervention):
    """Prompts without the text that they quote."""

    KIND: ClassVar[str] = "delete"
    everywhere = True  # another prompt has another prefix

    def prompt(self, quoted: Quoted) -> str:
        """The prompt without its text."""
        return quoted.before + quoted.behind


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """The one that there is; InputError where a prompt quotes no text that can be found."""
    if not all(quoted.text for quoted in bench.tune_conflicts.quoted):
        raise InputError("delete: a prompt quotes no text that can be told from its question")
    return [Delete(toward=toward, method="delete")]
