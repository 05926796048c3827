"""The fleet's keys: made once, whole, and the same for every worker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from cloud.authority import FILES, Authority
from splitward.errors import ConfigError


class PowerCutError(Exception):
    """Nothing more reaches the disk."""


def test_keys_whose_making_was_cut_off_anywhere_are_made_at_the_next_start(tmp_path, monkeypatch):
    fsync, replace = os.fsync, Path.replace
    for allowed in count():
        folder, left = tmp_path / str(allowed), iter(range(allowed))

        def step(inner, left=left):
            def call(*arguments):
                if next(left, None) is None:
                    raise PowerCutError
                return inner(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", step(fsync))
            patch.setattr(Path, "replace", step(replace))
            try:
                Authority(folder)
                break
            except PowerCutError:
                pass  # one step further in the next round
        assert Authority(folder).pem == Authority(folder).pem
    assert allowed == 3 * len(FILES)  # the file, its name, the folder


def test_workers_that_start_together_share_one_authority(tmp_path):
    program = "import sys, pathlib, cloud.authority as a; print(a.Authority(pathlib.Path(sys.argv[1])).pem)"
    command = [sys.executable, "-c", program, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert told == {Authority(tmp_path).pem.strip()}


def test_only_the_owner_reads_the_keys(tmp_path):
    Authority(tmp_path)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in FILES] == [0o600, 0o600, 0o600, 0o644]


@pytest.mark.parametrize("lost", FILES[:-1])
def test_a_lost_key_is_named_and_no_other_is_made_for_it(lost, tmp_path):
    Authority(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ConfigError, match=rf"{lost} is missing. Restore the keys from a copy"):
        Authority(tmp_path)
    assert not (tmp_path / lost).exists()


def test_a_key_of_another_authority_is_refused(tmp_path):
    for name in ("one", "other"):
        Authority(tmp_path / name)
    shutil.copy(tmp_path / "other" / FILES[0], tmp_path / "one" / FILES[0])
    with pytest.raises(ConfigError, match=r"authority.key is not the key of authority.pem. Restore"):
        Authority(tmp_path / "one")


def test_a_client_id_is_the_same_at_each_start_and_nobodys_guess(tmp_path):
    told = [Authority(tmp_path / folder).client_id("worker") for folder in ("one", "one", "other")]
    assert told[0] == told[1] != told[2]
    assert re.fullmatch(r"worker-[0-9a-f]{16}", told[0])
    assert Authority(tmp_path / "one").client_id("worker-2")[8:] != told[0][6:]


def test_a_damaged_key_is_named_and_kept(tmp_path):
    Authority(tmp_path)
    (tmp_path / FILES[1]).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Restore the keys from a copy"):
        Authority(tmp_path)
    assert (tmp_path / FILES[1]).read_bytes() == b""


@pytest.mark.parametrize("name", FILES[:3])
def test_a_key_that_everybody_may_use_is_refused(name, tmp_path):
    Authority(tmp_path)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(
        ConfigError, match=rf"everybody may use {name} \(mode 644\). chmod 600 it if it never left"
    ):
        Authority(tmp_path)
    (tmp_path / name).chmod(0o640)  # as a volume that is made a group's own
    Authority(tmp_path)
