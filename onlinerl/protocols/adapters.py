"""Low-rank adapters as they are configured."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ALL_LINEAR = "all-linear"


def _named(value: Any) -> Any:
    """A list of names: peft takes any other text for a regular expression, which is seldom meant."""
    if isinstance(value, str) and value != ALL_LINEAR:
        raise ValueError(f"one text is no list of names: write [{value}], or {ALL_LINEAR}")
    if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
        raise ValueError("the list is empty, or has a name twice")
    return value


class LoraConfig(BaseModel):
    """Low-rank adapters beside the weights of linear layers, which are then all that is trained: "LoRA: Low-Rank Adaptation of Large
    Language Models", arXiv:2106.09685, eq. 3. A layer computes W x + scaling * B A x with A [rank, in] and B [out, rank], B = 0 at first."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(16, ge=1)
    """Rows of A and columns of B (peft: r)."""
    alpha: float = Field(32.0, gt=0)
    """scaling = alpha / rank (peft: lora_alpha)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what A reads that is dropped, in training only (peft: lora_dropout)."""
    target_modules: Annotated[list[str] | str, BeforeValidator(_named)] = Field(
        ALL_LINEAR, description="a list of linear layers, or all-linear", examples=["[q_proj, v_proj]"]
    )
    """Names of linear layers, whole or their last part, as in peft; `all-linear` is every one but the output matrix."""
    use_rslora: bool = False
    """scaling = alpha / sqrt(rank): "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732."""

    @property
    def scaling(self) -> float:
        """Of B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
