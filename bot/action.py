"""The GitHub Action: reads its inputs and the event, previews or builds the recipes that changed, and says so to GitHub.

A pull request's recipes come from anyone: they are previewed from the bytes of the commit, may name no local folder, choose
no runner, and nothing is written to the Hub for them; one from a fork is read without any token.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot import collect, comments, summary
from bot.builds import build_all, release_json, say_bug
from bot.changes import Change, all_recipes, changes_between
from bot.events import Comparison, compare
from bot.git import Commits, Repository
from bot.inputs import OUTPUTS, Settings, read_settings, tokens
from bot.matrix import JOBS, by_urgency, clashes, errors_of, is_buildable, matrix, plan_entries
from bot.preview import Preview
from bot.previews import import_for_previews, preview_changes
from bot.releases import tagged_recipe
from bot.workflow_commands import Annotations, Summary, mask, untrusted, write_output
from merge import findings as f
from merge.errors import DestinationError, MoergeError, RecipeError, UsageError

if TYPE_CHECKING:
    from bot.github.client import Comment, GitHub

PREVIEWS = "previews.json"
# The outputs of a run after which nothing is to be built.
NOTHING = {"changed": "[]", "matrix": '{"include": []}'}
RECIPE_ERROR, CRASH = RecipeError.exit_code, MoergeError.exit_code


def run_action(environment: Mapping[str, str]) -> int:
    """Run the action as GitHub started it. Returns the exit code; what went wrong has been said to GitHub by then."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for secret in tokens(environment):
        mask(secret)
    annotations = Annotations()
    try:
        settings = read_settings(environment)
        settings.prepare_client()
        return Action(settings, annotations).run()
    except MoergeError as error:
        annotations.add("error", str(error), title="moerge")
        return error.exit_code
    except Exception as error:
        say_bug(annotations, error, environment.get("RUNNER_DEBUG") == "1")
        return CRASH


class Action:
    """One run of the action on one event."""

    def __init__(self, settings: Settings, annotations: Annotations) -> None:
        self.settings = settings
        self.annotations = annotations
        self.summary = Summary(settings.summary_file)
        self.codes: set[int] = set()
        self.github = settings.github.client() if settings.github else None
        # The folder of the repository that recipes' paths begin at; where a checkout lies in the workspace is no part of it.
        self.inside = settings.inside
        self.outputs = dict.fromkeys(OUTPUTS, "")
        self.outputs |= NOTHING | {"published": "[]"}

    def run(self) -> int:
        """Do what was asked. Outputs and the summary are written also where something failed."""
        try:
            if self.settings.command in ("collect", "reply"):
                self._end()
            elif self.settings.command == "comment":
                self._obey()
            else:
                self._work(*self._changes())
        finally:
            self._finish()
        return max(self.codes, default=0)

    def _work(self, comparison: Comparison, changes: Sequence[Change]) -> None:
        """Preview, plan or build the recipes that are meant."""
        chosen = [change for change in changes if change.to_build]
        self._output("changed", json.dumps([change.path for change in chosen]))
        command = self._command()
        self.summary.add(summary.heading(_title(command, len(chosen)), comparison.why))
        if quiet := summary.quiet_section(changes):
            self.summary.add(quiet)
        self._plan(changes)
        if not chosen:
            self.summary.add(summary.nothing_to_do())
        if command == "preview":
            self._preview(chosen, changes, comparison)
        elif not chosen:
            pass
        elif command == "build":
            self._build(chosen)
        else:
            self._say_broken(chosen)

    # ------------------------------------------------------------------------------------------------------- which recipes

    def _changes(self) -> tuple[Comparison, list[Change]]:
        repository, globs = self._repository(), self.settings.globs
        comparison = compare(self.settings.event, repository)
        if comparison.head is None:
            return comparison, []
        if comparison.base is None:
            every = all_recipes(repository, comparison.head, globs, comparison.why)
            return comparison, self._tagged(self.settings.event.tag, every) if self.settings.event.tag else every
        return comparison, changes_between(repository, comparison.base, comparison.head, globs)

    def _repository(self) -> Commits:
        """The checkout; without one, the repository on GitHub, of which nothing comes to this machine but recipes' bytes."""
        try:
            found = Repository(self.settings.folder)
            if not found.top.is_relative_to(self.settings.workspace):
                raise UsageError(
                    f"{self.settings.folder} is not a git checkout of this job's; run actions/checkout first"
                )
            self.inside = str(found.folder.relative_to(found.top))
            return found
        except UsageError:
            if self.github is None or self.settings.command == "build":
                raise
        from bot.github.commits import RemoteRepository

        # Half a second of imports, while GitHub is asked what changed.
        threading.Thread(target=import_for_previews).start()
        settings = self.settings
        return RemoteRepository(self.github, settings.folder, settings.inside, settings.globs, settings.event.commits)

    def _tagged(self, tag: str, every: Sequence[Change]) -> list[Change]:
        """The recipe that a pushed tag NAME-vVERSION releases, if it means one."""
        found = tagged_recipe(tag, {change.name for change in every})
        chosen = [replace(change, why=f"tag {tag}") for change in every if found and change.name == found[0]]
        for change in chosen:
            loaded = change.file.loaded if change.file else None
            if found and loaded and loaded.recipe.release.version not in (None, found[1], f"v{found[1]}"):
                line = loaded.line("release", "version")
                wrong = f.TagVersion(line, tag=tag, version=loaded.recipe.release.version)
                self._say_findings(change.path, (wrong,))
                self.codes.add(RECIPE_ERROR)
                return []
        return chosen

    def _command(self) -> str:
        if self.settings.command == "build" and self.settings.event.is_pull_request:
            self.annotations.add("notice", "A pull request is only previewed: nothing is built or published for it.")
            return "preview"
        return self.settings.command

    def _plan(self, changes: Sequence[Change]) -> None:
        trusted = not self.settings.event.is_pull_request
        changes = by_urgency(changes)
        entries = plan_entries(changes, self.settings.runner, trusted=trusted)
        self._output("matrix", json.dumps(matrix(entries)))
        over = sum(entry["build"] for entry in entries) - JOBS
        if self.settings.command == "plan":
            for start in range(0, len(changes), 500):
                part = slice(start, start + 500)
                self.summary.add(summary.plan_section(changes[part], [_place(entry) for entry in entries[part]]))
            if over > 0:
                left = [entry["recipe"] for entry in entries if entry["build"]][JOBS:]
                self.annotations.add(
                    "warning",
                    f"{over} recipes are not in the matrix, which GitHub limits to {JOBS}: those asked for and changed "
                    "come before the new ones. Run the workflow by hand for the rest, with these `recipes`:\n"
                    + "\n".join(left),
                )
                self.summary.add(summary.left_out(left, JOBS))
        with untrusted():
            for change in changes:
                print(f"{change.path}: {change.kind}: {change.why}", flush=True)

    def _say_broken(self, chosen: Sequence[Change]) -> None:
        clashing = clashes(by_urgency(chosen))
        for change in chosen:
            if found := (*errors_of(change), *clashing.get(change.path, ())):
                self._say_findings(change.path, found)
                self.codes.add(RECIPE_ERROR)

    # ------------------------------------------------------------------------------------------------------------ previews

    def _preview(self, chosen: Sequence[Change], changes: Sequence[Change], comparison: Comparison) -> None:
        settings = self.settings
        bugs: list[Exception] = []
        # Asked for while the Hub is.
        ours = ThreadPoolExecutor(1).submit(self._our_comment)
        with untrusted():
            previews = preview_changes(chosen, settings.preview_sources, runner=settings.runner, on_bug=bugs.append)
            if settings.strict:
                previews = [preview.strict() for preview in previews]
            for preview in previews:
                print(preview.to_text(), flush=True)
        if chosen:
            self._output("previews", settings.shown(_save(previews, settings.out)))
        for bug in bugs:
            say_bug(self.annotations, bug, settings.debug)
        reported = self._report(ours, previews, changes, comparison)
        for preview in previews:
            # The check run has them at their lines: said twice they would stand there twice.
            self._annotate(preview.recipe, preview.findings, silent=reported)
            self.codes.add(preview.code)
        for section in summary.preview_sections(previews):
            self.summary.add(section)

    def _our_comment(self) -> Comment | None:
        """The comment that an earlier run left on the pull request."""
        number = self.settings.event.pull_request[0]
        if number is None or self.github is None or not self.settings.comment:
            return None
        from bot.github.comment import marker

        return self.github.own_comment(number, marker(self.settings.scope))

    def _report(
        self,
        ours: Future[Comment | None],
        previews: Sequence[Preview],
        changes: Sequence[Change],
        comparison: Comparison,
    ) -> bool:
        """Comment on the pull request and add a check run; whether its findings stand there now."""
        number, head = self.settings.event.pull_request
        if number is None or head is None or self.github is None or not self.settings.comment:
            return False
        from bot.github.client import GitHubError
        from bot.github.report import say_check, say_comment

        settings = self.settings
        try:
            run_url = settings.run_url
            said = say_comment(
                self.github,
                number,
                ours.result(),
                previews,
                changes,
                comparison.why,
                head=head,
                run_url=run_url,
                scope=settings.scope,
            )
            if said:
                say_check(self.github, head, previews, self.inside)
        except GitHubError as error:
            # A fork's pull request cannot comment from `pull_request`: that is as it should be, and not the author's fault.
            expected = error.status == 403
            self.annotations.add(
                "notice" if expected else "error",
                f"The preview could not be put on the pull request: {error}. It stands in the summary of this job.",
                title="moerge",
            )
            if not expected:
                self.codes.add(error.exit_code)
            return False
        return said

    # -------------------------------------------------------------------------------------------------------------- builds

    def _build(self, chosen: Sequence[Change]) -> None:
        for change in chosen:
            if not is_buildable(change):
                self._say_broken([change])
        outcomes = build_all(chosen, self.settings, self.annotations)
        self.codes |= {outcome.code for outcome in outcomes}
        published = [(outcome.change.path, outcome.release) for outcome in outcomes if outcome.release]
        self._output("published", json.dumps([release_json(path, release) for path, release in published]))
        self._output("model_url", published[-1][1].url if published else "")
        for outcome in outcomes:
            if outcome.findings and is_buildable(outcome.change):
                self._say_findings(outcome.change.path, outcome.findings)
        self.summary.add(summary.build_section(outcomes))
        collect.save_outcomes(outcomes, self.settings.out)

    # --------------------------------------------------------------------------------------------- comments, and the end

    def _needed_github(self) -> GitHub:
        if self.github is None:
            raise UsageError(
                f"{self.settings.command} needs the job's token: `github_token`, or INPUT_GITHUB_TOKEN where it is a step"
            )
        return self.github

    def _obey(self) -> None:
        """Do what a comment asks for, if it asks for anything and may."""
        given = comments.asked(self.settings.event)
        github = self._needed_github()
        if given is None or not comments.obey(given, github):
            self.summary.add("Not a command, or not from someone who may write here: nothing is done.")
            return
        if given.command.kind == comments.BUILD:
            self._plan_asked(given, github)
        elif not given.on_pull_request:
            comments.refuse(given, github, "`/moerge preview` is for a pull request: there is none here.")
        else:
            event = comments.as_pull_request(self.settings.event, given, github)
            token = None if event.is_from_fork else self.settings.token
            self.settings = replace(self.settings, command="preview", event=event, token=token)
            self.settings.prepare_client()
            try:
                self._work(*self._changes())
            finally:
                # The workflow that reads comments builds what these outputs name, with its secrets: nothing of a pull request.
                self.outputs |= NOTHING

    def _plan_asked(self, given: comments.Asked, github: GitHub) -> None:
        """Plan the builds that a comment asks for, of the recipes as the default branch has them."""
        comparison, every = self._changes()
        known = {change.path: change for change in every}
        if missing := [path for path in given.command.paths if path not in known]:
            comments.refuse(given, github, comments.no_such_recipes(missing, list(known)))
            self.codes.add(RECIPE_ERROR)
            return
        why = f"asked for by {given.login}"
        chosen = [replace(known[path], why=why) for path in given.command.paths]
        self.settings = replace(self.settings, command="plan")
        self._work(replace(comparison, why=why), chosen)
        broken = [change for change in chosen if not is_buildable(change)]
        for change in broken:
            comments.refuse(given, github, summary.findings_section(change.path, errors_of(change)))

    def _end(self) -> None:
        """Say what became of every recipe of the run: in the summary and on GitHub, or in answer to a comment."""
        settings, event = self.settings, self.settings.event
        results = collect.read_outcomes(settings.out, settings.expected)
        github, releases = self._needed_github(), dict[str, str]()
        if settings.command == "reply":
            given = comments.asked(event)
            if given is None:
                raise UsageError("`reply` answers the comment of an issue_comment event")
            github.write_comment(given.number, collect.answer(results, settings.run_url))
            return
        try:
            releases = collect.publish_releases(results, github, event, event.sha)
            collect.set_statuses(results, github, event.sha, settings.run_url)
        finally:
            self.summary.add(f"## moerge: {collect.headline(results)}\n\n{collect.table(results, releases)}")
        released = [(result.recipe, result.release) for result in results if result.release]
        self._output("published", json.dumps([release_json(path, release) for path, release in released]))
        self._output("model_url", released[-1][1].url if released else "")
        for result in results:
            if result.said == collect.NO_RESULT:
                self.annotations.add("error", result.said, file=settings.shown(settings.folder / result.recipe))
                self.codes.add(result.code)

    # ------------------------------------------------------------------------------------------------------ saying it all

    def _say_findings(self, path: str, findings: Sequence[f.Finding]) -> None:
        self._annotate(path, findings)
        if findings:
            self.summary.add(summary.findings_section(path, findings))

    def _annotate(self, path: str, findings: Sequence[f.Finding], *, silent: bool = False) -> None:
        # Paths of annotations begin at the workspace, those of recipes at their checkout.
        shown = self.settings.shown(self.settings.folder / path)
        for finding in findings:
            if silent:
                self.annotations.counts[finding.level] += 1
                continue
            self.annotations.add(finding.level, finding.text, file=shown, line=finding.line, title=finding.id)

    def _output(self, name: str, value: str) -> None:
        assert name in OUTPUTS, name
        self.outputs[name] = value

    def _finish(self) -> None:
        self.outputs["errors"] = str(self.annotations.counts["error"])
        self.outputs["warnings"] = str(self.annotations.counts["warning"])
        for name, value in self.outputs.items():
            write_output(self.settings.output_file, name, value)
        self.summary.write()


def _save(previews: Sequence[Preview], out: Path) -> Path:
    """previews.json in the folder `out`, the same list that `moerge preview --json` prints."""
    path = out / PREVIEWS
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([preview.to_json() for preview in previews], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DestinationError(f"{path}: {error.strerror}; input `out` must name a folder") from None
    return path


def _place(entry: Mapping[str, Any]) -> str | None:
    """Where a recipe is built, for a reader."""
    runner = entry["runner"]
    return entry["job"] or (", ".join(runner) if isinstance(runner, list) else runner)


def _title(command: str, count: int) -> str:
    what = {"preview": "preview of", "build": "build of"}.get(command, "plan of")
    return f"{what} {count} recipe{'' if count == 1 else 's'}"
