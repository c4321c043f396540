"""The diagram of a model's architecture, as SVG: one layer from the residual stream to the experts, and where the parameters are.

Drawn on a background of its own, so that it reads the same on a light page and on a dark one.
"""

from __future__ import annotations

from html import escape

from cards import words
from cards.markdown import one_line
from evals.results import Report

# The file beside the model's card.
ARCHITECTURE_FIGURE = "architecture.svg"
WIDTH = 880
# So many experts are drawn, the last one standing for those between.
DRAWN = 6
INK, FAINT, LINE = "#1f2430", "#5b6475", "#8892a6"
SHARED, EXPERT, ACTIVE, PAPER = "#dfe7f5", "#f3e3cf", "#f0b561", "#ffffff"


def described(report: Report) -> str:
    """The figure in words, for those who do not see it."""
    shape = report.shape
    count = len(report.experts)
    picked = "the only expert" if count == 1 else f"{report.experts_per_token} of {count} experts"
    return f"One of {shape.get('layers', '?')} layers: attention, then a router that sends each token to {picked}"


def architecture_figure(report: Report) -> bytes:
    """The SVG; the same bytes for the same report."""
    shape, parts = report.shape, list[str]()
    parts.append(
        _box(20, 24, 150, 44, SHARED, "Token embedding", f"{shape.get('vocabulary', 0):,} x {shape.get('hidden', 0):,}")
    )
    parts.append(_arrow(170, 46, 210, 46))
    parts.append(
        f'<rect x="210" y="14" width="{WIDTH - 230}" height="236" rx="10" fill="none" stroke="{LINE}" stroke-dasharray="5 4"/>'
    )
    parts.append(_text(226, 36, f"{shape.get('layers', '?')} layers, each:", size=13, color=FAINT))
    heads = f"{shape.get('heads', '?')} heads, {shape.get('kv_heads', '?')} KV heads"
    parts.append(_box(226, 104, 170, 56, SHARED, "Attention", heads))
    parts.append(_arrow(396, 132, 430, 132))
    parts.append(
        _box(430, 104, 110, 56, SHARED, "Router", f"picks {report.experts_per_token} of {len(report.experts)}")
    )
    parts += _experts(report)
    parts.append(_box(20, 206, 150, 44, SHARED, "Output", "next token"))
    parts.append(_arrow(210, 228, 170, 228))
    parts += _bar(report, 290)
    title = escape(described(report))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 380" width="{WIDTH}" height="380" role="img" '
        f'aria-label="{title}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        f"<title>{title}</title>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
        f'<rect width="{WIDTH}" height="380" rx="12" fill="{PAPER}"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""]).encode()


def _experts(report: Report) -> list[str]:
    """The experts as a column of boxes; the router's picks are an example."""
    count, parts = len(report.experts), list[str]()
    numbers = list(range(count)) if count <= DRAWN else [*range(DRAWN - 1), count - 1]
    height = min(32.0, (210.0 - 4 * len(numbers)) / len(numbers))
    top = 132 - (len(numbers) * (height + 4) - 4) / 2
    for place, number in enumerate(numbers):
        y = top + place * (height + 4)
        picked = place < report.experts_per_token
        expert = report.experts[number]
        label = _short(f"Expert {number + 1}" + (f": {one_line(expert.role)}" if expert.role else ""), 30)
        if count > DRAWN and place == DRAWN - 2:
            label = f"… {count - DRAWN + 1} more …"
        middle = y + height / 2
        color = ACTIVE if picked else EXPERT
        parts.append(
            f'<path d="M540 132C562 132 558 {middle:.1f} 580 {middle:.1f}" fill="none" stroke="{LINE if picked else "#d3d8e2"}" stroke-width="{2 if picked else 1}"/>'
        )
        parts.append(f'<rect x="580" y="{y:.1f}" width="240" height="{height:.1f}" rx="6" fill="{color}"/>')
        parts.append(_text(592, middle + 4.5, label, size=13))
    parts.append(_text(846, 132, "Σ", size=18, color=FAINT))
    if report.shared_experts:
        parts.append(_text(580, 246, "and a shared expert for every token", size=12, color=FAINT))
    return parts


def _bar(report: Report, y: int) -> list[str]:
    """Where the parameters are: those that all tokens use, and those of each expert."""
    counts = report.parameters
    total = counts.get("total", 0)
    if not total or "shared" not in counts or "per_expert" not in counts:
        return []
    parts = [
        _text(
            20,
            y,
            f"{words.billions(total)} parameters, {words.billions(counts.get('active', total))} of them active for a token",
            size=14,
        )
    ]
    x, width = 20.0, WIDTH - 40.0
    pieces = [(counts["shared"], SHARED)] + [
        (counts["per_expert"], ACTIVE if number < report.experts_per_token else EXPERT)
        for number in range(len(report.experts))
    ]
    for size, color in pieces:
        share = width * size / total
        parts.append(f'<rect x="{x:.1f}" y="{y + 14}" width="{max(0.5, share - 1.5):.1f}" height="24" fill="{color}"/>')
        x += share
    legend = [
        (SHARED, f"shared by all tokens: {words.billions(counts['shared'])}"),
        (ACTIVE, f"experts at work for one token: {report.experts_per_token} x {words.billions(counts['per_expert'])}"),
        (EXPERT, "experts at rest"),
    ]
    at = 20
    for color, label in legend:
        parts.append(
            f'<rect x="{at}" y="{y + 56}" width="12" height="12" rx="2" fill="{color}" stroke="{LINE}" stroke-width=".5"/>'
        )
        parts.append(_text(at + 18, y + 66.5, label, size=12.5, color=FAINT))
        at += 40 + round(6.6 * len(label))
    return parts


def _box(x: float, y: float, width: float, height: float, color: str, title: str, below: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}"/>'
        + _text(x + width / 2, y + height / 2 - 3, title, size=14, anchor="middle")
        + _text(x + width / 2, y + height / 2 + 13, below, size=10.5, color=FAINT, anchor="middle")
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, *, size: float, color: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
