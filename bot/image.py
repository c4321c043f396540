"""The image of a card: a file beside the recipe, known by its bytes, that is published beside the card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bot.evals import bad_file, read_beside
from evals.results import Report
from merge.files import write_atomically, writing
from merge.recipe import LoadedRecipe

MAX_BYTES = 8 << 20
# How the files of each kind begin. No SVG: it may hold programs.
MAGIC = {"png": (b"\x89PNG\r\n\x1a\n",), "jpg": (b"\xff\xd8\xff",), "gif": (b"GIF87a", b"GIF89a")}


@dataclass(frozen=True)
class CardImage:
    """An image by the name that it has beside the card."""

    name: str
    content: bytes


def read_image(loaded: LoadedRecipe) -> CardImage | None:
    """The recipe's image, if it names one. Raises RecipeError where the file cannot be used."""
    file = loaded.recipe.card.image
    if file is None:
        return None
    place = ("card", "image")
    if "://" in file:
        problem = (
            "an image elsewhere could change after the release, and would see who reads it; put it beside the recipe"
        )
        raise bad_file(loaded, file, "card.image", place, problem)
    content = read_beside(loaded, file, "card.image", place, MAX_BYTES)
    kind = next((kind for kind, starts in MAGIC.items() if content.startswith(starts)), None)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise bad_file(loaded, file, "card.image", place, "it is not a PNG, JPEG, GIF or WebP file")
    return CardImage(f"image.{kind}", content)


def with_image(report: Report, image: CardImage | None, model: Path) -> Report:
    """`report` with the image that lies in the model's folder from now on. Raises DestinationError."""
    if image is not None:
        with writing(model):
            write_atomically(model / image.name, image.content)
    return replace(report, card=replace(report.card, image=image.name if image else None))
