"""`edge install`: what it asks of pip, and which virtual environments it makes again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edge import install as edge_install
from edge.install import InstallSettings, install

Commands = list[list[str]]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: Any) -> Commands:
    """What is run of a system that lies in `tmp_path`; a virtual environment that is made has a pip that works."""
    run: Commands = []

    def note(command: list[str]) -> None:
        run.append(list(command))
        if command[1:3] == ["-m", "venv"]:
            shutil.rmtree(edge_install.VENV, ignore_errors=True)
            make_python("exit 0")

    for name in ("VENV", "CONFIG", "STATE", "UNITS"):
        monkeypatch.setattr(edge_install, name, tmp_path / name.lower())
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(edge_install, "_run", note)
    monkeypatch.setattr(edge_install, "_require_root", lambda: None)
    monkeypatch.setattr(edge_install, "_user_exists", lambda: True)
    return run


def make_python(body: str) -> None:
    """A virtual environment's interpreter, as a shell script."""
    program = edge_install.VENV / "bin/python"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def made(commands: Commands) -> int:
    """How often a virtual environment was made."""
    return sum(command[1:3] == ["-m", "venv"] for command in commands)


def test_a_wheel_or_folder_brings_what_the_agent_needs(tmp_path: Path, commands: Commands) -> None:
    wheel = tmp_path / "splitward-0.1.0-py3-none-any.whl"
    wheel.touch()
    for given, wanted in (
        (str(wheel), f"{wheel}[edge,edge-tflite]"),
        (str(tmp_path), f"{tmp_path}[edge,edge-tflite]"),
        (f"{wheel}[edge]", f"{wheel}[edge]"),
        ("splitward[edge,camera]", "splitward[edge,camera]"),
    ):
        commands.clear()
        install(InstallSettings(given), lambda _: None)
        packages = [command[-1] for command in commands if command[1:4] == ["-m", "pip", "install"]]
        assert set(packages) == {wanted}


def test_what_is_there_is_replaced_and_then_what_it_needs_is_added(commands: Commands) -> None:
    install(InstallSettings("splitward[edge]", ("--constraint", "file")), lambda _: None)
    pip = [command[4:] for command in commands if command[1:4] == ["-m", "pip", "install"]]
    assert pip == [
        ["--quiet", "--constraint", "file", "--force-reinstall", "--no-deps", "splitward[edge]"],
        ["--quiet", "--constraint", "file", "splitward[edge]"],
    ]


@pytest.mark.parametrize("python", [None, "exit 1", "exec /nowhere"], ids=["none", "without pip", "broken"])
def test_a_virtual_environment_without_pip_is_made_again(commands: Commands, python: str | None) -> None:
    if python is not None:
        make_python(python)
    install(InstallSettings("splitward[edge]"), lambda _: None)
    assert made(commands) == 1
    install(InstallSettings("splitward[edge]"), lambda _: None)
    assert made(commands) == 1, "it works"
