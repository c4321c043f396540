"""A router in closed form: a ridge regression from router inputs to experts, without bias.

With X (n, H) the router's inputs, one row per token, and Y (n, E) what each token should go to, centred over the experts,

    W = argmin  sum_i w_i |W x_i - y_i|^2  +  lambda m |W|^2,        m = tr(X' D X) / H,  D = diag(w)

which for one-hot Y is Fisher's linear discriminant up to a scale (Hastie, Tibshirani, Friedman, The Elements of Statistical
Learning, 4.2 and exercise 4.2). Without centring X: the activations' large common direction serves as the bias that routers
do not have. The use of ridge regression for routers: DUME, https://arxiv.org/abs/2603.29765.

lambda and the scale of the logits are chosen on held-out prompts. Leaving out a prompt needs no new fit: with the hat matrix
A = X (X' D X + lambda m I)^-1 X' D, the residuals of the rows of prompt g, left out, are (I - A_gg)^-1 (Y_g - A_g Y)
(the block form of the leave-one-out formula, Cook and Weisberg, Residuals and Influence in Regression, 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge.gates.figures import LayerFigures, layer_figures
from merge.gates.singular import Wide, decomposed

# Candidates for lambda; m makes them the same for every layer and model.
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Where there is nothing to hold out.
DEFAULT_RIDGE = 1.0
# The best expert's mean weight on held-out tokens stays below this: a saturated router is deaf to doubt.
MAX_TOP_WEIGHT = 0.95
# How far apart the logits of the experts that share a pinned input and of the others are: more than rounding could make up for.
APART = 1.0
# Bounds of the scale of the logits, whose targets differ by 1 between experts.
SCALES = (1e-2, 1e3)
# Hat matrices of a held-out prompt, one for each lambda, are made together up to this many elements: 128 MB in float64.
HAT_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Rows:
    """What a router is fitted on, beside its inputs: for each of n tokens

    `target` (n, E) how much of it should go to each expert, rows summing to 1; `weight` (n,), summing to 1; `group` (n,)
    the prompt it comes from, which is held out as a whole; `own` (n,) its expert, or -1 for text that is only not
    some expert's.
    """

    target: torch.Tensor
    weight: torch.Tensor
    group: torch.Tensor
    own: torch.Tensor
    can_hold_out: bool

    def figures(self, logits: torch.Tensor) -> LayerFigures:
        """What a router with these logits (n, E) does with the tokens that have an expert."""
        counted = self.own >= 0
        weight = self.weight[counted].double()
        return layer_figures(logits.cpu().double()[counted], self.own[counted], weight / weight.sum())


@dataclass(frozen=True)
class Fit:
    """A layer's router `gate` (E, H), float32, with `ridge` and `scale`, and what it does with the tokens it was tried on:
    `logits` (n, E), float32, of every row, as if the row's prompt had had no part in the fit where prompts can be held out,
    and the `figures` of those that have an expert."""

    gate: torch.Tensor
    ridge: float
    scale: float
    logits: torch.Tensor
    figures: LayerFigures


def fit_router(
    x: torch.Tensor,
    rows: Rows,
    ridge: float | None = None,
    softness: float = 1.0,
    pin: tuple[torch.Tensor, Sequence[int]] | None = None,
    device: torch.device | None = None,
) -> Fit:
    """The router of one layer from its inputs `x` (n, H). `ridge` fixes lambda instead of choosing it; the scale at which
    the experts' weights are the most likely is multiplied by `softness`. `pin` is an input b (H,), and the experts that are to
    share it: among the routers that send it there, the one that minimises the same is taken. The arithmetic is done on
    `device` (by default where x is), which needs no room for x: a few matrices of min(n, H) x H in float64."""
    device = x.device if device is None else device
    weights = rows.weight.to(device, torch.double)
    root = weights.sqrt()[:, None]  # (n, 1)
    experts = rows.target.shape[1]
    y = (rows.target.to(root) - 1 / experts) * root  # (n, E)
    inputs = decomposed(x, root)
    s2 = inputs.s2  # (r,)
    mean = float(s2.sum()) / x.shape[1]  # m
    uy = inputs.onto_left(y)  # (r, E)
    counted = rows.own.to(device) >= 0
    own, weight = rows.own.to(device)[counted], weights[counted]
    weight = weight / weight.sum()
    candidates = [ridge] if ridge is not None else RIDGES if rows.can_hold_out else [DEFAULT_RIDGE]
    damping = torch.tensor(candidates).to(s2) * mean  # lambda m: (C,) of them
    shrink = s2 / (s2 + damping[:, None])  # (C, r)
    predicted = inputs.from_left(shrink[:, :, None] * uy)  # (C, n, E)
    if rows.can_hold_out:
        predicted = y - _held_out_residuals(inputs, shrink, y - predicted, rows.group.to(device))
    tried = predicted / root  # logits before scaling
    scales = _fit_scales(tried[:, counted], own, weight)  # (C,)
    log_p = torch.log_softmax(scales[:, None, None] * tried[:, counted], 2)
    likelihood = log_p[:, torch.arange(len(own)), own] @ weight  # (C,)
    best = int(likelihood.argmax())
    chosen, scale, z = candidates[best], float(scales[best]), tried[best]
    scale *= softness
    w = scale * inputs.to_right(uy / (s2 + chosen * mean)[:, None]).T  # (E, H)
    z = scale * z
    if pin is not None and bool(pin[0].any()):  # an input of zeros, an untrained BOS for one, goes nowhere
        # With A = X' D X + lambda m I the nearest W' with W' b = z is W + (z - W b) c', c = A^-1 b / (b' A^-1 b).
        b = pin[0].to(s2)
        c = b - inputs.to_right(inputs.from_right(b) / (s2 + chosen * mean))  # lambda m A^-1 b
        c, change = c / (b @ c), _shared_by(pin[1], w @ b) - w @ b  # (H,), (E,)
        w, z = w + change[:, None] * c, z + (inputs.times(c) / root[:, 0])[:, None] * change
    logits = z.float().cpu()
    return Fit(w.float().cpu(), chosen, scale, logits, rows.figures(logits))


def _held_out_residuals(
    inputs: Wide, shrink: torch.Tensor, residuals: torch.Tensor, group: torch.Tensor
) -> torch.Tensor:
    """What the residuals (C, n, E) of fits with `shrink` (C, r) would be, had each group of rows been left out of the fit."""
    out = torch.empty_like(residuals)
    for g in range(int(group.max()) + 1):
        rows = (group == g).nonzero()[:, 0]  # (n_g,)
        u = inputs.left(rows)  # (n_g, r)
        parts = max(1, -(-len(shrink) * len(rows) ** 2 // HAT_ELEMENTS))
        for fits in torch.arange(len(shrink), device=rows.device).chunk(parts):
            hat = (u * shrink[fits, None]) @ u.T  # (c, n_g, n_g)
            place = fits[:, None], rows
            # Positive definite, since each shrink is below 1.
            factor = torch.linalg.cholesky(torch.eye(len(rows)).to(hat) - hat)
            out[place] = torch.cholesky_solve(residuals[place], factor)
    return out


def _shared_by(experts: Sequence[int], z: torch.Tensor) -> torch.Tensor:
    """The nearest logits to `z` (E,) with which these experts share a token: equal, and at least APART above the others."""
    theirs = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    theirs[list(experts)] = True
    # By their common value, of which the distance is a convex function; in floats, as it is a few numbers, many times.
    pairs = list(zip(z.tolist(), theirs.tolist(), strict=True))
    low, high = min(x for x, _ in pairs), max(x for x, _ in pairs) + APART

    def distance(t: float) -> float:
        return math.fsum((t - x if mine else max(0.0, x - (t - APART))) ** 2 for x, mine in pairs)

    for _ in range(50):
        third = (high - low) / 3
        left, right = low + third, high - third
        low, high = (low, right) if distance(left) < distance(right) else (left, high)
    return torch.where(theirs, torch.full_like(z, low), z.clamp(max=low - APART))


def _fit_scales(z: torch.Tensor, own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """For each of C fits with predictions `z` (C, n, E) the scale t that makes softmax(t z) most likely for `own`: (C,). The
    likelihood is concave in t, so by bisection.

    At most the one at which the best expert's mean weight is MAX_TOP_WEIGHT.
    """
    reached = z[:, torch.arange(len(own)), own] @ weight  # the likelihood's slope is this minus the expected logit
    z = z.transpose(1, 2).contiguous()  # (C, E, n): faster by far
    low, high = torch.full_like(reached, SCALES[0]), torch.full_like(reached, SCALES[1])
    for _ in range(24):  # to a relative error of 1e-6
        middle = (low * high).sqrt()
        p = torch.softmax(middle[:, None, None] * z, 1)
        too_large = ((p * z).sum(1) @ weight > reached) | (p.amax(1) @ weight > MAX_TOP_WEIGHT)
        low, high = torch.where(too_large, low, middle), torch.where(too_large, middle, high)
    return low


def rows_of(experts: int, sets: Sequence[tuple[int, bool]], tokens: Sequence[int], groups: Sequence[int]) -> Rows:
    """Targets, weights and groups of the tokens of many texts.

    `sets[i]` is text i's expert and whether it is the expert's own text, `tokens[i]` how many tokens it has, `groups[i]`
    what it is held out with. Each expert's own texts, and each one's negative ones, weigh the same in all. Text that is not
    an expert's is the others': its target is spread over them.
    """
    owner = torch.tensor([expert for (expert, _), n in zip(sets, tokens, strict=True) for _ in range(n)])
    positive = torch.tensor([own for (_, own), n in zip(sets, tokens, strict=True) for _ in range(n)])
    group = torch.tensor([g for g, n in zip(groups, tokens, strict=True) for _ in range(n)])
    one_hot = torch.nn.functional.one_hot(owner, experts).double()  # (n, E)
    target = torch.where(positive[:, None], one_hot, (1 - one_hot) / max(1, experts - 1))
    kind = owner * 2 + positive.long()
    weight = 1 / torch.bincount(kind).double()[kind]
    own = torch.where(positive, owner, -1)
    # Left out must be some of an expert's text, never all of it.
    parts = {e: set(group[own == e].tolist()) for e in range(experts)}
    can_hold_out = experts > 1 and all(len(found) > 1 for found in parts.values())
    return Rows(target, weight / weight.sum(), group, own, can_hold_out)
