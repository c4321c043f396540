"""Random routers, and nothing but numpy to draw them: a merge that needs no arithmetic starts without torch.

The numbers are part of what a recipe means, so they must not change with a library's generator. The bits are SHAKE-256's, one
stream for each layer; a uniform number is 53 of them; a normal one is the inverse of the normal distribution at that, by
Wichura's algorithm AS 241 (Applied Statistics 37, 1988, routine PPND16: relative error 1e-16).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# AS 241's rational functions, highest power first: for |u - 1/2| <= 0.425, for r <= 5, and for the far tails.
CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def random_gates(mode: str, layers: int, rows: int, hidden: int, seed: int) -> dict[int, npt.NDArray[np.float32]]:
    """Routers of `random` (normal, variance 1) or `uniform_random` (±1/√hidden): layer -> (rows, hidden), float32.

    The same numbers for the same seed, on every machine and whatever the number of layers.
    """
    gates = {}
    for layer in range(layers):
        u = _uniform(f"{mode}:{seed}:{layer}", rows * hidden)
        values = normal_quantile(u) if mode == "random" else (2 * u - 1) / math.sqrt(hidden)
        gates[layer] = values.astype(np.float32).reshape(rows, hidden)
    return gates


def _uniform(stream: str, count: int) -> Floats:
    """`count` numbers of a stream, uniform in the open interval (0, 1)."""
    bits = np.frombuffer(hashlib.shake_256(stream.encode()).digest(8 * count), dtype="<u8")
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def normal_quantile(u: Floats) -> Floats:
    """The value below which a standard normal number lies with probability `u`, 0 < u < 1."""
    q = u - 0.5
    result = q * _ratio(CENTRE, 0.180625 - q * q)
    outer = np.abs(q) > 0.425
    r = np.sqrt(-np.log(np.minimum(u[outer], 1 - u[outer])))
    result[outer] = np.sign(q[outer]) * np.where(r <= 5, _ratio(TAIL, r - 1.6), _ratio(FAR_TAIL, r - 5))
    return result


def _ratio(coefficients: tuple[Sequence[float], Sequence[float]], x: Floats) -> Floats:
    """One polynomial in `x` over another, by Horner's rule."""
    above, below = (np.full_like(x, polynomial[0]) for polynomial in coefficients)
    for a, b in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        above, below = above * x + a, below * x + b
    return above / below
