"""A build in a Hugging Face Job: sent off, followed to its end, cancelled with us, its exit code handed on.

The Job runs our build image with the recipe and the files it names: `moerge build --publish`. Its machine is gone afterwards,
so what it made is read from the Hub, from the release's lock file.
"""

from __future__ import annotations

import base64
import io
import secrets
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bot.publish import LOCK, gguf_repository
from bot.publish.destination import Destination
from bot.publish.patience import patiently
from bot.publish.repository import found_at
from bot.publish.tokens import OneToken
from bot.runners import Runner
from merge.errors import DestinationError, JobError, NothingToDo, UsageError
from merge.findings import printable
from merge.progress import say
from merge.recipe import LoadedRecipe

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobInfo

# Linux takes 128 KiB for one variable of the environment.
MAX_BUNDLE = 120_000
POLL_SECONDS = 5.0
ID_FILE = "hf-job"
# It ends with 3 where the Hub has this very release already, which is what was wanted.
SCRIPT = """\
cd "$(mktemp -d)"
printf %s "$MOERGE_FILES" | base64 -d | tar -xz
code=0
moerge build "$MOERGE_RECIPE" --out out --publish || code=$?
echo "$MOERGE_WORD $code"
[ "$code" != 3 ] || code=0
exit "$code"
"""


@dataclass(frozen=True)
class JobRelease:
    """What a Job left on the Hub: `commit` of the model's repository (None where it is a pull request there) and, by
    repository and name, each file's bytes and SHA-256."""

    repo: str
    url: str
    commit: str | None
    gguf_repo: str | None
    files: dict[str, dict[str, dict[str, Any]]]
    changed: bool


@dataclass(frozen=True)
class JobOptions:
    """Where Jobs run and as whom: `image` has moerge, `namespace` pays (the token's own where None)."""

    image: str | None
    namespace: str | None
    token: str | None
    endpoint: str | None


def build_in_job(loaded: LoadedRecipe, runner: Runner, options: JobOptions, out: Path) -> JobRelease:
    """Build and publish a recipe in a Hugging Face Job, its log printed as it comes.

    SIGINT and SIGTERM end the Job too; `out`/hf-job names it for who comes after us. Raises UsageError, JobError with the
    exit code that moerge ended with in the Job, or DestinationError.
    """
    from huggingface_hub import HfApi

    recipe = loaded.recipe
    assert runner.flavor is not None
    if recipe.release.repo is None:
        raise UsageError(
            f"{loaded.path.name}: a build in a Hugging Face Job needs release.repo: its machine is gone afterwards"
        )
    if options.token is None:
        raise UsageError("a Hugging Face Job needs a token that may start Jobs and write to release.repo")
    if options.image is None:
        raise UsageError("a Hugging Face Job needs the build image's name in the input `job_image`")
    api = HfApi(endpoint=options.endpoint, token=options.token)
    word = secrets.token_hex(16)
    environment = {
        "MOERGE_FILES": _bundle(loaded),
        "MOERGE_RECIPE": loaded.path.name,
        "MOERGE_WORD": word,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **({"HF_ENDPOINT": options.endpoint} if options.endpoint else {}),
    }
    with _hub_errors(api), _interruptible() as signals:
        namespace = options.namespace or str(api.whoami()["name"])
        there = Destination(recipe.release.repo, OneToken(options.token), options.endpoint, create_pr=False)
        before = found_at(there).head
        job = api.run_job(
            image=options.image,
            command=["sh", "-ec", SCRIPT],
            env=environment,
            secrets={"HF_TOKEN": options.token},
            flavor=runner.flavor,
            timeout=runner.seconds,
            name=f"moerge-{loaded.name}",
            labels={"recipe": recipe.identity()[:16]},
            namespace=namespace,
        )
        say(f"Job {job.url} on {runner.flavor}, at most {runner.seconds // 60} minutes")
        _note(out, f"{namespace}/{job.id}")
        try:
            signals.arm()
            code = _follow(api, job, namespace, word)
            # The Job goes on, and is paid for, also where the Hub does not answer for a moment.
            ended = patiently(
                f"Job {job.url}",
                api.endpoint,
                lambda: api.wait_for_job(job.id, poll_interval=POLL_SECONDS, namespace=namespace),
            )
        except KeyboardInterrupt:
            signals.disarm()
            say(f"stopped: cancelling {job.url}")
            api.cancel_job(job_id=job.id, namespace=namespace)
            raise
        _check(ended, code, runner)
        return _release(there, loaded, before, code)


def _follow(api: HfApi, job: JobInfo, namespace: str, word: str) -> int | None:
    """Print the Job's log to its end. Returns the exit code that moerge ended with, None where it did not come so far."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    code = None
    try:
        for line in api.fetch_job_logs(job_id=job.id, namespace=namespace, follow=True):
            if line.startswith(f"{word} "):
                code = int(line.removeprefix(word))
            else:
                print(printable(line.rstrip("\r\n")), flush=True)
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        # The Job goes on without a reader.
        say(f"the Job's log broke off ({type(error).__name__}); waiting for its end. The rest of it: {job.url}")
    return code


def _check(job: JobInfo | list[JobInfo], code: int | None, runner: Runner) -> None:
    """Raise JobError unless the Job did what it was to do."""
    assert not isinstance(job, list)
    said = printable(job.status.message or "")
    if job.status.stage == "COMPLETED" and code in (None, 0, NothingToDo.exit_code):
        return
    if job.status.stage == "CANCELED":
        raise JobError(f"the Job was cancelled on the Hub: {job.url}", JobError.exit_code)
    if code:
        why = {1: "the recipe has an error there", 4: "a source or the Hub failed"}.get(code, "see its log")
        raise JobError(f"moerge ended with {code} in the Job ({why}): {job.url}", code)
    if "timeout" in said.lower():
        raise JobError(
            f"the Job was ended after its {runner.seconds // 60} minutes; give it more time with build.runner: "
            f"hf-jobs:{runner.flavor}:TIME ({job.url})",
            JobError.exit_code,
        )
    raise JobError(f"the Job ended as {job.status.stage}{f' ({said})' if said else ''}: {job.url}", JobError.exit_code)


def _release(there: Destination, loaded: LoadedRecipe, before: str | None, code: int | None) -> JobRelease:
    """What is on the Hub now, by the lock file of the release; nothing where it is still a pull request there: where the Job
    published one (`code` 0), and where its word was not heard, if another recipe's release is there."""
    found, repo, recipe = found_at(there), there.repo, loaded.recipe
    url = f"{there.endpoint}/{repo}"
    another = found.lock is None or found.lock.value.get("recipe") != recipe.identity()
    if recipe.release.create_pr and (code == 0 or another):
        return JobRelease(repo, url, None, None, {}, True)
    if found.lock is None:
        raise DestinationError(f"{repo}: no {LOCK} in it, after a Job that said it had published")
    gguf = gguf_repository(repo)
    files = {each: files for each in (repo, gguf) if (files := found.lock.files(each))}
    return JobRelease(repo, url, found.head, gguf if gguf in files else None, files, found.head != before)


def _bundle(loaded: LoadedRecipe) -> str:
    """The recipe and the files beside it that it names, as base64 of a compressed archive. Raises UsageError."""
    contents = {loaded.path.name: loaded.text.encode()}
    for name in loaded.recipe.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise UsageError(f"{name}: for a Hugging Face Job a file must lie beside the recipe or below it")
        try:
            contents[str(pure)] = (loaded.folder / pure).read_bytes()
        except OSError as error:
            raise UsageError(f"{loaded.folder / pure}: {error.strerror}") from None
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    text = base64.b64encode(packed.getvalue()).decode()
    if len(text) > MAX_BUNDLE:
        raise UsageError(
            f"{loaded.path.name}: the recipe and its files are {len(text) // 1000} kB packed, and a Job takes "
            f"{MAX_BUNDLE // 1000}; build on a runner of your own"
        )
    return text


def _note(out: Path, job: str) -> None:
    """Leave the Job's id where a later step finds it, should this process be killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ID_FILE).write_text(f"{job}\n", encoding="utf-8")
    except OSError as error:
        say(f"{out / ID_FILE}: {error.strerror}; a killed run will not end its Job")


class _Signals:
    """SIGINT and SIGTERM raise KeyboardInterrupt once armed; what came before that is kept until then: between the Hub's
    starting a Job and our knowing its name nothing may be lost."""

    def __init__(self) -> None:
        self._armed = False
        self._came = False

    def __call__(self, number: int, frame: object) -> None:
        self._came = True
        if self._armed:
            raise KeyboardInterrupt

    def arm(self) -> None:
        self._armed = True
        if self._came:
            raise KeyboardInterrupt

    def disarm(self) -> None:
        self._armed = False


@contextmanager
def _interruptible() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _hub_errors(api: HfApi) -> Iterator[None]:
    """What the Hub says about a Job, as one sentence."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        sentences = {
            401: "the Hub does not know the token",
            402: "the namespace has no credit for Jobs",
            403: "the token may not start Jobs there (it needs the right `job.write`)",
            501: "this Hub runs no Jobs",
        }
        said = printable(str(error.server_message or "")) if hasattr(error, "server_message") else ""
        raise DestinationError(
            f"Hugging Face Jobs: {sentences.get(status or 0, f'the Hub answered with status {status}')}"
            f"{f': {said}' if said and status not in sentences else ''}"
        ) from None
    except httpx2.HTTPError as error:
        raise DestinationError(
            f"Hugging Face Jobs: {api.endpoint} cannot be reached ({type(error).__name__})"
        ) from None
