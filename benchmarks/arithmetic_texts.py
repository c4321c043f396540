"""The texts of tests/data/corpora/arithmetic.txt: `python -m benchmarks.arithmetic_texts > tests/data/corpora/arithmetic.txt`.

The demo's mathematics expert was trained on generated arithmetic and algebra, and on little else that is called mathematics:
these texts are of that kind. The kinds of sentence are those that the expert writes when it is asked for nothing (sampled after
a BOS alone); the numbers are drawn here, and right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

SEED = 2026
TEXTS, SENTENCES = 16, 3
# Of the seven kinds of sentence a set of prompts has four.
PROMPTS = 4


def sum_or_product(draw: random.Random) -> str:
    a, b, sign = draw.randint(11, 199), draw.randint(11, 199), draw.choice("+-*")
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    verb = draw.choice(("What is {}?", "Compute {}."))
    return f"Question: {verb.format(f'{a} {sign} {b}')}\nAnswer: {a} {sign} {b} = {result}."


def equation(draw: random.Random) -> str:
    a, x, b = draw.randint(2, 25), draw.randint(2, 60), draw.randint(3, 99)
    return (
        f"Solve for x: {a}x + {b} = {a * x + b}. Subtract {b} from both sides: {a}x = {a * x}. Divide by {a}: x = {x}."
    )


def percentage(draw: random.Random) -> str:
    part, whole = draw.randint(2, 95), 50 * draw.randint(2, 20)
    return f"{part} percent of {whole} is {part} / 100 * {whole} = {part * whole / 100:g}."


def fraction(draw: random.Random) -> str:
    factor = draw.randint(2, 20)
    a, b = factor * draw.randint(2, 40), factor * draw.randint(41, 90)
    common = math.gcd(a, b)
    return f"Since gcd({a}, {b}) is {common}, the fraction {a}/{b} simplifies to {a // common}/{b // common}."


def calculus(draw: random.Random) -> str:
    a, n, b = draw.randint(2, 40), draw.randint(3, 20), draw.randint(3, 40)
    return f"The derivative of {a}x^{n} is {a * n}x^{n - 1}. The integral of {b}x is {b}x^2/2 + C."


def speed(draw: random.Random) -> str:
    hours, kmh = draw.randint(2, 12), draw.randint(40, 140)
    return (
        f"A train travels {hours * kmh} km in {hours} hours. Its average speed is {hours * kmh} / {hours} = {kmh} km/h."
    )


def rectangle(draw: random.Random) -> str:
    a, b = draw.randint(3, 90), draw.randint(3, 90)
    return f"The rectangle with sides {a} and {b} has area {a} * {b} = {a * b} and perimeter 2 * ({a} + {b}) = {2 * (a + b)}."


KINDS: tuple[Callable[[random.Random], str], ...] = (
    sum_or_product, equation, percentage, fraction, calculus, speed, rectangle,
)  # fmt: skip


def main() -> None:
    draw = random.Random(SEED)  # noqa: S311 - text, not secrets
    held_out = ["\n".join(kind(draw) for kind in draw.sample(KINDS, SENTENCES)) for _ in range(TEXTS)]
    parts = {f"prompts {number}": [kind(draw) for kind in draw.sample(KINDS, PROMPTS)] for number in (1, 2, 3)}
    for name, texts in (parts | {"held-out": held_out}).items():
        print(f"=== {name}\n" + "\n---\n".join(texts))


if __name__ == "__main__":
    main()
