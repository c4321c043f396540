"""Build the preview image for real and run its entry on an event: `make image-check`.

Takes the first of docker, podman and buildah that works. The base is the Dockerfile's own, or the one in $PYTHON_IMAGE; on a
machine that reaches no registry a base of the same kind is made with debootstrap, where that is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bot.workflow import ROOT, Recipes, push, read_outputs, recipe

IMAGE = "localhost/moerge-preview:check"
LOCAL_BASE = "localhost/moerge-base:check"
PULL_SECONDS = 120
# What a container needs of a machine whose network has its own certificates, resolver or names.
NETWORK_FILES = ("/etc/ssl/certs", "/etc/resolv.conf", "/etc/hosts")
# Debian's slim images are made without these.
LEFT_OUT = ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*")


class Engine:
    """docker or podman."""

    def __init__(self, name: str) -> None:
        self.name = name

    def works(self) -> bool:
        """Whether there is an engine behind the command."""
        return bool(shutil.which(self.name)) and run([self.name, "info"], check=False, quiet=True) == 0

    def pull(self, image: str) -> bool:
        return run([self.name, "pull", "--quiet", image], check=False, seconds=PULL_SECONDS) == 0

    def build(self, folder: Path, tag: str, *arguments: str) -> None:
        run([self.name, "build", "--tag", tag, *arguments, str(folder)])

    def size(self, image: str) -> int:
        return int(output([self.name, "image", "inspect", "--format", "{{.Size}}", image]))

    def run(self, image: str, mounts: dict[Path, str], environment: dict[str, str], arguments: Sequence[str]) -> int:
        volumes = [part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}")]
        variables = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
        workdir = ["--workdir", environment["GITHUB_WORKSPACE"]]
        return run([self.name, "run", "--rm", *workdir, *volumes, *variables, image, *arguments], check=False)


class Buildah(Engine):
    """buildah, which needs neither a daemon nor namespaces: commands run in a chroot, on the machine's network."""

    def __init__(self) -> None:
        super().__init__("buildah")
        self.isolation = ["--isolation", "chroot", "--network", "host"]
        files = [path for path in NETWORK_FILES if Path(path).exists()]
        self.isolation += [part for path in files for part in ("--volume", f"{path}:{path}:ro")]

    def build(self, folder: Path, tag: str, *arguments: str) -> None:
        run(["buildah", "bud", "--layers", *self.isolation, "--tag", tag, *arguments, str(folder)])

    def size(self, image: str) -> int:
        container = output(["buildah", "from", image])
        try:
            folder = output(["buildah", "mount", container])
            return 1024 * int(
                output(["du", "--summarize", "--one-file-system", "--block-size=1024", folder]).split()[0]
            )
        finally:
            run(["buildah", "rm", container], quiet=True)

    def run(self, image: str, mounts: dict[Path, str], environment: dict[str, str], arguments: Sequence[str]) -> int:
        entry = json.loads(output(["buildah", "inspect", "--type", "image", image]))["OCIv1"]["config"]["Entrypoint"]
        volumes = [part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}")]
        variables = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
        workdir = ["--workingdir", environment["GITHUB_WORKSPACE"]]
        container = output(["buildah", "from", image])
        try:
            inside = [*workdir, *volumes, *variables, container, "--", *entry, *arguments]
            return run(["buildah", "run", *self.isolation, *inside], check=False)
        finally:
            run(["buildah", "rm", container], quiet=True)


def main() -> int:
    """Try one engine after the other; 0 as soon as one has built and run the image."""
    engines = [engine for engine in (Engine("docker"), Engine("podman"), Buildah()) if engine.works()]
    if not engines:
        print("image-check: none of docker, podman and buildah works on this machine; install one", file=sys.stderr)
        return 2
    for engine in engines:
        print(f"image-check: with {engine.name}", flush=True)
        try:
            base = base_image(engine)
            started = time.monotonic()
            build(engine, base)
            print(f"image-check: on {base or default_base()}, built in {time.monotonic() - started:.0f} s", flush=True)
            seconds = check(engine)
        except Failed as failed:
            print(f"image-check: {engine.name}: {failed}", file=sys.stderr, flush=True)
            continue
        print(f"image-check: image {engine.size(IMAGE) / 1e6:.0f} MB, preview of a recipe in {seconds:.1f} s")
        return 0
    return 1


def base_image(engine: Engine) -> str | None:
    """The base to build on; None for the Dockerfile's own."""
    if given := os.environ.get("PYTHON_IMAGE"):
        return given
    if engine.pull(default_base()):
        return None
    if not shutil.which("debootstrap"):
        raise Failed("the base image cannot be pulled; set PYTHON_IMAGE to one that is here, or install debootstrap")
    make_base(engine)
    return LOCAL_BASE


def default_base() -> str:
    """The Dockerfile's own base."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON_IMAGE="))


def make_base(engine: Engine) -> None:
    """A Debian with Python, like the slim images of a registry, kept for the next time as an archive."""
    archive = ROOT / "build/image-base/base.tar"
    if not archive.exists():
        print("image-check: no registry; making a base with debootstrap", flush=True)
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            packages = "--include=python3,python3-venv,ca-certificates"
            run(["debootstrap", "--variant=minbase", packages, debian_suite(), folder], quiet=True)
            partial = archive.with_suffix(".partial")
            excluded = [f"--exclude=./{path}" for path in LEFT_OUT]
            run(["tar", "-C", folder, "--one-file-system", *excluded, "-cf", str(partial), "."])
            partial.rename(archive)
    (archive.parent / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    engine.build(archive.parent, LOCAL_BASE)


def debian_suite() -> str:
    """This machine's own Debian release, which its debootstrap and its keys surely know; stable on other systems."""
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return "stable"
    facts = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    return facts.get("VERSION_CODENAME", "stable") if facts.get("ID") == "debian" else "stable"


def build(engine: Engine, base: str | None) -> None:
    """Build the Dockerfile's target `preview`."""
    chosen = ["--build-arg", f"PYTHON_IMAGE={base}"] if base else []
    engine.build(ROOT, IMAGE, "--target", "preview", *chosen)


def check(engine: Engine) -> float:
    """Run the image on a push event as GitHub's runner does, and look at what it wrote. Returns the seconds it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = Recipes(folder / "workspace")
        before = repository.commit()
        after = repository.commit(**{"recipes/four.yaml": recipe(4)})
        # A folder that would be imported instead of ours, were the workspace on Python's path.
        repository.write("merge/__init__.py", "raise SystemExit('imported from the workspace')")
        files = folder / "files"
        files.mkdir()
        for empty in ("output", "summary"):
            (files / empty).touch()
        (files / "event.json").write_text(json.dumps(push(before, after)))
        environment = {
            "INPUT_COMMAND": "preview",
            "GITHUB_EVENT_NAME": "push",
            "GITHUB_EVENT_PATH": "/github/files/event.json",
            "GITHUB_SHA": after,
            "GITHUB_WORKSPACE": "/github/workspace",
            "GITHUB_OUTPUT": "/github/files/output",
            "GITHUB_STEP_SUMMARY": "/github/files/summary",
            "HOME": "/tmp",  # noqa: S108  (the container's own)
        }
        mounts = {repository.folder: "/github/workspace", files: "/github/files"}
        started = time.monotonic()
        code = engine.run(IMAGE, mounts, environment, ["action"])
        seconds = time.monotonic() - started
        outputs, summary = read_outputs(files / "output"), (files / "summary").read_text()
        if code or outputs.get("changed") != '["recipes/four.yaml"]' or "24.15 B" not in summary:
            raise Failed(f"the entry returned {code} with outputs {outputs} and the summary:\n{summary}")
    return seconds


class Failed(Exception):
    """A command that was needed failed."""


def run(command: Sequence[str], *, check: bool = True, quiet: bool = False, seconds: float | None = None) -> int:
    """Run a command; its output is shown unless `quiet`, and then still shown where it failed and was needed."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    try:
        done = subprocess.run(command, timeout=seconds, check=False, **piped)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return 124
    if check and done.returncode:
        said = (done.stdout or b"").decode(errors="replace")[-2000:]
        raise Failed(f"{' '.join(command[:3])} … returned {done.returncode}\n{said}".rstrip())
    return int(done.returncode)


def output(command: Sequence[str]) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[:3])} … returned {done.returncode}\n{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
