"""The lines that do, without the page, what the page does."""

from __future__ import annotations

import shlex
from pathlib import Path

from mnemoscope.bench import Bench
from mnemoscope.web.shapes import AskIn

CHOSEN = """\
from pathlib import Path

from mnemoscope import SteeringVector, load_model

model, tokenizer = load_model({model!r})
vector = SteeringVector.load(Path({vector!r}), model, tokenizer)
with vector.apply(model, alpha={alpha:g}):
    answer = model.generate(**tokenizer({prompt!r}, return_tensors="pt"), max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0]))
"""
PARTS = """\
from pathlib import Path

from mnemoscope import Bench, Turning

bench = Bench.of(Path({run!r}), {cell!r})
turning = Turning({toward!r}, {method!r}, alpha={alpha:g}, layers={layers}, neurons={neurons})
print(bench.go_on({prompt!r}, turning).said)
"""


def snippets(bench: Bench, run: Path, asked: AskIn) -> dict[str, str]:
    """``python``, and ``command`` where the command line can do it."""
    turning, prompt = asked.turning, asked.question.prompt
    if turning is None:
        return {"python": "", "command": ""}
    bench.vectors.meant(turning.turning())  # refuses what there is none of
    vector = (bench.cell.folder / "vectors" / f"to_{turning.toward}-{turning.method}.safetensors").resolve()
    if turning.layers is not None or turning.neurons is not None or not bench.opened_plainly:
        layers = tuple(turning.layers) if turning.layers is not None else None
        facts = {"toward": turning.toward, "method": turning.method, "alpha": turning.alpha, "neurons": turning.neurons}
        python = PARTS.format(run=str(run.resolve()), cell=bench.cell.name, prompt=prompt, layers=layers, **facts)
        return {"python": python, "command": ""}
    model = bench.model_source
    if Path(model).is_dir():  # from wherever it is pasted
        model = str(Path(model).resolve())
    words = ["mnemoscope", "steer", model, "--from", str(vector), "--toward", turning.toward]
    python = CHOSEN.format(model=model, vector=str(vector), alpha=turning.alpha, prompt=prompt)
    return {"python": python, "command": shlex.join([*words, "--alpha", f"{turning.alpha:g}", "--", prompt])}
