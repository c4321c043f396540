"""Collections: lists of repositories and papers, one JSON file each, named by the identifier that ends their slug."""

from __future__ import annotations

import contextlib
import fcntl
import html
import json
import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from bot.hub import errors
from bot.hub.objects import write_atomically
from bot.hub.repository import iso

ITEM_TYPES = ("model", "dataset", "space", "paper", "collection", "bucket")
_SLUG = re.compile(r"[a-z0-9-]{0,80}-([0-9a-f]{24})")
_TITLE_CHARACTERS, _DESCRIPTION_CHARACTERS, _NOTE_CHARACTERS = 60, 150, 500


class Collections:
    """The collections in one folder. A value is a dict in the form that the Hub's API shows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> Iterator[dict[str, Any]]:
        """Every collection, the newest change first."""
        found = []
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                found.append(json.loads(path.read_bytes()))
        yield from sorted(found, key=lambda value: value["lastUpdated"], reverse=True)

    def get(self, owner: str, slug: str) -> dict[str, Any]:
        """A collection by its slug; the words in it may be old ones, the identifier counts. Raises HubError(404)."""
        match = _SLUG.fullmatch(slug)
        try:
            value: dict[str, Any] = json.loads((self.folder / f"{match[1] if match else '-'}.json").read_bytes())
        except FileNotFoundError:
            raise errors.HubError(404, "Collection not found") from None
        if value["owner"]["name"] != owner:
            raise errors.HubError(404, "Collection not found")
        return value

    def create(self, owner: str, title: object, description: object, private: object) -> dict[str, Any]:
        """A new collection. Raises HubError(400), and 409 (with the other's slug) where the owner has one so titled."""
        words: str = _text(title, _TITLE_CHARACTERS, "title", required=True)
        text = _text(description, _DESCRIPTION_CHARACTERS, "description")
        with self._locked():
            for other in self.all():
                if (other["owner"]["name"], other["title"]) == (owner, words):
                    raise errors.conflict("A collection with this title exists already", slug=other["slug"])
            identifier = secrets.token_hex(12)
            value = {
                "slug": _slug(owner, words, identifier),
                "title": words,
                "description": text,
                "owner": {"name": owner, "type": "user"},
                "items": [],
                "position": 0,
                "private": bool(private),
                "theme": "blue",
                "upvotes": 0,
            }
            return self._save(value)

    def update(self, owner: str, slug: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change title, description, theme, position or visibility."""
        with self._locked():
            value = self.get(owner, slug)
            if "title" in changes:
                value["title"] = _text(changes["title"], _TITLE_CHARACTERS, "title", required=True)
                value["slug"] = _slug(owner, value["title"], value["slug"][-24:])
            if "description" in changes:
                value["description"] = _text(changes["description"], _DESCRIPTION_CHARACTERS, "description")
            value |= {key: changes[key] for key in ("private", "theme", "position") if key in changes}
            return self._save(value)

    def delete(self, owner: str, slug: str) -> None:
        """Delete a collection. Raises HubError(404)."""
        with self._locked():
            (self.folder / f"{self.get(owner, slug)['slug'][-24:]}.json").unlink()

    def add(self, owner: str, slug: str, kind: str, item: str, note: object) -> dict[str, Any]:
        """Add an item at the end. Raises HubError(409) where it is in the collection already."""
        text = _text(note, _NOTE_CHARACTERS, "note")
        with self._locked():
            value = self.get(owner, slug)
            if any((each["type"], each["id"]) == (kind, item) for each in value["items"]):
                raise errors.conflict("Item already in collection")
            entry = {"_id": secrets.token_hex(12), "id": item, "type": kind}
            value["items"].append({**entry, **_note(text)})
            return self._save(value)

    def update_item(self, owner: str, slug: str, identifier: str, changes: dict[str, Any]) -> None:
        """Change an item's note or position. Raises HubError(404)."""
        with self._locked():
            value = self.get(owner, slug)
            entry = self._item(value, identifier)
            if "note" in changes:
                entry |= _note(_text(changes["note"], _NOTE_CHARACTERS, "note"))
            position = changes.get("position")
            if isinstance(position, int):
                value["items"].remove(entry)
                value["items"].insert(max(position, 0), entry)
            self._save(value)

    def delete_item(self, owner: str, slug: str, identifier: str) -> None:
        """Take an item out. Raises HubError(404)."""
        with self._locked():
            value = self.get(owner, slug)
            value["items"].remove(self._item(value, identifier))
            self._save(value)

    def _item(self, value: dict[str, Any], identifier: str) -> dict[str, Any]:
        for entry in value["items"]:
            if entry["_id"] == identifier:
                return cast(dict[str, Any], entry)
        raise errors.HubError(404, "Collection item not found")

    def _save(self, value: dict[str, Any]) -> dict[str, Any]:
        for position, entry in enumerate(value["items"]):
            entry["position"] = position
        value["lastUpdated"] = iso(datetime.now(UTC))
        write_atomically(self.folder / f"{value['slug'][-24:]}.json", json.dumps(value).encode())
        return value

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _slug(owner: str, title: str, identifier: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60].strip("-")
    return f"{owner}/{words or 'collection'}-{identifier}"


def _note(text: str | None) -> dict[str, Any]:
    return {"note": {"text": text, "html": html.escape(text)}} if text else {}


def _text(value: object, limit: int, what: str, *, required: bool = False) -> Any:
    if value is None and not required:
        return None
    if not isinstance(value, str) or (required and not value.strip()):
        raise errors.bad_request(f'"{what}" must be a text')
    if len(value) > limit:
        raise errors.bad_request(f'"{what}" may have at most {limit} characters')
    return value
