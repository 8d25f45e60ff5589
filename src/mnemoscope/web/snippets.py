"""Python and a command that give, without the page, the answer that the page shows."""

from __future__ import annotations

import shlex
from pathlib import Path

from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Asked

WHOLE = """\
from mnemoscope import SteeringVector, load_model

model, tokenizer = load_model({model!r})
vector = SteeringVector.load({vector!r}, model, tokenizer)
with vector.apply(model, alpha={alpha:g}):
    answer = model.generate(**tokenizer({prompt!r}, return_tensors="pt"), max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0]))
"""
PART = """\
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Question, Steering

cell = OpenedCell({run!r}, {cell!r})
steering = Steering({steering})
print(cell.answer(Question(prompt={prompt!r}), steering).said)
"""


def snippets(opened: OpenedCell, run: Path, asked: Asked) -> dict[str, str]:
    """``python``, and ``command`` where the command line can do it; both empty without steering."""
    steering, prompt = asked.steering, asked.question.prompt
    if steering is None:
        return {"python": "", "command": ""}
    opened.vectors.part(steering)  # refuses what there is none of
    cell, shape = opened.cell, opened.cell.config.model
    vector = str((cell.folder / "vectors" / f"to_{steering.toward}-{steering.method}.safetensors").resolve())
    # A chat template, a layout or another precision has no place in these lines.
    is_plain = not (shape.chat or shape.layout or shape.device_map) and shape.dtype == "float32"
    if steering.layers is not None or steering.neurons is not None or not is_plain:
        arguments = ", ".join(f"{name}={value!r}" for name, value in steering if value is not None)
        return {
            "python": PART.format(run=str(run.resolve()), cell=cell.name, prompt=prompt, steering=arguments),
            "command": "",
        }
    model = shape.folder if shape.folder and not shape.is_trained else str(cell.model_folder)
    if Path(model).is_dir():  # from wherever it is pasted
        model = str(Path(model).resolve())
    words = ["mnemoscope", "steer", model, "--from", vector, "--toward", steering.toward]
    return {
        "python": WHOLE.format(model=model, vector=vector, alpha=steering.alpha, prompt=prompt),
        "command": shlex.join([*words, "--alpha", f"{steering.alpha:g}", "--", prompt]),
    }
