"""The schema of ``results.json``. Numbers with an uncertainty are ``Estimate``; a key without a value is left out."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from mnemoscope.statistics import Estimate

Direction = Literal["to_generalized", "to_memorized"]
Aim = Literal["pairs", "conflict"]
When = Literal["before", "after"]
Carried = dict[Literal["shift", "gaussian"], Estimate]
Shared = Literal["share", "chance", "chance_in_layers"]
Bin = dict[Literal["said", "memorized"], Estimate]
Verdict = Literal["yes", "no", "unclear"]
VERDICTS: dict[int, Verdict] = {1: "yes", -1: "no", 0: "unclear"}
# direction of steering -> (the behaviour it aims at, the behaviour it starts from)
DIRECTIONS: dict[Direction, tuple[str, str]] = {
    "to_generalized": ("generalized", "memorized"),
    "to_memorized": ("memorized", "generalized"),
}
AIMS: tuple[Aim, ...] = ("pairs", "conflict")  # what a setting is chosen for, and the list that it is to steer
REFITTED = ("shuffled_labels", "indifference", "permuted_answers")  # a method has the first, or the other two
CONTROLS = ("random_neurons", "low_correlation", "random_sign", *REFITTED, "gaussian")


class Result(BaseModel):
    """A part of ``results.json``."""

    model_config = ConfigDict(populate_by_name=True)


class Shares(Result):
    """What steered examples of one list answer."""

    shift: Estimate = Field(description="share that answers with the target behaviour")
    stay: Estimate = Field(description="share that keeps the source behaviour")
    other: Estimate = Field(description="share that does neither")
    confabulated: Estimate | None = Field(None, description="share of answers that only look memorized")


class Dose(Shares):
    """Test pairs by method, direction, `vector` or `gaussian`, and multiple of the chosen shift."""

    margin: Estimate = Field(description="mean decision margin, nats")


class Chosen(Result):
    """A setting, as `records/chosen.json` has it."""

    model_config = ConfigDict(extra="allow")

    method: str
    site: str
    layers: list[int]
    positions: str = Field(description="`decision`: from the decision position on; `all`")
    top: float = Field(description="share of the neurons")
    strength: float = Field(description="total relative norm")
    alpha: float = Field(description="the paper's, times NMD; NaN for other methods")
    within_limits: bool = Field(description="whether worst control and collateral stayed within the limits, on tune")
    shared: float | None = Field(None, description="share of the neurons of `random_neurons` that are the vector's")
    begin_alike: float | None = Field(None, description="share of fit phrasings whose answers begin with equal tokens")


class Control(Result):
    """A control of the vector's norm; all its draws pooled."""

    pairs: Shares
    conflict: Shares
    draws: dict[Aim, int] = Field(description="number of draws by list")
    exceeded: dict[Aim, bool] = Field(
        description="by list: the vector does surely more, even if it were another draw of the control; in every seed"
    )
    worst: dict[Aim, Shares] = Field(description="by list the draw that shifts most, of all seeds")


class Gated(Result):
    """What a vector does behind the gate, by list of examples."""

    acted: dict[str, Estimate] = Field(description="share of the examples on which the gate acts")
    shift: dict[str, Estimate] = Field(description="of lists with the source behaviour: share that shifts")
    collateral: dict[str, Estimate] = Field(description="change in accuracy")
    recall_by_family: dict[str, dict[When, Estimate]] | None = Field(None, description="as without the gate")


class Strongest(Result):
    """Beside a vector the control that steers most, in each seed its own."""

    shift: Estimate = Field(description="share steered")
    difference: Estimate = Field(description="paired difference of the vector to it")
    names: dict[str, int] = Field(description="in how many seeds it is which control")
    exceeded: bool = Field(
        description="whether the vector does surely more than every control, even as another draw of it; in every seed"
    )


class Steered(Result):
    """One method in one direction; `pairs` and `collateral` under `chosen`, `conflict` under `chosen_conflict`."""

    chosen: Chosen = Field(description="the setting chosen for pairs; the first seed's")
    chosen_conflict: Chosen = Field(description="the setting chosen for conflicts, at the same place")
    pairs: Shares = Field(description="test pairs")
    conflict: Shares = Field(description="test conflicts as drawn that show the source behaviour unsteered")
    confabulated: Estimate = Field(description="of `pairs`")
    pairs_unreachable: Shares = Field(description="to memorized: phrasings that do not keep the stored key")
    held_out: dict[str, Shares] = Field(description="test pairs of what the task holds out, by its name")
    conflict_at_chosen: Shares = Field(description="conflicts under the setting for pairs")
    controls: dict[str, Control] = Field(description="all by name; undefined where there was none")
    minus_control: dict[str, dict[Aim, Estimate]] = Field(description="paired difference of the shift to each control")
    beside: dict[Aim, Strongest] = Field({}, description="by list the control that steers most, where one was drawn")
    collateral: dict[str, Estimate] = Field(description="change in accuracy on `memory`, `novel`, `conflict_rest`")
    collateral_conflict: dict[str, Estimate] = Field(description="the same under `chosen_conflict`")
    lost_right: dict[Aim, dict[str, Estimate]] | None = Field(
        None, description="by aim and list: of the examples answered right before, the share that is not any more"
    )
    recall_by_family: dict[str, dict[When, Estimate]] | None = Field(None, description="`memory`, by phrasing")
    gated: Gated | None = Field(None, description="only with a detector")
    best_conflict: Steered | None = Field(None, description="in `steering`: where another method is best for conflicts")

    def for_aim(self, aim: Aim) -> Steered:
        """The block whose method is best for an aim."""
        return self.best_conflict if aim == "conflict" and self.best_conflict else self

    def lost(self, aim: Aim) -> dict[str, Estimate]:
        """Collateral under the setting for an aim."""
        return self.collateral if aim == "pairs" else self.collateral_conflict

    def broken(self, aim: Aim) -> dict[str, Estimate]:
        """Of what was answered right before, the share that is not any more; nothing where a run does not say."""
        return (self.lost_right or {}).get(aim, {})


class AtNorm(Result):
    """A setting that was chosen by the share of tune pairs it steers alone, on test pairs, beside its own controls."""

    site: str = Field(description="the first seed's, as `layers`, `top` and `strength` are")
    layers: str = Field(description="such as `0-3` or `2`")
    top: float = Field(description="share of the neurons")
    strength: float = Field(description="total relative norm")
    strengths: list[float] = Field([], description="of all seeds, each once")
    shift: Estimate = Field(description="share steered")
    control: Estimate = Field(description="the same of the control that steers most")
    strongest: str = Field(description="that control; the first seed's")
    difference: Estimate = Field(description="paired difference")


class Behaviour(Result):
    """Test examples without any intervention."""

    recall: Estimate = Field(description="accuracy on `memory` examples")
    novel_accuracy: Estimate = Field(description="accuracy on `novel` examples")
    conflict: dict[str, Estimate] = Field(description="`memorized`, `generalized`, `other`, `confabulated`")
    ties: int = Field(description="answers that hung on two logits closer than rounding")


class Yield(Result):
    """Candidates that flip under rephrasing."""

    candidates: int
    pairs: int
    yield_: Estimate = Field(alias="yield", description="pairs / candidates")
    groups: int = Field(description="groups of the pairs")


class Pairs(Yield):
    """The test split, and every split."""

    by_split: dict[str, Yield] = Field(description="`fit`, `tune`, `test` and `all`")


class Contrasts(Result):
    """Per layer, over the fit pairs."""

    site: str
    layers: list[int]
    mean_abs_nmd: list[float] = Field(description="mean |NMD| of the layer's neurons")
    in_norms: list[float] = Field([], description="the same over the mean norm of the layer's states")
    max_abs_rho: list[float] = Field(description="largest |rho|")
    significant_fraction: list[float] = Field(description="share of the neurons with a family-wise p of at most 0.05")
    significant: Estimate = Field(description="the same share of all neurons")
    pairs: int
    groups: int


class BestLayer(Result):
    """The best layer, chosen on other test groups than it is scored on."""

    picked: list[int] = Field(description="layers chosen")
    accuracy: Estimate
    minus_input_only: Estimate = Field(description="paired difference to each baseline")
    minus_input_repeats: Estimate
    minus_entropy: Estimate
    minus_top_gap: Estimate


class Probe(Result):
    """Linear probes, learned on fit, scored on test pairs."""

    site: str
    layers: list[int]
    accuracy: list[Estimate] = Field(description="per layer, at the decision position")
    auroc: list[Estimate] = Field(description="per layer")
    best: BestLayer
    input_only: Estimate = Field(description="accuracy of a probe of tokens and positions")
    input_repeats: Estimate = Field(description="and of how far back each token stood before")
    input_only_auroc: Estimate
    input_repeats_auroc: Estimate
    baselines: dict[str, Estimate] = Field(description="accuracy and AUROC of `entropy` and `top_gap`")
    shuffled: Estimate = Field(description="accuracy with labels shuffled in the fit split")
    shuffled_by_layer: list[Estimate]
    minus_input_only: list[Estimate] = Field(description="paired difference per layer")
    minus_input_repeats: list[Estimate]
    offsets: list[int] = Field(description="tokens before the decision position")
    accuracy_by_offset: dict[str, list[Estimate]]
    auroc_by_offset: dict[str, list[Estimate]]
    best_by_offset: dict[str, BestLayer]

    @computed_field(description="by the interval of `best.minus_input_only`")
    def beats_input_only(self) -> Verdict:
        return VERDICTS[self.best.minus_input_only.sign]

    @computed_field(description="likewise")
    def beats_input_repeats(self) -> Verdict:
        return VERDICTS[self.best.minus_input_repeats.sign]

    @computed_field(description="first offset surely above `chance` and either input; NaN: none")
    def known_from(self) -> dict[str, float]:
        """The earliest offset at which the interval lies above; later ones may know less."""
        above = {"chance": [offset for offset, best in self.best_by_offset.items() if best.accuracy.low > 0.5]}
        for kind in ("input_only", "input_repeats"):
            above[kind] = [k for k, best in self.best_by_offset.items() if getattr(best, f"minus_{kind}").low > 0]
        return {what: max(map(float, offsets), default=math.nan) for what, offsets in above.items()}


class Learning(Result):
    """What fewer fit pairs give: mean and range over draws (of all seeds). Keys: number of pairs, or `all`."""

    picked: list[int] = Field(description="the layer")
    pairs: dict[str, float]
    accuracy: dict[str, Estimate]
    nmd_cosine: dict[str, Estimate] = Field(description="to the NMD of all pairs, all layers")
    nmd_cosine_at_layer: dict[str, Estimate]


class Halves(Result):
    """Two halves of the fit pairs: mean and range over halvings (of all seeds), no confidence interval.

    ``chance`` and its ends are those of a permutation, their means over halvings and seeds.
    """

    halvings: int
    rho_rank_correlation: list[Estimate] = Field(description="per layer")
    nmd_cosine: list[Estimate] = Field(description="per layer")
    nmd_cosine_all: Estimate
    overlap: dict[str, dict[Shared, Estimate]] = Field(description="of the strongest neurons, by their share of all")


class Push(Result):
    """What the vector's mean effect on the margin would do alone."""

    method: str
    push: Estimate = Field(description="mean effect of the best vector on the margin, nats")
    shift: Estimate = Field(description="pairs that this push alone would shift")
    vector: Estimate = Field(description="pairs whose margin the vector shifts")
    vector_minus_logit: Estimate


class Ablated(Result):
    """Separation of a pair's sides: margin of the generalized side minus that of the memorized one, nats."""

    before: Estimate
    after: Estimate
    lost: Estimate
    kept: dict[str, Estimate] = Field(description="share that keeps its behaviour, by side")


class Ablation(Result):
    """Neurons held at their mean, by method, direction and share of the neurons."""

    vector: Ablated
    random_neurons: Ablated
    minus_random: Estimate = Field(description="paired difference of `lost`")


class Detection(Result):
    """The detector on test prompts."""

    auroc: dict[str, Estimate] = Field(description="of `p_memorized` and its baselines, without `other`")
    other: Estimate | None = Field(None, description="share of test conflicts that `auroc` leaves out")
    by_family: dict[str, dict[str, Estimate | int]] = Field(description="with counts; NaN below 30 of either behaviour")
    held_out: dict[str, dict[str, Estimate]]
    reliability: list[Bin] = Field(description="five bins of P(memorized): its mean, the share memorized")
    brier: Estimate = Field(description="mean squared error of P(memorized)")
    unlike: dict[str, Estimate] = Field(description="share unlike the fit prompts, by list")
    readable_from: float = Field(description="median of the first layer that is sure of the verdict")
    gate: Estimate | None = Field(None, description="AUROC of the detector at or below the first shifted layer")
    given_up: float | None = Field(None, description="AUROC of the detector less that of `gate`")


class CellResults(Result):
    """One cell."""

    training: dict[Literal["seconds", "steps"], float | int | list[float | int]] = Field(description="or one a seed")
    behaviour: Behaviour
    pairs: Pairs
    contrast: Contrasts
    probe: Probe
    learning: Learning
    consistency: dict[Literal["halves"], Halves]
    steering: dict[Direction, Steered] = Field(description="the best method by the tune split")
    steering_by_method: dict[str, dict[Direction, Steered]]
    equal_norm: dict[Direction, dict[str, dict[str, AtNorm]]] = Field(description="by strength and method")
    unpenalized: dict[Direction, AtNorm] = Field(description="NMD as in the paper: whatever its controls do")
    logit: dict[Direction, Push]
    dose: dict[str, dict[Direction, dict[str, dict[str, Dose]]]] = Field(description="keys: see Dose")
    ablation: dict[str, dict[Direction, dict[str, Ablation]]] = Field(description="keys: see Ablation")
    patch: dict[Direction, dict[str, list[Shares]]] = Field(description="by site, per layer: the other side's state")
    prompt: dict[Direction, Shares] = Field(
        description="the aim's test examples asked for in words; empty where the task has none"
    )
    context_aware: dict[Direction, dict[str, Shares]] = Field(
        description="the same examples by context-aware decoding, by weight"
    )
    detection: Detection | None = Field(None, description="only with a detector")
    no_detector: str | None = Field(None, description="why none could be fitted")
    neutral: dict[Direction, dict[str, dict[str, Estimate]]] | None = Field(None, description="by dose, nats a token")


class SweepRow(Result):
    """A setting and a list of the tune split, over the seeds that tried it; no interval within a seed."""

    direction: Direction
    method: str
    site: str
    layers: str = Field(description="such as `0-3` or `2`")
    top: float
    strength: float
    examples: str
    shift: Estimate | None = Field(None, description="`shift` to `margin_sd`: of `pairs` and `conflict`")
    stay: Estimate | None = None
    other: Estimate | None = None
    margin: Estimate | None = Field(None, description="mean decision margin, nats")
    margin_sd: Estimate | None = None
    kept: Estimate | None = Field(None, description="of the other lists: share that keeps its answer")
    seeds: int = Field(description="seeds that tried it")


class OneLayer(Result):
    """Shifts of one layer alone, all at one strength, the best share of neurons."""

    strength: float = Field(description="NaN where no strength was tried by all methods")
    methods: dict[str, dict[str, list[Estimate]]] = Field(description="share shifted by method and site, per layer")


class ByLayer(Result):
    """Where the difference is, and where a shift acts."""

    layers: list[int]
    mean_abs_nmd: list[float]
    max_abs_rho: list[float]
    shift: dict[Direction, OneLayer]


class TaskResults(CellResults):
    """One label over its seeds: estimates over seeds, counts added up, other numbers averaged."""

    seeds: list[int]
    aim: Aim = Field("pairs", description="what the vectors that are used are for")
    memory_is_conflict: bool = Field(description="whether the memory examples are the conflicts themselves")
    weights: str | None = Field(None, description="of a packaged model")
    sweep: list[SweepRow]
    by_layer: ByLayer
    chosen_by_seed: dict[str, dict[Aim, dict[Direction, str]]] = Field(description="the best method of each seed")
    per_seed: dict[str, CellResults] = Field(description="the same of each seed")


class SeedsRow(Result):
    """How alike two seeds are: mean and range over all twos of seeds, beside chance."""

    site: str
    shared_initialization: bool
    what: str = Field(
        description="`overlap`, `overlap_in_layers`, `rank_correlation` or `aligned_cosine`, see records/seeds.parquet"
    )
    layer: int = Field(description="-1: all")
    top: float
    value: Estimate
    chance: Estimate
    twos: int


class Transfer(Result):
    """What one label teaches, tried on another that shares its model."""

    to_generalized: dict[str, Carried] | None = Field(None, description="by method: `shift`, and Gaussian shifts")
    to_memorized: dict[str, Carried] | None = None
    probe: Estimate | None = Field(None, description="accuracy at the layer that reads the tune split best at home")
    probe_layer: float | None = Field(None, description="that layer, mean over seeds")
    probe_by_layer: list[Estimate] | None = None


class Results(Result):
    """The whole file."""

    version: int = Field(1, alias="schema")
    study: str
    left_out: str = Field("", description="what a fit did without, to keep to its budget")
    tasks: dict[str, TaskResults]
    failed: dict[str, str] = Field(description="why a cell could not go on, by its name")
    seeds: dict[str, list[SeedsRow]] = Field(description="by label; empty with a single seed")
    transfer: dict[str, dict[str, Transfer]] = Field(description="by source and target; empty without a shared model")
