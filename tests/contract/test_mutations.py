"""Mutated messages are refused with a reason, or mean what their bytes say; benchmarks/mutations.py tries a million."""

from __future__ import annotations

import random

from benchmarks.mutations import corpus, judge, run


def test_mutated_messages_are_refused_or_understood() -> None:
    report = run(20_000, seed=1)
    assert report["crashes"] == report["wrong_decodes"] == 0
    assert report["understood"] > 500
    assert len(report["refused"]) > 10, "the mutations reach few of the rules"


def test_good_messages_are_understood() -> None:
    assert {judge(message) for message in corpus(random.Random(3))} == {"understood"}
