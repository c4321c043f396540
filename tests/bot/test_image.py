"""The images and workflows as files: what the linters do not know of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml


def test_every_action_is_pinned_by_its_whole_commit(root: Path) -> None:
    files = [*(root / ".github/workflows").glob("*.yml"), root / "docs/action.md"]
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            used = re.search(r"^\s*-?\s*uses: (\S+)(.*)", line)
            if used and not used[1].startswith(("./", "OWNER/moerge")):
                assert re.search(r"@[0-9a-f]{40}$", used[1]) and re.match(r" # v\d+\.\d+\.\d+$", used[2]), line


def test_the_image_gets_every_package_of_the_wheel_and_nothing_else(root: Path) -> None:
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    lines = (root / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines and kept == {*packages, "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}


def test_the_last_stage_is_the_preview_since_github_builds_the_last(root: Path) -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)", (root / "Dockerfile").read_text(), re.MULTILINE)
    assert stages[-1] == ("preview", "action") and {"preview", "build"} <= {name for _, name in stages}


def test_a_release_s_action_names_its_image_by_digest(root: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts/pin_image.sh", tmp_path / "scripts")
    shutil.copy(root / "action.yml", tmp_path)
    image = f"ghcr.io/me/moerge@sha256:{'ab' * 32}"
    subprocess.run([tmp_path / "scripts/pin_image.sh", image], check=True)
    before, after = (yaml.safe_load((folder / "action.yml").read_text()) for folder in (root, tmp_path))
    assert before["runs"].pop("image") == "Dockerfile"
    assert after["runs"].pop("image") == f"docker://{image}"
    assert before == after


@pytest.mark.parametrize("image", ["ghcr.io/me/moerge:1", "ghcr.io/me/moerge@sha256:ab", f"x|y@sha256:{'ab' * 32}"])
def test_only_a_digest_is_recorded(root: Path, image: str) -> None:
    assert subprocess.run([root / "scripts/pin_image.sh", image], capture_output=True, check=False).returncode == 2


# -------------------------------------------------------------------------------------------------------------- the version


def test_the_version_stands_once_and_all_that_names_it_agrees(root: Path) -> None:
    from merge import __version__

    said = subprocess.run([root / "scripts/version.sh"], capture_output=True, text=True, check=True).stdout.strip()
    assert said == __version__
    # The reusable workflow takes the images of its own version.
    build = yaml.safe_load((root / ".github/workflows/build.yml").read_text())
    [step] = build["jobs"]["images"]["steps"]
    assert step["env"]["VERSION"] == __version__
    major = __version__.partition(".")[0]
    named = 0
    for page in (root / "README.md", *(root / "docs").glob("*.md"), root / "action.yml"):
        for found in re.findall(r"OWNER/moerge(?:/\S*)?@v([\w.]+)|OWNER/moerge(?:-build)?:([\w.]+)", page.read_text()):
            named += 1
            assert "".join(found) in (major, __version__), page
    assert named
    assert f"`v{major}`" in (root / "docs/action.md").read_text()
    changes = (root / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changes or f"## {__version__}" in changes


@pytest.mark.parametrize(("tag", "code"), [("", 1), ("v9.9.9", 1), ("0.1.0", 1), ("v0.1.0-rc1", 1), ("v0.1.0;x", 1)])
def test_a_tag_that_is_not_the_package_s_version_stops_its_release(root: Path, tag: str, code: int) -> None:
    from merge import __version__

    done = subprocess.run([root / "scripts/version.sh", tag], capture_output=True, check=False)
    assert done.returncode == (0 if tag == f"v{__version__}" else code)


def test_a_release_moves_the_tag_of_its_major_version_and_no_other(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github/workflows/image.yml").read_text())
    assert workflow[True]["push"] == {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}
    script = workflow["jobs"]["pin"]["steps"][-1]["run"]
    target = re.search(r"HEAD:refs/tags/(\$\{RELEASE%%\.\*\})", script)
    assert target
    moved = subprocess.run(
        ["bash", "-c", f'RELEASE=v1.2.3; echo "{target[1]}"'], capture_output=True, text=True, check=True
    )
    assert moved.stdout.strip() == "v1"


def test_the_reusable_workflow_takes_two_images_by_digest_or_stops(root: Path, tmp_path: Path) -> None:
    """Its script, with a curl that brings a file of ours."""
    build = yaml.safe_load((root / ".github/workflows/build.yml").read_text())
    script = build["jobs"]["images"]["steps"][0]["run"]
    (tmp_path / "curl").write_text('#!/bin/sh\n[ "$8" = images.txt ] && cp "$ASSET" images.txt\n')
    (tmp_path / "curl").chmod(0o755)
    digest, output = f"@sha256:{'ab' * 32}", tmp_path / "output"
    good = f"ghcr.io/me/moerge{digest}\nghcr.io/me/moerge-build{digest}\n"
    for text, given, code in (
        (good, {}, 0),
        ("ghcr.io/me/moerge:1\nghcr.io/me/moerge-build:1\n", {}, 1),
        ("", {}, 1),
        ("<html>", {"PREVIEW": "a", "BUILD": "b"}, 0),
    ):
        (tmp_path / "asset").write_text(text)
        output.write_text("")
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "ASSET": str(tmp_path / "asset"), "GITHUB_OUTPUT": str(output),
            "GITHUB_SERVER_URL": "https://github.com", "REPOSITORY": "me/moerge", "VERSION": "1.0.0", "PREVIEW": "", "BUILD": "",
        } | given  # fmt: skip
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == code, text
        if code == 0:
            images = [f"ghcr.io/me/moerge{digest}", f"ghcr.io/me/moerge-build{digest}"] if not given else ["a", "b"]
            assert output.read_text() == f"preview={images[0]}\nbuild={images[1]}\n"
