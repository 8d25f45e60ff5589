"""Any task of lm-evaluation-harness under an intervention: the model ``mnemoscope``.

::

    python -m mnemoscope.serving.lm_eval --model mnemoscope --tasks TASK \\
        --model_args pretrained=MODEL,run=RUN,toward=context

From Python, importing this module registers it for ``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mnemoscope.behaviour import left_padded
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Intervention
from mnemoscope.models import load_model, pass_inputs
from mnemoscope.runs.errors import InputError

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, and tokens of a context and of what follows


@register_model("mnemoscope")
class SteeredLM(HFLM):
    """A model whose every answer is steered, with several layers as well.

    What follows a context is scored from the context's last token on, as in ``generate``. Each request stands in the
    same columns however others beside it are padded.
    """

    def __init__(
        self, pretrained: Any, run: str, toward: str, alpha: float = 1.0, lever: str | None = None, **choices: Any
    ) -> None:
        """As ``HFLM``, on the CPU unless said otherwise; ``run``: of a fit on this model, with ``lever`` or its best.

        Raises:
            InputError: ``batch_size`` is no number, the run has no such lever, or it acts on prompts
                or in two passes, which this library asks in its own way.
        """
        tokenizer = choices.pop("tokenizer", None)
        choices = dict[str, Any](device="cpu", batch_size=8) | choices
        if not str(choices["batch_size"]).isdecimal():
            raise InputError(f"batch_size: {choices['batch_size']} is no number, and none is tried here")
        if isinstance(pretrained, str):  # the library leaves an open model where and as it is
            pretrained, tokenizer = load_model(pretrained, dtype=choices.pop("dtype", "float32"))
            pretrained.to(choices["device"])
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **choices)
        fitted = Fitted.open(run, pretrained, tokenizer)
        one = (fitted.use(toward, lever) if lever else fitted).lever(toward).scaled(float(alpha))
        if one.contrast or one.passes > 1 or type(one).prompt is not Intervention.prompt:
            raise InputError(f"lever: {one.lever} act on prompts or take two passes; name another one of {run}")
        self.steering = one

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i][2]), len(requests[i][1])))
        for length, places in groupby(order, key=lambda i: len(requests[i][2])):
            chosen, size = list(places), override_bs or int(self.batch_size)
            for start in range(0, len(chosen), size):
                chunk = chosen[start : start + size]
                for i, answer in zip(chunk, self._scored([requests[i] for i in chunk], length), strict=True):
                    found[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return found

    @torch.no_grad()
    def _scored(self, requests: list[Request], length: int) -> list[tuple[float, bool]]:
        """Of requests whose ``length`` last tokens are scored: their log probability, and whether greedy."""
        rows = [(context + behind)[-(self.max_length + 1) :][:-1] for _, context, behind in requests]
        ids_NT, mask_NT = left_padded(rows, self.tokenizer.pad_token_id or 0, self.device)
        start = 0 if self.steering.everywhere else ids_NT.shape[1] - length
        with self.steering.apply(self.model, start=start):
            logits_NTV = self.model(**pass_inputs(self.model, ids_NT, mask_NT)).logits[:, -length:]
        wanted_NM = torch.tensor([behind for *_, behind in requests], device=self.device)
        logp_NM = logits_NTV.float().log_softmax(-1).gather(2, wanted_NM[..., None])[..., 0]
        greedy_N = (logits_NTV.argmax(-1) == wanted_NM).all(1)
        return list(zip(logp_NM.sum(1).tolist(), greedy_N.tolist(), strict=True))

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **choices: Any) -> Any:
        with self.steering.apply(self.model):
            return super()._model_generate(context, max_length, stop, **choices)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
