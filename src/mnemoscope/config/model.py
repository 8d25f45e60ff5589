"""Configuration of a model and of its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Data that validate, do not change and know no other fields; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def as_several(value: Any) -> Any:
    """One value where several are allowed."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class LayoutConfig(Frozen):
    """Where a model keeps its parts, as attribute paths."""

    blocks: str = Field(description="the list of blocks, from the model's root")
    attention: str = Field(description="inside a block: what attention adds")
    mlp: str = Field(description="inside a block: what the MLP adds")
    down: str = Field("", description="inside a block: the down projection; empty where there is no single one")


class LoraConfig(Frozen):
    """An adapter (LoRA) in which a trained model learns the task; its own weights stay as they are."""

    rank: int = Field(16, ge=1, le=4096, description="of the product that is added to each weight matrix")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what the adapter reads, while it is trained")
    target_modules: Annotated[tuple[str, ...], BeforeValidator(as_several)] = Field(
        ("all-linear",), min_length=1, description="adapted layers by name; all-linear: every linear layer but the head"
    )


class ChatConfig(Frozen):
    """Prompts are formatted by the chat template of the tokenizer."""

    system: str | None = Field(None, description="content of the system message; null leaves it to the template")
    reply: str = Field("", description="how every reply begins; the model continues it")


class ModelConfig(Frozen):
    """A GPT-2 to train from scratch, or the folder of a trained model."""

    folder: str | None = Field(None, description="folder or hub id of a trained model; trained only with lora")
    lora: LoraConfig | None = Field(None, description="adapter in which the model of folder learns; {}: defaults")
    opened: str | None = Field(None, description="digest of the weights of an open model; only `fit` sets it")
    cell: str | None = Field(None, description="another cell of the study, whose model of the same seed is used")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="precision of a trained model's weights; auto: as they were saved"
    )
    device_map: str | None = Field(None, description="device of a trained model: cpu, cuda or auto; needs accelerate")
    layout: LayoutConfig | None = Field(None, description="where the parts of a trained model of no known family are")
    chat: ChatConfig | None = Field(None, description="for a chat model: {} formats prompts by its chat template")
    initialization: int | None = Field(None, ge=0, description="seed of the first weights; default: the cell's")
    jitter: float = Field(0.0, ge=0, le=0.01, description="noise on first weights, relative: as another rounding")
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
        if self.device_map and not self.folder:
            raise ValueError("device_map places a trained model; give its folder or hub id as folder, or leave it out")
        if self.chat and (self.lora or not (self.folder or self.opened)):
            raise ValueError("chat formats prompts of a trained model as it is; give its folder, and no lora")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether a cell trains its model: from scratch, or an adapter in a trained one."""
        return not (self.cell or self.opened) and (self.lora is not None or not self.folder)

    @property
    def shares_first_weights(self) -> bool:
        """Whether the models of all seeds begin with the same weights; those of an adapter are a small part."""
        return self.initialization is not None or bool(self.folder or self.opened)


class StopConfig(Frozen):
    """When both behaviours are there, on the tune split; trainings from scratch ask for it beyond 95 % intervals."""

    novel_accuracy: float = Field(0.95, ge=0, le=1, description="accuracy on novel examples, at least")
    recall: float = Field(0.93, ge=0, le=1, description="accuracy on memory examples, at least")
    conflict_each: float = Field(0.25, ge=0, le=0.5, description="share of conflicts answered each way, at least")
    conflict_other: float = Field(0.10, ge=0, le=1, description="share of conflicts answered neither way, at most")


class HoldConfig(Frozen):
    """Hold the mixture of both behaviours while a model trains: a PI controller moves an option of the task."""

    dial: str = Field("memorized_share", description="the option that is moved, a share")
    target: float = Field(0.5, gt=0, lt=1, description="share of the memorized among conflicts that are answered")
    proportional: float = Field(
        1.0, ge=0, le=10, description="log odds that the dial moves by distance from the target"
    )
    integral: float = Field(0.2, ge=0, le=10, description="the same of the sum of all distances so far")
    learned: float = Field(0.9, ge=0, le=1, description="novel accuracy from which on distances count")


class TrainingConfig(Frozen):
    """How a model is trained: from scratch, or in an adapter by the Trainer of transformers."""

    steps: int = Field(1000, ge=1, description="optimizer steps, at most")
    attempts: int = Field(1, ge=1, le=20, description="trainings, with new weights and data, before it is given up")
    give_up_at: int | None = Field(None, ge=1, description="step from which novel accuracy below 0.7 ends an attempt")
    decay_steps: int = Field(0, ge=0, description="last steps, over which the learning rate falls to 2 %")
    batch_size: int = Field(64, ge=1, le=65536, description="instances a step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of training passes; auto: bfloat16 where the hardware multiplies it (see `cell.json`)"
    )
    learning_rate: float = Field(3e-3, gt=0, le=1, description="its peak")
    weight_decay: float = Field(0.1, ge=0, le=10, description="of the matrices inside the blocks, or of the adapter")
    averaged: int = Field(
        40, ge=1, description="steps over which the weights that are kept are averaged (exponentially)"
    )
    warmup_steps: int = Field(50, ge=0, description="steps over which the learning rate rises")
    prompt_weight: float = Field(1.0, ge=0, le=1, description="weight of a prompt token in the loss")
    evaluate_every: int = Field(50, ge=1, description="steps between two measurements of the behaviours")
    evaluation_examples: int = Field(200, ge=8, description="examples of each kind that are measured")
    evaluation_most: int = Field(1600, ge=8, description="of each kind, where the stop rule needs a narrower interval")
    stop: StopConfig = StopConfig()
    hold: HoldConfig | None = Field(None, description="holds the mixture of a training from scratch; {}: defaults")
