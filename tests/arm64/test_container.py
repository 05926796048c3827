"""The device's container: what is in it, what is not, and that the agent starts in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from firmware_sim.arm64.user import run_in_root
from splitward.image.cli import DEFAULT_CACHE
from splitward.image.root import build_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
REPOSITORY = Path(__file__).resolve().parents[2]
MAX_MB = 120


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, emulated_root: Path, mirror: str) -> Path:
    """OCI archive, built on a base of the image's own packages."""
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed: apt install buildah")
    given = os.environ.get("SPLITWARD_CONTAINER")
    if given:  # one that was built already
        return Path(given)
    folder = tmp_path_factory.mktemp("container")
    base = folder / "base"
    build_base(base, DEFAULT_CACHE.expanduser(), mirror, with_test=True, with_agent=False)
    out = folder / "edge.oci.tar"
    subprocess.run([str(REPOSITORY / ".ci/container"), str(out), str(base)], check=True)
    return out


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> tuple[Path, dict[str, Any]]:
    """The container's root, unpacked, and its configuration."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "oci", filter="data")

    def read(digest: str) -> Path:
        return folder / "oci" / "blobs" / digest.replace(":", "/")

    index = json.loads((folder / "oci/index.json").read_text())
    manifest = json.loads(read(index["manifests"][0]["digest"]).read_text())
    root = folder / "root"
    root.mkdir()
    for layer in manifest["layers"]:
        subprocess.run(["tar", "--zstd", "-xf", str(read(layer["digest"])), "-C", str(root)], check=True)
    return root, json.loads(read(manifest["config"]["digest"]).read_text())


def test_it_is_small(archive: Path) -> None:
    assert archive.stat().st_size <= MAX_MB * 1_000_000


def test_it_runs_as_nobody_in_particular(content: tuple[Path, dict[str, Any]]) -> None:
    _, settings = content
    assert settings["architecture"] == "arm64"
    config = settings["config"]
    assert config["User"] == "900:900"
    assert set(config["Volumes"]) == {"/var/lib/splitward", "/models"}
    assert config["Entrypoint"] == ["python3", "-m", "edge"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"]


def test_it_holds_no_torch_and_no_compiler(content: tuple[Path, dict[str, Any]]) -> None:
    root, _ = content
    packages = root / "usr/local/lib/python3.11/dist-packages"
    assert (packages / "edge/agent.py").exists()
    assert (packages / "onnxruntime").is_dir()
    for name in ("torch", "cloud", "export", "splitward/method"):
        assert not (packages / name).exists(), name
    assert not [name for name in ("gcc", "cc", "g++", "make") if (root / "usr/bin" / name).exists()]


def test_the_agent_starts_in_it(content: tuple[Path, dict[str, Any]]) -> None:
    root, _ = content
    done = run_in_root(
        root, ["/usr/bin/python3", "-m", "edge", "run", "--config", "/nowhere.toml"], timeout_s=120
    )
    assert done.returncode == 2, done.stderr
    assert "/nowhere.toml: no such file" in done.stderr
    done = run_in_root(
        root, ["/usr/bin/python3", "-c", "import cv2, onnxruntime, ai_edge_litert.interpreter"], timeout_s=120
    )
    assert done.returncode == 0, done.stderr
