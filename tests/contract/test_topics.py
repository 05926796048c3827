"""Topics: what is built is parsed back, everything else is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitward.errors import WireError
from splitward.wire import topics

BUILDERS = (
    topics.activation,
    topics.result,
    topics.status,
    topics.command,
    topics.bundle,
    topics.outcome,
)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


def test_golden_topics() -> None:
    assert [build("ward-7", "pi_4") for build in BUILDERS] == [
        "splitward/v1/ward-7/pi_4/activation",
        "splitward/v1/ward-7/pi_4/result",
        "splitward/v1/ward-7/pi_4/status",
        "splitward/v1/ward-7/pi_4/command",
        "splitward/v1/ward-7/pi_4/bundle",
        "splitward/v1/ward-7/pi_4/outcome",
    ]
    assert topics.every_activation("cloud") == "$share/cloud/splitward/v1/+/+/activation"
    assert topics.every_status() == "splitward/v1/+/+/status"


@pytest.mark.parametrize("build", BUILDERS)
@given(site=NAMES, device=NAMES)
def test_every_topic_is_parsed_back(build: Callable[[str, str], str], site: str, device: str) -> None:
    assert topics.parse(build(site, device)) == (site, device, build.__name__)


@given(NAMES, NAMES)
def test_the_filters_cover_the_topics_that_the_cloud_reads(site: str, device: str) -> None:
    _, _, activations = topics.every_activation("cloud").split("/", 2)
    for filters, topic in (
        (activations, topics.activation(site, device)),
        (topics.every_status(), topics.status(site, device)),
        (topics.every_outcome(), topics.outcome(site, device)),
    ):
        levels = list(zip(filters.split("/"), topic.split("/"), strict=True))
        assert all(level in ("+", part) for level, part in levels)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "splitward/v1",
        "splitward/v1/site/device",
        "splitward/v1/site/device/activation/more",
        "splitward/v1/site/device/activation/",
        "/splitward/v1/site/device/activation",
        "splitward/v2/site/device/activation",
        "Splitward/v1/site/device/activation",
        "splitward/v1//device/activation",
        "splitward/v1/site//activation",
        "splitward/v1/+/device/activation",
        "splitward/v1/site/#/activation",
        "splitward/v1/site/-device/activation",
        "splitward/v1/site/device\n/activation",
        "splitward/v1/site/d\xe9vice/activation",
        "splitward/v1/si.te/device/activation",
        "splitward/v1/" + "s" * 65 + "/device/activation",
        "splitward/v1/site/device/",
        "splitward/v1/site/device/Activation",
        "splitward/v1/site/device/image",
        "$share/cloud/splitward/v1/+/+/activation",
    ],
)
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(WireError) as refused:
        topics.parse(topic)
    assert refused.value.reason == "bad_topic"


@pytest.mark.parametrize("form", ["{}", "splitward/v1/{}/device/status", "splitward/v1/site/device/{}"])
@given(text=st.text())
def test_any_text_is_a_topic_or_refused(form: str, text: str) -> None:
    topic = form.format(text)
    try:
        site, device, kind = topics.parse(topic)
    except WireError as error:
        reason = error.reason
    else:
        reason = "bad_topic"
        assert topic == f"splitward/v1/{site}/{device}/{kind}"
    assert reason == "bad_topic"
