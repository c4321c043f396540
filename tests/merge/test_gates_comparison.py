"""Routers are compared fairly: mergekit's is made without the prompt whose tokens it is asked of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge.evaluate import checkpoint_expressions
from merge.gates import ExpertPrompts, calibrate
from merge.gates.comparison import hidden_peer, random_peer
from merge.gates.figures import layer_figures
from merge.gates.prompts import Text, calibration_texts, load_tokenizer
from tests.merge.test_gates import EXPERTS, HIDDEN, LAYERS, SPECIAL, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), special=SPECIAL)


def hidden_gates(folder: Path, experts: list[ExpertPrompts]) -> torch.Tensor:
    tensors, config, evaluator = checkpoint_expressions(folder)
    gates = calibrate("hidden", experts, config, tensors, evaluator, folder, 0, device="cpu")
    return torch.stack([gates[layer] for layer in range(LAYERS)])  # (L, E, H)


def text_of(folder: Path, experts: list[ExpertPrompts], expert: int, prompt: int, positive: bool = True) -> Text:
    texts = calibration_texts(load_tokenizer(folder), experts, {}).texts
    return next(x for x in texts if (x.expert, x.prompt, x.positive) == (expert, prompt, positive))


@pytest.mark.parametrize(
    ("expert", "prompt", "without"),
    [
        (1, 0, ExpertPrompts(("x", "return x + 1"))),
        (2, 0, EXPERTS[2]),  # its only prompt stays: there would be no router
    ],
)
def test_a_prompt_is_left_out_of_the_router_that_its_tokens_are_tried_on(
    expert: int, prompt: int, without: ExpertPrompts, base: Path
) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)
    experts = list(EXPERTS)
    peer = hidden_peer(experts, experts, config, tensors, evaluator, base, "cpu")
    expected = hidden_gates(base, [without if e == expert else one for e, one in enumerate(experts)])
    text = text_of(base, experts, expert, prompt)
    found = torch.stack([peer(layer, text) for layer in range(LAYERS)])
    assert float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()) > 0.999
    if without != experts[expert]:
        whole = hidden_gates(base, experts)[:, expert]
        assert float(torch.nn.functional.cosine_similarity(found[:, expert], whole, dim=-1).min()) < 0.999


def test_text_that_no_prompt_of_the_recipe_is_meets_the_whole_router(base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)
    expanded = [*EXPERTS[:2], ExpertPrompts(("bonjour, written on", "by a model"), EXPERTS[2].negative)]
    peer = hidden_peer(EXPERTS, expanded, config, tensors, evaluator, base, "cpu")
    found = peer(1, text_of(base, expanded, 2, 1))
    whole = hidden_gates(base, list(EXPERTS))[1]
    assert float(torch.nn.functional.cosine_similarity(found, whole, dim=-1).min()) > 0.999


def test_the_random_router_is_the_one_of_gate_mode_random(base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)
    gates = calibrate("random", EXPERTS, config, tensors, evaluator, base, 7, device="cpu")
    peer = random_peer(LAYERS, 3, HIDDEN, 7)
    assert all(torch.equal(peer(layer, text_of(base, list(EXPERTS), 0, 0)), gates[layer]) for layer in gates)


def test_the_figures_are_those_of_a_router_worked_out_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.25, 0.25, 0.5]]).double()
    figures = layer_figures(p.log(), torch.tensor([0, 0, 2]), torch.tensor([0.25, 0.25, 0.5]).double())
    torch.testing.assert_close(
        torch.tensor(figures.goes_to), torch.tensor([[0.5, 0.5, 0.0], [0.0] * 3, [0.0, 0.0, 1.0]])
    )
    assert figures.accuracy == pytest.approx(0.75)
    assert figures.reach == pytest.approx((0.75, 1.0, 1.0))
    assert figures.top_weight == pytest.approx(0.25 * 0.7 + 0.25 * 0.5 + 0.5 * 0.5)
    assert figures.entropy == pytest.approx(float(-(p * p.log()).sum(1) @ torch.tensor([0.25, 0.25, 0.5]).double()))
