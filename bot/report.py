"""The report of a build before anything is built: what the recipe and the headers of its sources say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from evals.results import CardText, ExpertUsed, FindingSaid, ReleaseWanted, Report, SourceUsed
from merge import __version__
from merge import findings as f
from merge.plan import MergePlan
from merge.recipe import LoadedRecipe

# Numbers of config.json that describe the model's shape, and the first of its keys that has each.
SHAPE = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "intermediate_size"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
}


def planned_report(loaded: LoadedRecipe, plan: MergePlan, gates_key: str) -> Report:
    """Everything about a release that is known before it is built; files, quants and figures are still empty."""
    recipe = loaded.recipe
    return Report(
        name=plan.name,
        repo=recipe.release.repo,
        family=plan.family,
        family_title=plan.family_title,
        why_family=plan.why_family,
        moerge_version=__version__,
        recipe_text=loaded.text,
        recipe_identity=recipe.identity(),
        recipe_files=recipe.files,
        gate_mode=plan.gate_mode,
        gates_key=gates_key,
        dtype=plan.config["torch_dtype"],
        parameters=asdict(plan.parameters),
        shape=shape_of(plan.config),
        experts_per_token=plan.experts_per_token,
        shared_experts=int(plan.has_shared),
        context_length=plan.config["max_position_embeddings"],
        license=plan.license,
        license_stated=recipe.release.license is not None,
        license_name=recipe.release.license_name,
        license_link=recipe.release.license_link,
        language=recipe.release.language,
        tags=recipe.release.tags,
        title=recipe.card.title,
        description=recipe.card.description,
        card=CardText(
            image=recipe.card.image,
            sections=dict(recipe.card.sections or {}),
            order=recipe.card.order or (),
            sponsor=recipe.card.sponsor,
        ),
        private=recipe.release.private,
        version=recipe.release.version,
        release=ReleaseWanted(
            private_first=recipe.release.private_first,
            gated=recipe.release.gated,
            collection=recipe.release.collection,
            replaces=recipe.release.replaces,
            create_pr=recipe.release.create_pr,
        ),
        copied_bytes=plan.copied_bytes,
        tensor_bytes=plan.checkpoint_bytes,
        base=plan.sources[plan.base].name,
        sources=tuple(
            SourceUsed(
                name=source.name,
                commit=source.commit,
                fingerprint=source.fingerprint,
                license=source.license,
                tensors=len(source.tensors or {}),
                unused_tensors=len(plan.unused[key]),
                unused=_without_layers(plan.unused[key]),
                files=dict(source.sha256),
            )
            for key, source in plan.sources.items()
        ),
        experts=(
            *(
                ExpertUsed(plan.sources[plan.base].name, None, (), (), number=number, kept=True)
                for number in range(plan.kept_experts)
            ),
            *(
                ExpertUsed(
                    source=plan.sources[key].name,
                    role=expert.role,
                    positive_prompts=expert.positive_prompts,
                    negative_prompts=expert.negative_prompts,
                    noise_scale=expert.noise_scale,
                    residual_scale=expert.residual_scale,
                    number=expert.expert,
                )
                for key, expert in zip(plan.experts, recipe.experts, strict=True)
            ),
        ),
        files=(),
        quants=(),
        findings=tuple(map(said, plan.findings)),
    )


def shape_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The model's shape in numbers: layers, widths, heads, vocabulary."""
    found = {}
    for name, keys in SHAPE.items():
        value = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
        if value is not None:
            found[name] = value
    if "head_dim" not in found and "hidden" in found and found.get("heads"):
        found["head_dim"] = found["hidden"] // found["heads"]
    return found


def said(finding: f.Finding) -> FindingSaid:
    """A finding as the report keeps it."""
    return FindingSaid(finding.id, finding.level, finding.text, finding.line)


def _without_layers(names: Iterable[str]) -> dict[str, int]:
    """How many tensors of each name there are, the numbers in it (layers, experts) being `*`."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
