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
