"""A study and its cells; what is measured, and the vectors that are tried."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mnemoscope.config.model import Frozen, ModelConfig, TrainingConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import Site as SiteName

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # of studies, cells and runs: the name of one folder, never a path
Name = Annotated[str, Field(pattern=NAME)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Layers = Annotated[str, Field(pattern=r"^(all|each|spread-[1-9]\d{0,8}|\d{1,4}|\d{1,4}-\d{1,4})$")]
ControlName = Literal[
    "random_neurons",
    "low_correlation",
    "random_sign",
    "shuffled_labels",
    "indifference",
    "permuted_answers",
    "gaussian",
]


class PairsConfig(Frozen):
    """How many examples and candidates are drawn, and where states are read."""

    site: SiteName = Field("block", description="place in every layer")
    behaviour_examples: int = Field(1000, ge=1, description="test examples of each kind that are labelled")
    fit_examples: int = Field(4000, ge=1, description="examples of the fit split that are rephrased")
    tune_examples: int = Field(4000, ge=1, description="the same of the tune split")
    test_examples: int = Field(4000, ge=1, description="the same of the test split")
    held_out_examples: int | None = Field(None, ge=1, description="the same of what is held out; default: as of test")
    rephrasings: int = Field(1, ge=1, le=100, description="drawn for each example of a split")
    permutations: int = Field(1000, ge=19, le=100000, description="sign flips behind each p-value")
    batch_size: int = Field(512, ge=1, description="examples per forward pass")
    at_once: int = Field(
        512, ge=1, description="candidates whose phrasings are asked once; up to 512, no more than 16 passes take"
    )


class ProbesConfig(Frozen):
    """Which states are probed, and with how many pairs."""

    pairs: int = Field(2000, ge=2, description="pairs of a split whose states are read, at most")
    offsets: tuple[NonNegativeInt, ...] = Field(
        (0, 1, 2, 4, 8, 16), min_length=1, description="tokens before the decision position; 0 is the position itself"
    )
    learning: tuple[PositiveInt, ...] = Field(
        (25, 50, 100, 200, 400, 800), description="numbers of fit pairs of the learning curve; all of them come last"
    )
    learning_draws: int = Field(5, ge=1, description="draws of each number of pairs")
    halvings: int = Field(20, ge=1, description="of the fit pairs, whose contrasts are compared")

    @model_validator(mode="after")
    def _in_range(self) -> ProbesConfig:
        if 0 not in self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise ValueError(f"offsets {self.offsets} lack 0, or one is there twice")
        return self


class GridConfig(Frozen):
    """The settings tried on the tune split at one site, the same for all methods: every combination."""

    layers: tuple[Layers, ...] = Field(
        ("all",), min_length=1, description='"all", "each" (alone), "spread-6" (six alone), "2", or a range "0-1"'
    )
    tops: tuple[Share, ...] = Field((0.1, 0.3, 0.5), min_length=1, description="shares of the neurons, in (0, 1]")
    strengths: tuple[Positive, ...] = Field(
        (0.05, 0.1, 0.2, 0.4), min_length=1, description="total relative norms: the shift over its unit (steering.unit)"
    )

    def layer_sets(self, count: int) -> list[tuple[int, ...]]:
        """The sets of layers that are tried in a model of ``count`` layers; InputError where one does not exist."""
        sets: dict[tuple[int, ...], None] = {}
        for layers in self.layers:
            if layers.startswith("spread-"):
                # One gap more than layers, so that neither end is among them where there is a choice.
                n = min(int(layers.removeprefix("spread-")), 2 * count)  # so many are all of them
                gap = count / (n + 1)
                sets |= dict.fromkeys((min(round(i * gap), count - 1),) for i in range(1, n + 1))
                continue
            first, last = (layers.split("-") * 2)[:2] if layers[0].isdigit() else ("0", str(count - 1))
            chosen = tuple(range(int(first), int(last) + 1))
            if not chosen or chosen[-1] >= count:
                raise InputError(f"steering.grids: layers {layers!r} do not exist in a model of {count} layers")
            sets |= dict.fromkeys(((layer,) for layer in chosen) if layers == "each" else [chosen])
        return list(sets)


class LowRankConfig(Frozen):
    """Low-rank shifts of every token, which change how a text is read; learned without a limit of norm."""

    layers: int = Field(5, ge=1, description="blocks that are shifted together, spread over the model")
    factors: tuple[Positive, ...] = Field(
        (0.75, 1.0), min_length=1, description="on what was learned, as strengths are"
    )
    steps: int = Field(60, ge=1, le=10_000, description="of learning")
    refits: int = Field(20, ge=0, description="draws of controls that are learned again, each as long as the shift")


class SteeringConfig(Frozen):
    """Which vectors are tried on the tune split and judged on the test split."""

    methods: tuple[Name, ...] = Field(  # or paths of modules
        ("nmd", "gradient", "learned"), min_length=1, description="tried, all alike: names of modules of methods"
    )
    grids: dict[SiteName, GridConfig] = Field(
        {"block": GridConfig()}, min_length=1, description="what is tried, by site"
    )
    low_rank: LowRankConfig = LowRankConfig()
    aim: Literal["pairs", "conflict"] = Field(
        "pairs", description="what vectors are for: `pairs`, or conflicts as drawn"
    )
    unit: Literal["norm", "spread"] = Field(
        "norm", description="of strengths: the norm of a layer's states, or each neuron's spread, without massive ones"
    )
    positions: Literal["decision", "all"] = Field("decision", description="shifted tokens: from the decision on or all")
    fit_pairs: int = Field(600, ge=2, description="fit pairs whose states and gradients make the directions")
    fit_others: int = Field(600, ge=1, description="fit examples of each other list that learned vectors are fitted on")
    kept_weight: float = Field(1.0, ge=0, le=100, description="of memory and novel examples, for learned vectors")
    kept_kinds: tuple[Literal["memory", "novel"], ...] = Field(
        ("memory", "novel"), description="which of them; novel examples that are read from the prompt teach to read"
    )
    learned_steps: int = Field(20, ge=1, le=10_000, description="of the ascent; more make `indifference` cleaner")
    learned_refits: int = Field(20, ge=1, description="draws of controls that are learned again, at most")
    fit_batch: int = Field(16, ge=1, description="fit examples a step of that ascent, and a pass of gradients")
    tune_refits: int = Field(4, ge=0, description="draws of a refitted control of each setting on tune; 0: left out")
    tune_draws: int = Field(6, ge=1, description="draws of other controls of each setting on tune")
    tune_pairs: int = Field(300, ge=1, description="tune pairs that every setting is tried on")
    tune_others: int = Field(200, ge=1, description="tune examples of each other list")
    judged_examples: int = Field(500, ge=1, description="phrasings of test pairs, and examples of each other list")
    control_limit: float = Field(0.18, ge=0, le=1, description="steered share beyond which a control costs dearly")
    neither_limit: float = Field(1.0, ge=0, le=1, description="settings with more answers of neither kind come last")
    screened: int = Field(
        0,
        ge=0,
        description="tune examples of a first look, from which a quarter of the settings goes on; 0: no such look",
    )
    excess_cost: float = Field(2.0, ge=0.5, le=100, description="points of shift that one beyond `control_limit` costs")
    collateral_limit: float = Field(0.03, ge=0, le=1, description="settings that cost more of other lists come last")
    draws: int = Field(20, ge=1, description="draws of each control of the best vector")
    other_draws: int = Field(8, ge=1, description="draws of each control of other methods' vectors, at most `draws`")
    controls: tuple[ControlName, ...] = Field(get_args(ControlName), description="drawn, where they exist")
    controls_of: Literal["all", "best"] = Field("all", description="methods whose controls are drawn on test")
    norm_draws: int = Field(4, ge=0, description="of each control of methods at equal norms; 0: leaves these out")
    conflict_draws: int = Field(20, ge=1, description="draws of each control where conflicts are steered as drawn")

    def check_layers(self, count: int) -> None:
        """Raises InputError where a layer that is to be tried does not exist in a model of ``count`` layers."""
        for grid in self.grids.values():
            grid.layer_sets(count)


class EffectsConfig(Frozen):
    """What is measured of the chosen vectors on test pairs beyond the shift itself."""

    pairs: int = Field(300, ge=1, description="test pairs")
    doses: tuple[float, ...] = Field(
        (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), min_length=1, description="multiples of the chosen strength"
    )
    ablated: tuple[Share, ...] = Field((0.05, 0.1, 0.3), description="shares of the neurons held at their mean")
    draws: int = Field(5, ge=1, description="draws of as many neurons at random, and of Gaussian shifts at each dose")
    methods: Literal["all", "best"] = Field("all", description="whose vectors these are measured of")
    patched: bool = Field(True, description="whether states are patched at every layer, the upper bound")


class DetectionConfig(Frozen):
    """Whether a detector of P(memorized) is fitted, and with how much."""

    fitted: bool = Field(False, description="whether one is fitted and judged")
    examples: int = Field(1500, ge=16, description="conflict prompts of a split whose states are read, at most")
    others: int = Field(300, ge=1, description="memory and novel prompts of a split each, at most")


class NeutralConfig(Frozen):
    """How the divergence on neutral text, the model's own, is measured."""

    cuts: int = Field(0, ge=0, description="random places at which steering sets in; 0 leaves it out")
    texts: int = Field(64, ge=2, description="texts that the model writes")
    length: int = Field(96, ge=26, description="tokens of a text; fewer where the model reads no more")
    following: int = Field(16, ge=2, le=16, description="tokens read behind the steered one")
    doses: tuple[float, ...] = Field((0.25, 0.5, 1.0, 2.0), min_length=1, description="multiples of the strength")
    batch_size: int = Field(32, ge=1, description="cuts per forward pass")


class SamplesConfig(Frozen):
    """Prompts that the report shows with what the model writes, unsteered and steered."""

    prompts: int = Field(0, ge=0, description="test prompts in either direction, of different groups; 0: none")
    tokens: int = Field(32, ge=1, le=1024, description="that follow each prompt, at most")


class CellConfig(Frozen):
    """One task with its model; every seed of it is a cell."""

    task: str = Field(description="a name (`mnemoscope tasks`), or package.module:Class")
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
    def _the_library_trains_adapters(self) -> CellConfig:
        training, default = self.training, TrainingConfig()
        if self.model.lora is None:
            return self
        for name in ("averaged", "hold", "give_up_at"):
            if getattr(training, name) != getattr(default, name):
                raise ValueError(f"training.{name} is of trainings from scratch; leave it out with model.lora")
        if training.prompt_weight not in (0, 1):
            raise ValueError(f"training.prompt_weight {training.prompt_weight}: with model.lora 0 and 1 are allowed")
        if training.steps % training.evaluate_every:
            raise ValueError("training.steps is no multiple of training.evaluate_every, as model.lora needs")
        if training.warmup_steps + training.decay_steps > training.steps:
            raise ValueError("training.warmup_steps and decay_steps take more than training.steps together")
        return self

    @model_validator(mode="after")
    def _neutral_text_fits(self) -> CellConfig:
        own, most = not (self.model.folder or self.model.cell or self.model.opened), self.model.context - 1
        if own and self.neutral.cuts and self.neutral.length > most:
            raise ValueError(f"neutral.length {self.neutral.length} does not fit into model.context; at most {most}")
        return self


class StudyConfig(Frozen):
    """A study: what is run, with how many seeds."""

    study: Name = Field(description="name of the study and of its run folder")
    seeds: int = Field(1, ge=1, le=1000, description="how many, from first_seed on, each a cell of its own")
    first_seed: int = Field(0, ge=0, le=900, description="the first, as for seeds on which no setting was developed")
    threads: int = Field(1, ge=1, le=4096, description="threads of a cell; results depend on it in the last bits")
    cells: dict[Name, CellConfig] = Field(min_length=1, description="by the name shown in results and report")

    @model_validator(mode="after")
    def _layers_and_cells_exist(self) -> StudyConfig:
        owners = {name: cell.model for name, cell in self.cells.items() if not cell.model.cell}
        for label, cell in self.cells.items():
            donor = cell.model.cell or label
            if donor not in owners:
                raise ValueError(f"cells.{label}.model.cell: {donor!r} is not one of {', '.join(owners)}")
            if donor != label and cell.model.folder:
                raise ValueError(f"cells.{label}.model: folder and cell are both given")
            most = self.seeds_of(donor)
            if self.seeds_of(label) > most:
                raise ValueError(f"cells.{label}.max_seeds: at most {most} are allowed, as many as {donor} has")
            if not (owners[donor].folder or owners[donor].opened):
                cell.steering.check_layers(owners[donor].layers)
        return self

    def seeds_of(self, label: str) -> int:
        """How many seeds a cell has."""
        return min(self.seeds, self.cells[label].max_seeds or self.seeds)
