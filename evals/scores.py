"""What evaluations found, as plain values: benchmark scores, perplexities, samples. No torch, no harness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

# Where a score comes from: run by this build; read from a file that lm-eval wrote elsewhere; said by somebody.
Origin = Literal["measured", "imported", "reported"]
HARNESS = "lm-evaluation-harness"


@dataclass(frozen=True)
class Score:
    """One figure of one benchmark. `value` is in percent where the metric is a share.

    `task` is the harness's name of it (empty where somebody reported it), `dataset`, `config` and `split` are the Hub's,
    `harness` is the program with its version, `date` is YYYY-MM-DD,
    `details_url` is where each answer can be read.
    """

    title: str
    metric: str
    value: float
    origin: Origin
    task: str = ""
    dataset: str = ""
    config: str | None = None
    split: str | None = None
    shots: int | None = None
    metric_name: str | None = None
    stderr: float | None = None
    samples: int | None = None
    harness: str | None = None
    task_version: str | None = None
    date: str | None = None
    source_name: str | None = None
    source_url: str | None = None
    details_url: str | None = None


@dataclass(frozen=True)
class TextLoss:
    """One model on one text: the mean loss in nats per token, and how many tokens were predicted."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class ModelLosses:
    """One model on every text, in the texts' order: `role` is `mixture`, `base` or `expert`; None where the model's own
    tokenizer cuts the text otherwise, so that the figures could not be compared."""

    name: str
    role: Literal["mixture", "base", "expert"]
    losses: tuple[TextLoss | None, ...]

    @property
    def mean(self) -> float | None:
        """The mean of its losses over all texts; None where one is missing."""
        known = [loss.loss for loss in self.losses if loss is not None]
        return sum(known) / len(known) if known and len(known) == len(self.losses) else None


@dataclass(frozen=True)
class Perplexities:
    """Perplexity on the recipe's texts: the mixture beside the dense models it was made from."""

    texts: tuple[str, ...]
    models: tuple[ModelLosses, ...]
    date: str

    @property
    def best_source(self) -> ModelLosses | None:
        """The best of the dense models over all texts."""
        dense = [(model.mean, model) for model in self.models if model.role != "mixture" and model.mean is not None]
        return min(dense, key=lambda pair: pair[0])[1] if dense else None

    @property
    def ratio(self) -> float | None:
        """The mixture's perplexity over all texts, over that of the best dense model."""
        mixture = next((model.mean for model in self.models if model.role == "mixture"), None)
        best = self.best_source.mean if self.best_source else None
        return None if mixture is None or best is None else math.exp(mixture - best)


@dataclass(frozen=True)
class ModelSample:
    """What the released model wrote after a prompt, greedily and with a seed. No chat template was used."""

    prompt: str
    greedy: str
    sampled: str
    seed: int
    temperature: float
    top_p: float
    tokens: int


@dataclass(frozen=True)
class PreviousRelease:
    """What the release before said of itself. `label` is its tag."""

    label: str
    recipe_identity: str
    scores: tuple[Score, ...] = ()
    perplexities: Perplexities | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    quants: dict[str, int] = field(default_factory=dict)
