"""Everything moerge says about a recipe, as data: one class a statement, in a module by what it is about."""

from merge.findings.base import ERROR, NOTICE, RECIPE, SOURCE, WARNING, Finding, all_findings, documentation, printable
from merge.findings.building import *  # noqa: F403
from merge.findings.evals import *  # noqa: F403
from merge.findings.keys import *  # noqa: F403
from merge.findings.licenses import *  # noqa: F403
from merge.findings.result import *  # noqa: F403
from merge.findings.routing import *  # noqa: F403
from merge.findings.sources import *  # noqa: F403
from merge.findings.text import *  # noqa: F403

__all__ = ["ERROR", "NOTICE", "RECIPE", "SOURCE", "WARNING", "Finding", "all_findings", "documentation", "printable"]
