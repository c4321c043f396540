"""What people wrote into a card on the Hub, between markers, stays when a release brings a new card.

    <!-- moerge:keep NAME -->
    Any text.
    <!-- /moerge:keep -->

A section goes where the new card has one of the same name; else to its end, in the old order.
"""

from __future__ import annotations

import re

_SECTION = re.compile(r"<!-- *moerge:keep +([\w-]{1,60}) *-->(.*?)<!-- */moerge:keep *-->", flags=re.DOTALL | re.ASCII)


def with_kept(new: str, old: str) -> str:
    """The card `new` with the sections that people keep in `old`."""
    kept = {match[1]: match[0] for match in _SECTION.finditer(old)}
    if not kept:
        return new
    placed = {match[1] for match in _SECTION.finditer(new)}
    text = _SECTION.sub(lambda match: kept.get(match[1], match[0]), new)
    rest = [section for name, section in kept.items() if name not in placed]
    return text.rstrip("\n") + "\n" + "".join(f"\n{section}\n" for section in rest) if rest else text
