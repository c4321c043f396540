"""What a build measured, as plain values: the content of report.json, and all that the cards are made from. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evals.scores import ModelSample, Perplexities, PreviousRelease, Score

if TYPE_CHECKING:
    from pydantic import TypeAdapter

REPORT = "report.json"


@dataclass(frozen=True)
class SourceUsed:
    """A source model, pinned: where its bytes came from, how many tensors it has, and how many of them nothing reads.
    `unused` names those, layers counted under one name with `*`: {"model.layers.*.self_attn.q_proj.weight": 32}. `files` are the SHA-256 of its files where the Hub tells them."""

    name: str
    commit: str | None
    fingerprint: str
    license: str | None
    tensors: int
    unused_tensors: int
    unused: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertUsed:
    """One expert of the result. `number` is its place, from 0, in a source that is a mixture of experts itself; `kept` ones were
    in the base already."""

    source: str
    role: str | None
    positive_prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    noise_scale: float | None = None
    residual_scale: float | None = None
    number: int | None = None
    kept: bool = False


@dataclass(frozen=True)
class FileMade:
    """A file of the release, by its name in the repository."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class QuantMade:
    """A GGUF file and how it was proven: `ran` means loaded in llama.cpp, which then generated `sample` from `prompt`;
    `structural` that all its blocks were checked, and a copy cut to its first layers loaded and run.

    A split file has `further_files`. `kl` (nats per token), `top1` (0 to 1) and `perplexity` are None where they were not
    measured."""

    file: FileMade
    type: str
    bits_per_weight: float
    seconds: float
    proof: str
    prompt: str
    sample: str
    sample_tokens: tuple[int, ...] = ()
    further_files: tuple[FileMade, ...] = ()
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None

    @property
    def files(self) -> tuple[FileMade, ...]:
        """All parts of it, the one that llama.cpp is given first."""
        return (self.file, *self.further_files)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class QuantFailed:
    """A GGUF file that was made and could not be proven, and why: it is not part of the release."""

    type: str
    reason: str


@dataclass(frozen=True)
class QuantsMeasured:
    """What the quants were measured with: the model's own perplexity on `tokens` tokens of the fixed text. All of it on
    the weights alone, the quants' turned back into numbers."""

    perplexity: float
    tokens: int


@dataclass(frozen=True)
class LayerRouting:
    """How well one layer's experts can be told apart: the condition number of the gate matrix (None: infinite), and the
    pair of experts (from 0) whose gate vectors have the largest cosine. Of a discriminant router the condition number says
    nothing, because its vectors sum to zero; it has the share of held-out tokens whose best expert is their own, and for
    which share each expert is the best."""

    layer: int
    condition: float | None
    cosine: float
    pair: tuple[int, int] | None
    accuracy: float | None = None
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerGroup:
    """The layers `first` to `last`; `goes_to[e][f]` is the share of expert e's held-out tokens whose best expert is f, mean
    over these layers."""

    first: int
    last: int
    goes_to: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RouterMeasured:
    """What a router does with held-out tokens, each expert's counting the same: the model's own (`discriminant`), or one for
    comparison on the same tokens (`hidden`, `random`).

    By layer: `accuracy`, the share of tokens whose best expert is their own; `load`, for which share each expert is the best;
    `entropy` of the experts' weights, in nats (even weights: the logarithm of their number); `top_weight`, the best expert's
    mean weight. Weights are of the softmax over all experts. `groups` has the confusion matrices.
    """

    router: str
    accuracy: tuple[float, ...]
    load: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]
    top_weight: tuple[float, ...]
    groups: tuple[LayerGroup, ...]


@dataclass(frozen=True)
class ExpertWorth:
    """Loss in nats per token on the text that an expert's row of the router is made from (`tokens` of it): of the base, of the
    expert as it is (`own`; None where it is from a mixture), and of the expert's MLPs with everything else the base's
    (`shared`), as this merge uses them. `expert` counts from 0."""

    expert: int
    tokens: int
    base: float
    own: float | None
    shared: float


@dataclass(frozen=True)
class FindingSaid:
    """A finding of the recipe at the time of the build."""

    id: str
    level: str
    message: str
    line: int | None


@dataclass(frozen=True)
class CardText:
    """What the recipe says about its card: an image beside it, its author's own sections (a text fills a section, false
    leaves it out, true puts it in), those that come first, and a word about who pays."""

    image: str | None = None
    sections: dict[str, str | bool] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    sponsor: str | None = None


@dataclass(frozen=True)
class ReleaseWanted:
    """What the recipe asks of the release beside its files: see `release:` in the recipe's schema."""

    private_first: bool = False
    gated: Literal["auto", "manual"] | None = None
    collection: str | None = None
    replaces: str | None = None
    create_pr: bool = False


@dataclass(frozen=True)
class Report:
    """Everything about one build."""

    name: str
    repo: str | None
    family: str
    family_title: str
    moerge_version: str
    recipe_text: str
    recipe_identity: str
    gate_mode: str
    gates_key: str
    dtype: str
    parameters: dict[str, int]
    experts_per_token: int
    context_length: int
    license: str | None
    license_name: str | None
    license_link: str | None
    language: tuple[str, ...]
    tags: tuple[str, ...]
    title: str | None
    description: str | None
    private: bool
    version: str | None
    base: str
    sources: tuple[SourceUsed, ...]
    experts: tuple[ExpertUsed, ...]
    files: tuple[FileMade, ...]
    quants: tuple[QuantMade, ...]
    routing: tuple[LayerRouting, ...] = ()
    written_prompts: tuple[dict[str, str | int], ...] = ()
    findings: tuple[FindingSaid, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    failed_quants: tuple[QuantFailed, ...] = ()
    imatrix: FileMade | None = None
    quants_measured: QuantsMeasured | None = None
    release: ReleaseWanted = ReleaseWanted()
    # Bytes of the checkpoint's tensors, and of those the ones that are a source's own, copied and not computed.
    copied_bytes: int = 0
    tensor_bytes: int = 0
    why_family: str = ""
    license_stated: bool = False
    # Numbers of config.json: layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary.
    shape: dict[str, int] = field(default_factory=dict)
    shared_experts: int = 0
    card: CardText = CardText()
    # Files beside the recipe that it names.
    recipe_files: tuple[str, ...] = ()
    # The model's own router first, then those it is compared with; empty where the gate mode is measured on nothing.
    routers: tuple[RouterMeasured, ...] = ()
    worth: tuple[ExpertWorth, ...] = ()
    scores: tuple[Score, ...] = ()
    perplexities: Perplexities | None = None
    samples: tuple[ModelSample, ...] = ()
    previous: PreviousRelease | None = None

    @property
    def gguf_files(self) -> tuple[FileMade, ...]:
        """Every file of the GGUF repository but its card."""
        files = tuple(file for quant in self.quants for file in quant.files)
        return (*files, self.imatrix) if self.imatrix else files

    def to_json(self) -> bytes:
        """report.json: the same bytes for the same report."""
        return _adapter().dump_json(self, indent=2) + b"\n"


@cache
def _adapter() -> TypeAdapter[Report]:
    """Made at its first use: it takes longer than everything else that a preview imports from here."""
    from pydantic import TypeAdapter

    return TypeAdapter(Report)


def read_report(path: Path) -> Report:
    """The report in a build's folder. Raises OSError where there is none, ValueError where it is not one."""
    return _adapter().validate_json(path.read_bytes())


def parse_report(data: bytes) -> Report:
    """A report's bytes. Raises ValueError where they are not one."""
    return _adapter().validate_json(data)
