"""The configuration of a study: frozen data that validate and do nothing else."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mnemoscope.errors import InputError

Share = Field(ge=0.0, le=1.0)
Offset = Annotated[int, Field(ge=0)]
PairCount = Annotated[int, Field(ge=1)]


MethodName = Literal["nmd", "standardized-nmd", "gradient", "logistic", "whitened", "pca", "learned"]
SiteName = Literal["block", "attention", "mlp", "neuron"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LayoutConfig(_Frozen):
    """Where a model keeps its parts, as attribute paths."""

    blocks: str = Field(description="the list of blocks, from the model's root")
    attention: str = Field(description="inside a block: what attention adds")
    mlp: str = Field(description="inside a block: what the MLP adds")
    down: str = Field("", description="inside a block: the down projection; empty where there is no single one")


def _as_several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class LoraConfig(_Frozen):
    """An adapter (LoRA) in which a trained model learns the task; its own weights stay as they are."""

    rank: int = Field(16, ge=1, le=4096, description="of the product that is added to each weight matrix")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="the product counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what the adapter reads, while it is trained")
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_as_several)] = Field(
        ("all-linear",),
        min_length=1,
        description="names of the layers that are adapted; all-linear: every linear layer but the head",
    )


class ChatConfig(_Frozen):
    """Prompts are put by the chat template of the tokenizer."""

    system: str | None = Field(None, description="what the system message says; null leaves it to the template")


class ModelConfig(_Frozen):
    """A GPT-2 to train from scratch, or the folder of a trained model."""

    folder: str | None = Field(
        None, description="folder or hub id of a trained causal language model; nothing is trained unless lora is given"
    )
    lora: LoraConfig | None = Field(
        None, description="the adapter in which the model of folder learns the task; {}: with the usual settings"
    )
    cell: str | None = Field(
        None, description="another cell of the study: its model of the same seed is used; nothing is trained"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="precision of a trained model's weights; auto: as they were saved"
    )
    layout: LayoutConfig | None = Field(None, description="where the parts of a trained model of no known family are")
    chat: ChatConfig | None = Field(
        None, description="for a model that was tuned to talk: {} puts prompts by its chat template"
    )
    initialization: int | None = Field(
        None, ge=0, description="seed of the first weights; default: the cell's seed. One number lets seeds share them"
    )
    layers: int = Field(4, ge=1, le=64, description="blocks")
    width: int = Field(128, ge=8, le=4096, description="neurons of a state")
    heads: int = Field(4, ge=1, le=64, description="attention heads; a divisor of the width")
    context: int = Field(64, ge=8, le=4096, description="most tokens the model reads")

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.lora and not self.folder:
            raise ValueError("lora adapts a trained model; give its folder or hub id as folder, or leave lora out")
        if self.chat and (self.lora or not self.folder):
            raise ValueError("chat puts prompts to a trained model as it is; give its folder, and no lora")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether a cell trains its model: from scratch, or an adapter in a trained one."""
        return not self.cell and (self.lora is not None or not self.folder)

    @property
    def shares_first_weights(self) -> bool:
        """Whether the models of all seeds begin with the same weights; those of an adapter are a small part."""
        return self.initialization is not None or self.folder is not None


class StopConfig(_Frozen):
    """When both behaviours are there, on the tune split."""

    novel_accuracy: float = Field(0.97, ge=0, le=1, description="accuracy on novel examples, at least")
    recall: float = Field(0.97, ge=0, le=1, description="accuracy on memory examples, at least")
    conflict_each: float = Field(0.25, ge=0, le=0.5, description="share of conflicts answered each way, at least")
    conflict_other: float = Field(0.10, ge=0, le=1, description="share of conflicts answered neither way, at most")


class TrainingConfig(_Frozen):
    """How a model is trained, from scratch or in an adapter."""

    steps: int = Field(1000, ge=1, description="optimizer steps, at most")
    attempts: int = Field(
        1, ge=1, le=20, description="trainings, with new first weights and data, before it is given up"
    )
    give_up_at: int | None = Field(
        None, ge=1, description="step at which an attempt that has learned no rule (novel accuracy below 0.7) ends"
    )
    decay_steps: int = Field(
        0, ge=0, description="steps at the end over which the learning rate falls to 2 % of its peak"
    )
    batch_size: int = Field(64, ge=1, le=65536, description="instances a step")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="of the matrices in blocks; AdamW of the rest, and of adapters"
    )
    learning_rate: float = Field(3e-3, gt=0, le=1, description="its peak")
    weight_decay: float = Field(0.1, ge=0, le=10, description="of the matrices inside the blocks, or of the adapter")
    settle_steps: int = Field(
        0, ge=0, description="steps after the stop rule first holds, over which the learning rate falls to 0"
    )
    settle_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of embeddings and of what attention and MLP add, in these steps"
    )
    warmup_steps: int = Field(50, ge=0, description="steps over which the learning rate rises")
    prompt_weight: float = Field(
        1.0, ge=0, le=1, description="weight of a prompt token in the loss; 1 is plain causal language modelling"
    )
    evaluate_every: int = Field(50, ge=1, description="steps between two measurements of the behaviours")
    evaluation_examples: int = Field(200, ge=8, description="examples of each kind that are measured")
    stop: StopConfig = StopConfig()


class PairsConfig(_Frozen):
    """How many examples and candidates are drawn, and where states are read."""

    site: SiteName = Field("block", description="place in every layer")
    behaviour_examples: int = Field(1000, ge=1, description="test examples of each kind that are labelled")
    fit_examples: int = Field(4000, ge=1, description="examples of the fit split that are rephrased")
    tune_examples: int = Field(4000, ge=1, description="the same of the tune split")
    test_examples: int = Field(4000, ge=1, description="the same of the test split")
    rephrasings: int = Field(1, ge=1, le=100, description="drawn for each example of a split")
    permutations: int = Field(1000, ge=19, le=100000, description="sign flips behind each p-value")
    batch_size: int = Field(512, ge=1, description="examples per forward pass")


class ProbesConfig(_Frozen):
    """Which states are probed, and with how many pairs."""

    pairs: int = Field(2000, ge=2, description="pairs of a split whose states are read, at most")
    offsets: tuple[Offset, ...] = Field(
        (0, 1, 2, 4, 8, 16), min_length=1, description="tokens before the decision position; 0 is the position itself"
    )
    shuffles: int = Field(10, ge=1, description="of the labels, for the probe that has nothing to learn")
    learning: tuple[PairCount, ...] = Field(
        (25, 50, 100, 200, 400, 800), description="numbers of fit pairs of the learning curve; all of them come last"
    )
    learning_draws: int = Field(5, ge=1, description="draws of each number of pairs")
    halvings: int = Field(20, ge=1, description="of the fit pairs, whose contrasts are compared")
    tops: tuple[float, ...] = Field(
        (0.05, 0.1, 0.3), description="shares of all neurons, in (0, 1], whose overlap between halves is counted"
    )

    @model_validator(mode="after")
    def _in_range(self) -> ProbesConfig:
        if 0 not in self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise ValueError(f"offsets {self.offsets} lack 0, or one is there twice")
        for top in self.tops:
            if not 0 < top <= 1:
                raise ValueError(f"top {top} is not in (0, 1]")
        return self


class SweepConfig(_Frozen):
    """The settings of a method that are tried on the tune split: every combination."""

    sites: tuple[SiteName, ...] = Field(("block",), min_length=1, description="places in every layer")
    layers: tuple[str, ...] = Field(
        ("all",),
        min_length=1,
        description='"all", "each" (every layer alone), "spread-6" (six alone, evenly spaced), "2", or a range "0-1"',
    )
    tops: tuple[float, ...] = Field((0.1, 0.3, 0.9), min_length=1, description="shares of the neurons, in (0, 1]")
    strengths: tuple[float, ...] = Field(
        (0.05, 0.1, 0.2, 0.4), min_length=1, description="total relative norms: the shift over the norm of the states"
    )

    @model_validator(mode="after")
    def _in_range(self) -> SweepConfig:
        for top in self.tops:
            if not 0 < top <= 1:
                raise ValueError(f"top {top} is not in (0, 1]")
        for strength in self.strengths:
            if not 0 < strength < float("inf"):
                raise ValueError(f"strength {strength} is not above 0 and finite")
        for layers in self.layers:
            if not re.fullmatch(r"all|each|spread-[1-9]\d*|\d+|\d+-\d+", layers):
                raise ValueError(
                    f"layers {layers!r} is not 'all', 'each', 'spread-' and a number, a layer such as '2' or a range "
                    "such as '0-1'"
                )
        return self

    def layer_sets(self, count: int) -> list[tuple[int, ...]]:
        """The sets of layers that are tried in a model of ``count`` layers, each once.

        Raises:
            ValueError: a layer does not exist, or a range is empty.
        """
        sets: dict[tuple[int, ...], None] = {}
        for layers in self.layers:
            if layers.startswith("spread-"):
                # As many gaps as layers and one more, so that neither end is among them where there is a choice.
                gap = count / (int(layers.removeprefix("spread-")) + 1)
                places = (round(number * gap) for number in range(1, int(layers.removeprefix("spread-")) + 1))
                sets |= dict.fromkeys((min(place, count - 1),) for place in places)
                continue
            first, last = (layers.split("-") * 2)[:2] if layers[0].isdigit() else ("0", str(count - 1))
            chosen = tuple(range(int(first), int(last) + 1))
            if not chosen or chosen[-1] >= count:
                raise ValueError(f"steering.sweeps: layers {layers!r} do not exist in a model of {count} layers")
            sets |= dict.fromkeys(((layer,) for layer in chosen) if layers == "each" else [chosen])
        return list(sets)


Grids = Annotated[tuple[SweepConfig, ...], BeforeValidator(_as_several), Field(min_length=1)]


class SteeringConfig(_Frozen):
    """Which vectors are tried on the tune split and judged on the test split."""

    sweeps: dict[MethodName, Grids] = Field(
        {
            "nmd": (SweepConfig(),),
            "gradient": (SweepConfig(),),
            "learned": (SweepConfig(tops=(0.9,), strengths=(0.1, 0.2)),),
        },
        min_length=1,
        description="the methods, and what is tried of each: one grid or several",
    )
    positions: Literal["decision", "all"] = Field(
        "decision", description="tokens that are shifted: from the decision on, or every one (what can be exported)"
    )
    mapped: tuple[MethodName, ...] = Field(
        ("nmd",), description="methods whose whole sweep is measured on memory, novel and other conflict examples too"
    )
    fit_pairs: int = Field(600, ge=2, description="fit pairs whose states and gradients make the directions")
    fit_others: int = Field(600, ge=1, description="fit examples of each other list that learned vectors are fitted on")
    kept_weight: float = Field(
        1.0, ge=0, le=100, description="of memory and novel examples in the objective of learned vectors; 0: left out"
    )
    learned_steps: int = Field(
        20, ge=1, le=10_000, description="of the ascent of learned vectors; more make its shuffled control cleaner"
    )
    fit_batch: int = Field(64, ge=1, description="fit examples a step of that ascent, and a pass of gradients")
    tune_refits: int = Field(
        4, ge=0, description="draws of the shuffled control of each setting on tune, fitted anew; 0 leaves it out"
    )
    tune_draws_again: int = Field(12, ge=1, description="of each control of a chosen setting, before methods compete")
    tune_pairs: int = Field(300, ge=1, description="tune pairs that every setting is tried on")
    tune_others: int = Field(200, ge=1, description="tune examples of each other list")
    judged_examples: int = Field(500, ge=1, description="test pairs, and examples of each other list, at most")
    control_limit: float = Field(
        0.18,
        ge=0,
        le=1,
        description="what a control turns of the tune examples beyond this costs dearly, the rest half",
    )
    excess_cost: float = Field(
        2.0, ge=0.5, le=100, description="points of the shift that each point of a control beyond its limit costs"
    )
    collateral_limit: float = Field(
        0.03, ge=0, le=1, description="settings that cost more memory and novel examples are chosen only if all do"
    )
    conflict_control_limit: float = Field(
        0.3, ge=0, le=1, description="the same where conflicts that are no pairs are turned, which takes larger norms"
    )
    conflict_collateral_limit: float = Field(0.1, ge=0, le=1, description="of collateral, for those conflicts")
    draws: int = Field(20, ge=1, description="draws of each control")


class EffectsConfig(_Frozen):
    """What is measured of the chosen vectors on test pairs beyond the shift itself."""

    pairs: int = Field(300, ge=1, description="test pairs")
    doses: tuple[float, ...] = Field(
        (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), min_length=1, description="multiples of the chosen strength"
    )
    ablated: tuple[float, ...] = Field((0.05, 0.1, 0.3), description="shares of the neurons held at their mean")
    draws: int = Field(5, ge=1, description="draws of as many neurons at random")


class DetectionConfig(_Frozen):
    """Whether a detector of P(memorized) is fitted, and with how much."""

    fitted: bool = Field(False, description="whether one is fitted and judged")
    examples: int = Field(1500, ge=16, description="conflict prompts of a split whose states are read, at most")
    others: int = Field(300, ge=1, description="memory and novel prompts of a split each, at most")
    threshold: float = Field(0.5, ge=0, le=1, description="probability from which on a gate acts")


class NeutralConfig(_Frozen):
    """How the divergence on neutral text, the model's own, is measured."""

    cuts: int = Field(0, ge=0, description="random places at which steering sets in; 0 leaves it out")
    texts: int = Field(64, ge=2, description="texts that the model writes")
    length: int = Field(96, ge=26, description="tokens of a text")
    following: int = Field(16, ge=1, le=16, description="tokens read behind the steered one")
    doses: tuple[float, ...] = Field((0.25, 0.5, 1.0, 2.0), min_length=1, description="multiples of the strength")
    batch_size: int = Field(32, ge=1, description="cuts per forward pass")


class SamplesConfig(_Frozen):
    """Prompts that the report shows with what the model says, by itself and steered."""

    prompts: int = Field(0, ge=0, description="test prompts in either direction, of different groups; 0: none")
    tokens: int = Field(32, ge=1, le=1024, description="that follow each prompt, at most")


class CellConfig(_Frozen):
    """One task with its model; every seed of it is a cell."""

    task: str = Field(description="inference, addition, addition-digits, cipher, joint, jsonl, or package.module:Class")
    options: dict[str, Any] = Field({}, description="options of the task")
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    pairs: PairsConfig = PairsConfig()
    probes: ProbesConfig = ProbesConfig()
    steering: SteeringConfig = SteeringConfig()
    effects: EffectsConfig = EffectsConfig()
    detection: DetectionConfig = DetectionConfig()
    neutral: NeutralConfig = NeutralConfig()
    samples: SamplesConfig = SamplesConfig()
    analysed: bool = Field(True, description="False: a model for other cells (model.cell), which is only trained")
    max_seeds: int | None = Field(None, ge=1, description="fewer seeds than the study, where a cell costs much")

    @model_validator(mode="after")
    def _neutral_text_fits(self) -> CellConfig:
        own = self.model.folder is None and self.model.cell is None
        if own and self.neutral.cuts and self.neutral.length >= self.model.context:
            most = self.model.context - 1
            raise ValueError(
                f"neutral.length {self.neutral.length} does not fit into model.context; at most {most} does"
            )
        return self


class StudyConfig(_Frozen):
    """A study: what is run, with how many seeds."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the study and of its run folder")
    seeds: int = Field(1, ge=1, le=1000, description="seeds 0 .. seeds - 1, each a cell of its own")
    threads: int = Field(1, ge=1, le=256, description="threads of a cell; results depend on it in the last bits")
    cells: dict[str, CellConfig] = Field(
        min_length=1, description="by the name under which results and report show them"
    )

    @model_validator(mode="after")
    def _cells_exist(self) -> StudyConfig:
        for label, cell in self.cells.items():
            donor = cell.model.cell
            if donor is None:
                continue
            if cell.model.folder:
                raise ValueError(f"cells.{label}.model: folder and cell are both given")
            if donor not in self.cells or self.cells[donor].model.cell or donor == label:
                owners = [name for name, other in self.cells.items() if not other.model.cell]
                raise ValueError(f"cells.{label}.model.cell: {donor!r} is not one of {', '.join(owners)}")
            if self.seeds_of(label) > self.seeds_of(donor):
                most = self.seeds_of(donor)
                raise ValueError(f"cells.{label}.max_seeds: at most {most} are allowed, as many as {donor} has")
        return self

    def seeds_of(self, label: str) -> int:
        """How many seeds a cell has."""
        return min(self.seeds, self.cells[label].max_seeds or self.seeds)


def built_in_studies() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("mnemoscope") / "studies"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_study(study: str, overrides: list[str] | None = None, seeds: int | None = None) -> StudyConfig:
    """Read a built-in study or a YAML file and resolve it.

    Args:
        study: a name of ``built_in_studies`` or the path of a YAML file.
        overrides: ``a.b=c`` each; the value is YAML.
        seeds: replaces the study's number of seeds.

    Raises:
        InputError: the study is unknown, is no YAML, or a field has a value that is not allowed.
    """
    if study in built_in_studies():
        text = (resources.files("mnemoscope") / "studies" / f"{study}.yaml").read_text()
    elif Path(study).is_file():
        text = Path(study).read_text()
    else:
        raise InputError(f"study: {study!r} is neither a file nor one of {', '.join(built_in_studies())}")
    raw = _yaml(text, study)
    if not isinstance(raw, dict):
        raise InputError(f"study: {study} holds {type(raw).__name__}, not a mapping of fields")
    for override in overrides or []:
        _override(raw, override)
    if seeds is not None:
        raw["seeds"] = seeds
    return parse_study(raw)


def parse_study(raw: dict[str, Any]) -> StudyConfig:
    """Validate fields read from a file.

    Raises:
        InputError: naming the first field at fault, its value and what is allowed.
    """
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise _in_one_line(error, "study") from error


def parse_model(raw: dict[str, Any]) -> ModelConfig:
    """Validate what is said of a model.

    Raises:
        InputError: naming the first field at fault, its value and what is allowed.
    """
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise _in_one_line(error, "model") from error


def _in_one_line(error: ValidationError, root: str) -> InputError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or root
    value = "" if first["type"] == "missing" else f" (got {_short(first['input'])})"
    return InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}{value}")


def dump_study(config: StudyConfig) -> str:
    """The full resolved configuration as YAML; ``load_study`` reads it back as the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or 'malformed'})") from error


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set: {override!r} is not of the form a.b=c")
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"--set: {path!r} leads through {part!r}, which holds no fields")
    node[last] = _yaml(value, f"--set {path}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
