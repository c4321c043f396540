"""The documentation says what the code does."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from merge.findings import ERROR, NOTICE, WARNING, all_findings, documentation


def test_findings_have_ids_of_their_own_levels_and_an_explanation() -> None:
    kinds = all_findings()
    assert len({kind.id for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind.level in (ERROR, WARNING, NOTICE), kind
        assert len(inspect.cleandoc(kind.__doc__ or "")) > 40, kind


def test_the_page_of_findings_is_fresh(root: Path) -> None:
    assert (root / "docs/findings.md").read_text(encoding="utf-8") == documentation(), "run: make docs"


def test_every_finding_can_be_found_by_a_test_or_the_code_that_makes_it(root: Path) -> None:
    sources = "".join(path.read_text() for folder in ("merge", "bot") for path in (root / folder).rglob("*.py"))
    for kind in all_findings():
        assert sources.count(kind.__name__) >= 2, f"{kind.__name__} is never made"


def test_the_readme_has_the_action_s_inputs_and_outputs_as_they_are(root: Path) -> None:
    from bot.inputs import INPUTS, OUTPUTS

    readme = (root / "README.md").read_text(encoding="utf-8")
    for name, entry in INPUTS.items():
        default = " ".join(f"`{word}`" for word in entry.default.splitlines()) or "–"  # noqa: RUF001 the table has a dash there
        assert f"| `{name}` | {default} | {entry.description} |" in readme
    for name, description in OUTPUTS.items():
        assert f"| `{name}` | {description} |" in readme


def test_the_readme_names_every_command_and_no_other(root: Path) -> None:
    import re

    from bot.cli import COMMANDS

    readme = (root / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `moerge (\w+)", readme, re.MULTILINE)) == set(COMMANDS) - {"action"}


def test_links_of_the_documentation_lead_somewhere(root: Path) -> None:
    import re

    for page in [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_imports_point_one_way(root: Path) -> None:
    allowed = {
        "merge": {"merge"},
        "quants": {"quants", "merge"},
        "evals": {"evals", "merge"},
        "cards": {"cards", "evals"},
        "bot": {"bot", "cards", "evals", "quants", "merge"},
    }
    for package, may in allowed.items():
        for path in (root / package).rglob("*.py"):
            for imported in _imports(path):
                assert imported not in allowed.keys() - may, f"{path} imports {imported}"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
