"""A list of prompts, prepared once for all interventions.

Shapes: N prompts, T tokens of a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Asking, Batch, Scores, as_batch, cache_prefixes, encode, score
from mnemoscope.interventions import Contrast, Quoted
from mnemoscope.tasks import Example

# Texts that speak of nothing that is asked.
ELSEWHERE = (
    "The reading room opens at nine and closes at six. Visitors leave their bags at the desk and may borrow a pencil. "
    "In winter the heating is turned on an hour earlier.",
    "The garden behind the building is open to everybody. There are benches under the trees, and a small fountain that "
    "is switched off at night. Dogs must be kept on a lead.",
)


def bare_of(example: Example) -> Example | None:
    """An example's question without the text that its prompt quotes; None where it quotes none that can be seen."""
    quoted = Quoted.guess(example.prompt)
    return replace(example, prompt=quoted.behind) if quoted.text and quoted.behind.strip() else None


class Prompts:
    """A list of examples, prepared once for all interventions, with cached prefixes where they fit into memory.

    ``bares``: the same questions without their texts, or None where the task does not know them.
    """

    def __init__(self, asking: Asking, examples: Sequence[Example], bares: Sequence[Example | None]) -> None:
        self.asking, self.examples, self.bares = asking, list(examples), list(bares)
        self._contrasted: dict[Contrast, list[Batch]] = {}

    @classmethod
    def free(cls, asking: Asking, prompts: Sequence[str], bares: Sequence[str] | None = None) -> Prompts:
        """Prompts to be answered freely; ``bares``: their bare questions, default: those that ``bare_of`` finds."""
        examples = [Example("asked", prompt, "novel", "asked", answer=" ") for prompt in prompts]
        if bares is None:
            return cls(asking, examples, [bare_of(example) for example in examples])
        return cls(asking, examples, [replace(e, prompt=bare) for e, bare in zip(examples, bares, strict=True)])

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def groups(self) -> list[str]:
        """The group of each example."""
        return [example.group for example in self.examples]

    @cached_property
    def quoted(self) -> list[Quoted]:
        """The parts of each prompt."""
        pairs = zip(self.examples, self.bares, strict=True)
        return [Quoted.of(example.prompt, bare.prompt if bare else None) for example, bare in pairs]

    def text_columns(self, chosen_N: Sequence[int] | np.ndarray, mask_NT: Tensor) -> Tensor:
        """Which tokens of a left-padded batch of some prompts are of the text that is quoted, if found; bool (N, T)."""
        text_NT, how = torch.zeros_like(mask_NT, dtype=torch.bool), {"return_offsets_mapping": True}
        for row, n in enumerate(chosen_N):
            quoted, formatted = self.quoted[n], self.asking.text(self.examples[n].prompt)
            text, behind = quoted.text.strip(), max(0, formatted.find(quoted.before)) + len(quoted.before)
            if text and (begin := formatted.find(text, behind)) >= 0:
                special = not self.asking.prompting.chat
                places = self.asking.tokenizer(formatted, add_special_tokens=special, **how).offset_mapping
                is_text = torch.tensor([start < begin + len(text) and begin < end for start, end in places])
                first = int(mask_NT[row].argmax())
                text_NT[row, first : first + len(is_text)] = is_text.to(text_NT.device)
        return text_NT

    @cached_property
    def batches(self) -> list[Batch]:
        """The prompts with their options."""
        from mnemoscope.interventions.sources import with_prefixes  # with statistics, which free answers do not need

        return with_prefixes(self.asking, self.examples)

    def contrast(self, which: Contrast) -> list[Example]:
        """What each prompt is contrasted with; a prompt without it stands for itself."""
        found = []
        for example, bare, quoted in zip(self.examples, self.bares, self.quoted, strict=True):
            cut = replace(example, prompt=quoted.before + quoted.behind)
            found.append(cut if which == "cut" and quoted.text else bare or example)
        return found

    def contrast_batches(self, which: Contrast) -> list[Batch]:
        """What prompts are contrasted with, row by row those of ``batches``."""
        if which not in self._contrasted:
            encoded = encode(self.asking, self.contrast(which))
            batches = [as_batch(self.asking, encoded, batch.examples_N) for batch in self.batches]
            cache_prefixes(self.asking, batches)
            self._contrasted[which] = batches
        return self._contrasted[which]

    @cached_property
    def unsteered(self) -> Scores:
        """Labels without any intervention."""
        return score(self.asking, self.batches)

    def of(self, chosen: Sequence[int] | np.ndarray) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.asking, [self.examples[n] for n in chosen], [self.bares[n] for n in chosen])
