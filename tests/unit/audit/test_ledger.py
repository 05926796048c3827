"""The ledger loses no finished cell, and never mixes two audits."""

from __future__ import annotations

import pytest

from splitward.audit.ledger import Ledger
from splitward.errors import AuditError

SETTINGS = {"target": "abc", "auxiliary": 10}
KEY, OTHER = {"attack": "ridge", "seed": 0}, {"attack": "ridge", "seed": 1}


def test_a_cell_survives_the_process(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    ledger = Ledger(path, SETTINGS)
    assert ledger.find(KEY) is None
    ledger.append(KEY, {"ssim": 0.5})
    assert ledger.find(KEY) == {"ssim": 0.5}
    again = Ledger(path, SETTINGS)
    assert again.find({"seed": 0, "attack": "ridge"}) == {"ssim": 0.5}
    assert again.find(OTHER) is None


def test_the_last_result_of_a_cell_counts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", SETTINGS)
    ledger.append(KEY, {"reason": "no memory"})
    ledger.append(KEY, {"ssim": 0.5})
    assert Ledger(ledger.path, SETTINGS).find(KEY) == {"ssim": 0.5}


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, kept):
    ledger = Ledger(tmp_path / "ledger.jsonl", SETTINGS)
    ledger.append(KEY, {"ssim": 0.5})
    whole = ledger.path.read_bytes()
    ledger.append(OTHER, {"ssim": 0.6})
    last = ledger.path.read_bytes()[len(whole) :]
    ledger.path.write_bytes(whole + last[:kept])
    again = Ledger(ledger.path, SETTINGS)
    assert again.find(KEY) == {"ssim": 0.5}
    assert again.find(OTHER) is None
    again.append(OTHER, {"ssim": 0.7})
    assert ledger.path.read_bytes() == whole + last.replace(b"0.6", b"0.7")


def test_a_torn_first_line_begins_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"settings": {"tar')
    Ledger(path, SETTINGS)
    assert Ledger(path, SETTINGS).find(KEY) is None


def test_other_settings_are_refused(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", SETTINGS)
    before = ledger.path.read_bytes()
    with pytest.raises(AuditError, match=r"another audit \(auxiliary 10 there, 20 now\).*--out"):
        Ledger(ledger.path, {**SETTINGS, "auxiliary": 20})
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"key": {}}', "\xff"])
def test_damage_within_is_named(tmp_path, line):
    ledger = Ledger(tmp_path / "ledger.jsonl", SETTINGS)
    with ledger.path.open("a") as file:
        file.write(line + "\n")
    ledger.append(KEY, {"ssim": 0.5})
    with pytest.raises(AuditError, match=r"ledger\.jsonl, line 2: is damaged"):
        Ledger(ledger.path, SETTINGS)
