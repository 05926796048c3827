"""The command line: what it says, what it refuses, and that an error is one line."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from splitward import __version__
from splitward.cli import main
from splitward.training.run import create_run
from splitward.training.settings import RunSettings, frame_settings
from splitward.wire.bundle import read_signing_key, read_trusted_key

COMMANDS = ("demo", "data", "train", "export", "audit", "keygen")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it refuses: one line, and 2."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("splitward: ")
    assert output.err.count("\n") == 1
    return output.err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} ", said, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: splitward {command}" in capsys.readouterr().out


def test_the_help_of_train_names_every_defence(capsys, monkeypatch):
    from splitward.method.split import COMPARED, DEFENCES

    monkeypatch.setenv("COLUMNS", "1000")  # names with hyphens are broken at the end of a line
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  --defence "))
    assert set(DEFENCES | COMPARED) <= set(re.findall(r"[a-z-]+", said))


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "--data", "phantom"],
        ["train", "--data", "phantom", "--out", "r", "--epochs", "x"],
        ["demo", "--frames", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "splitward" in capsys.readouterr().err


def test_an_error_of_a_real_process_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "splitward.cli", "export", str(tmp_path / "no-run"), "--out", "x.bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"splitward: .*no-run: is not a run folder.*\n", done.stderr)


def test_an_unknown_data_set_is_explained(capsys):
    with_layouts = main(["data", "/no/such/folder"])
    assert with_layouts == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_what_a_profile_does_not_have_is_refused(capsys, tmp_path):
    arguments = [
        "train",
        "--data",
        "phantom",
        "--size",
        "28",
        "--out",
        str(tmp_path / "run"),
        "--defence",
        "none",
    ]
    assert "none has no seal" in refused([*arguments, "--values", "8"], capsys)
    assert "none has no map" in refused([*arguments, "--eps", "0.1"], capsys)
    assert not (tmp_path / "run").exists()


def test_data_describes_a_data_set(capsys):
    assert main(["data", "phantom", "--size", "16"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["synthetic"] is True
    assert described["frame"] == [1, 16, 16]
    assert described["classes"] == ["normal", "mass"]


def test_keygen_makes_a_private_key_and_never_overwrites_it(tmp_path, capsys):
    path = tmp_path / "keys" / "signing.key"
    assert main(["keygen", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public = path.with_name("signing.key.pub")
    assert str(public) in capsys.readouterr().out
    assert read_signing_key(path).public_key() == read_trusted_key(public)
    before = path.read_bytes(), public.read_bytes()
    assert "exists already" in refused(["keygen", str(path)], capsys)
    assert (path.read_bytes(), public.read_bytes()) == before


@pytest.mark.parametrize("out", ["FILE", "FILE/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_is_one_line(tmp_path, capsys, out):
    (tmp_path / "FILE").write_text("a file")
    path = tmp_path / out
    assert str(path) in refused(["train", "--data", "phantom", "--size", "28", "--out", str(path)], capsys)
    in_the_way = tmp_path / "FILE" if "FILE" in out else path
    assert str(in_the_way) in refused(["keygen", str(path / "key")], capsys)
    assert (tmp_path / "FILE").read_text() == "a file"


@pytest.mark.parametrize("broker", ["host", ":1883", "host:0", "host:99999", "host:١٢", "a..b:1883"])
def test_a_broker_that_cannot_be_is_refused(tmp_path, capsys, broker):
    arguments = ["coordinate", "--data", "phantom", "--size", "28", "--out", str(tmp_path / "lead")]
    assert "ive HOST:PORT" in refused([*arguments, "--broker", broker], capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--cert", "c.pem", "--key", "c.key"), "without --ca"),
        (("--cert", "c.pem"), "go together"),
        (("--ca", "ca.pem", "--key", "c.key"), "go together"),
        (("--ca", "ca.pem", "--cert", "c.pem", "--key", "c.key"), "No such file or directory: 'ca.pem'"),
    ],
)
def test_a_connection_is_never_plain_because_something_was_left_out(tmp_path, capsys, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    assert main(["coordinate", "--data", "phantom", "--size", "28", "--out", "lead", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ("--training", "00" * 16),
        ("--device", "d"),
        ("--peer", "p"),
        ("--broker", "b:1"),
        ("--no-guard",),
        ("--labels", "client"),
    ],
)
def test_nobody_trains_alone_who_forgot_over(tmp_path, capsys, given):
    arguments = ["train", "--data", "phantom", "--size", "28", "--out", str(tmp_path / "run"), *given]
    assert f"{given[0]}: only with --over mqtt" in refused(arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_a_site_that_is_no_name_is_refused(tmp_path, capsys):
    arguments = ["train", "--data", "phantom", "--size", "28", "--out", str(tmp_path / "run"), "--over", "mqtt"]
    said = refused([*arguments, "--training", "00" * 16, "--device", "d", "--site", "x/+"], capsys)
    assert "--site x/+: give a name" in said


@pytest.mark.parametrize("extra", [("--clip", "nan"), ("--clip", "inf"), ("--clip", "1", "--noise", "nan")])
def test_a_plan_outside_its_ranges_is_refused(tmp_path, capsys, extra):
    arguments = ["coordinate", "--data", "phantom", "--size", "28", "--out", str(tmp_path / "lead"), *extra]
    assert "no negative or endless clip" in refused(arguments, capsys)


def test_no_key_is_made_for_an_export_that_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("splitward.cli.DEFAULT_KEY", tmp_path / "home" / "signing.key")
    split = frame_settings(1, 28, 2, "sealed")
    create_run(tmp_path / "run", RunSettings("phantom", None, 28, split, epochs=1), {})
    said = refused(["export", str(tmp_path / "run"), "--out", str(tmp_path / "a.zip")], capsys)
    assert "a bundle's name ends in .bundle" in said
    assert not (tmp_path / "home").exists()


def test_an_interrupt_is_not_a_traceback(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("splitward.data.open_dataset", interrupted)
    assert main(["data", "phantom"]) == 130
    assert capsys.readouterr().err == "splitward: interrupted.\n"


def test_the_command_line_starts_without_the_heavy_libraries():
    code = "import sys, splitward.cli; print({'torch', 'onnxruntime', 'fastapi', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_missing_signing_key_is_explained(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert "cannot be used" in refused(["export", str(tmp_path), "--out", str(tmp_path / "x.bundle")], capsys)
    assert not list(Path(tmp_path).glob("*.bundle"))
