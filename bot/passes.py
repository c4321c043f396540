"""What reads the sources before the first file of a bounded build is made, and after the last: pass by pass, from headers.

A pass reads models from the first layer to the last. What does not fit in the room goes again, and is fetched again by the next
pass; what came first stays (`merge.ranged`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge.errors import UsageError
from merge.expr import reads
from merge.plan import MergePlan
from merge.ranged import RECENT, Key, bytes_of
from merge.recipe import DISCRIMINANT, RANDOM_GATES, LoadedRecipe
from quants.layout import wants_imatrix

# The mode that reads the embedding and nothing else of the base, and its name.
EMBEDDED, EMBEDDING = "cheap_embed", "model.embed_tokens.weight"
# A prompt of so many words has as many tokens: no text is written from it (merge.gates.expansion.SHORT).
LONG = 7


def by_layer(plan: MergePlan) -> bool:
    """Whether the router is calibrated while the files are written: the dense base makes it, layer by layer, and nothing reads
    the merged model before."""
    dense = plan.gate_mode not in (DISCRIMINANT, *RANDOM_GATES) and not plan.kept_experts
    return dense and not wants_imatrix(plan.quants)


def passes_before(plan: MergePlan) -> list[list[Key]]:
    """The passes of the router's calibration and of the importance matrix: the source tensors that each reads, in order."""
    passes: list[list[Key]] = []
    if plan.gate_mode == DISCRIMINANT:
        if plan.experts_whole:  # each writes text from its own prompts
            passes += [_all_of(plan, *model) for model in plan.models]
        if not plan.kept_experts:  # the base writes text, and is what the router is compared with
            passes.append(_all_of(plan, plan.base))
        if len(plan.experts) > plan.experts_per_token:  # which of them get the BOS is tried on the merged model
            passes.append(_made(plan))
        passes.append(_made(plan))
    elif plan.gate_mode not in RANDOM_GATES and not by_layer(plan):
        passes.append([(plan.base, EMBEDDING)] if plan.gate_mode == EMBEDDED else _all_of(plan, plan.base))
    return [*passes, _made(plan)] if wants_imatrix(plan.quants) else passes


def passes_after(plan: MergePlan) -> list[list[Key]]:
    """The passes that measure what each expert is worth, where the recipe asks for it."""
    if not plan.measures_worth:
        return []
    return [_all_of(plan, plan.base), _made(plan), *(_all_of(plan, *model) for model in plan.models)]


def read(plan: MergePlan, passes: Sequence[list[Key]], room: int) -> tuple[frozenset[Key], int, int]:
    """What `passes` leave here in a room of so many bytes; how much disk they take, and how much they download."""
    held: dict[Key, int] = {}
    peak = download = 0
    for keys in passes:
        sizes = {key: bytes_of([key], plan.sources) for key in keys}
        left = room - RECENT * max(sizes.values(), default=0) - sum(held.values())
        for key, size in sizes.items():
            if key in held:
                continue
            download += size
            if size <= left:  # the others come and go
                held[key] = size
                left -= size
        whole = sum(size for key, size in sizes.items() if key not in held) + sum(held.values())
        peak = max(peak, min(room, whole))
    return frozenset(held), peak, download


def check_expansion(loaded: LoadedRecipe, plan: MergePlan, prompts: Iterable[str], room: int) -> None:
    """Raise UsageError where text is to be written from short ones of the `prompts` by a model that does not stay here: it is
    read once a token."""
    expand = loaded.recipe.router.expand
    short = next((prompt for prompt in prompts if len(prompt.split()) < LONG), None)
    if plan.gate_mode != DISCRIMINANT or expand is False or short is None:
        return
    writers = [model for model in plan.models if expand == "experts"] or [(plan.base, None)]
    largest = max(bytes_of(_all_of(plan, *writer), plan.sources) for writer in writers)
    if largest > room:
        raise UsageError(
            f"{plan.name}: text is written from short prompts (as {short!r}) by a model of {largest / 1e9:.1f} GB, which must "
            f"fit on the disk, and there is room for {room / 1e9:.1f} GB; give max_disk more, or longer prompts and router: "
            "{expand: false}"
        )


def _all_of(plan: MergePlan, *sources: str | None) -> list[Key]:
    return [(key, name) for key in sources if key for name in plan.sources[key].tensors or {}]


def _made(plan: MergePlan) -> list[Key]:
    return [(read.source, read.tensor) for tensor in plan.tensors for read in reads(tensor.expr)]
