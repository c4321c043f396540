"""Every error that ends a run, one class per cause, each with the exit code the command line returns.

A message is a sentence for the person who can mend the matter: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge.findings import Finding


class MoergeError(Exception):
    """Base of all errors a user is meant to read. Raised only through a subclass."""

    exit_code = 5


class RecipeError(MoergeError):
    """A recipe, or what it asks of its sources, is wrong: carries the findings that say so."""

    exit_code = 1

    def __init__(self, findings: Sequence[Finding], path: str = "recipe") -> None:
        self.findings = tuple(findings)
        self.path = path
        super().__init__("\n".join(finding.located(path) for finding in self.findings))


class SourcesUnavailable(RecipeError):
    """The recipe may be right, but sources it names could not be asked: its findings say which, and at which line."""

    exit_code = 4


class UsageError(MoergeError):
    """The command was called wrongly: an option or a path that cannot be meant."""

    exit_code = 2


class NothingToDo(MoergeError):
    """All that was asked for is done already."""

    exit_code = 3


class SourceError(MoergeError):
    """A source model could not be read: network, permission, missing revision, damaged file."""

    exit_code = 4


class DestinationError(MoergeError):
    """The result could not be written or sent: disk, permission, the Hub."""

    exit_code = 4


class ProofError(MoergeError):
    """A file was made but did not pass its proof, so it is not kept as finished."""

    exit_code = 4


class JobError(MoergeError):
    """A build that ran elsewhere did not end well; carries the exit code that it ended with there."""

    exit_code = 4

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
