"""Routers of a mixture that gets more experts: its own rows stay, and new rows of the same length stand behind them.

A router compares the numbers of its rows, so a row's length says how loudly its expert asks for tokens. The modes that make rows
from prompts have lengths of their own (one, mostly), which would never or always win against the rows of a router that was
trained or calibrated otherwise; the mean length of the layer's own rows is the neutral choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from merge.expr import Cast, Read, nbytes
from merge.plan import MergePlan
from merge.source_files import Files, fill
from merge.stored import exact

Rows = npt.NDArray[np.float32]


def kept_rows(plan: MergePlan, files: Mapping[str, Files]) -> dict[int, Rows]:
    """By layer, the router's rows of the experts that the base has already: (kept experts, hidden). None for a dense base."""
    found = {}
    for layer, x in plan.kept_routers.items():
        read = x.x if isinstance(x, Cast) else x
        assert isinstance(read, Read)
        raw = memoryview(bytearray(nbytes(read)))
        fill(files, read, raw, 0)
        found[layer] = exact(raw, read.dtype).reshape(read.shape)
    return found


def with_kept(kept: Rows, new: Rows) -> Rows:
    """The rows of a layer's router: `kept` (K, H) as they are, behind them `new` (E, H), each as long as those are on average."""
    length = np.linalg.norm(kept.astype(np.float64), axis=1).mean()
    own = np.linalg.norm(new.astype(np.float64), axis=1, keepdims=True)
    scaled = new * (length / np.maximum(own, np.finfo(np.float32).tiny))
    return np.concatenate([kept, scaled.astype(np.float32)])
