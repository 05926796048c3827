"""The releaser hangs, crashes and comes back; the agent goes on, and ends only when its budget is spent."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge.agent import run_agent
from edge.config import CaptureConfig, EdgeConfig, RuntimeConfig
from edge.errors import BackendError, CaptureError, ReleaserError
from edge.supervisor import launch
from firmware_sim.broker import Broker
from firmware_sim.processes import children_of
from splitward.wire.bundle import InputSpec
from tests.integration.cloud_double import TIMEOUT_S, cloud_at, configure, read_answers, running, start_process


def hanging_client() -> bytes:
    """The tiny client half, which goes round a loop for hours where the frame has a white pixel."""
    from onnx import TensorProto, helper

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["go_on"]),
            helper.make_node("Tanh", ["value"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    constants = {
        "white": helper.make_tensor("white", TensorProto.FLOAT, [], [0.999]),
        "many": helper.make_tensor("many", TensorProto.INT64, [], [10**12]),
        "none": helper.make_tensor("none", TensorProto.INT64, [], [0]),
        "true": helper.make_tensor("true", TensorProto.BOOL, [], [True]),
        "zero": helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
    }
    # Of the first channel, the frame itself: the second is the map, which is never white.
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["brightest"], keepdims=0),
        helper.make_node("Greater", ["brightest", "white"], ["is_white"]),
        helper.make_node("Where", ["is_white", "many", "none"], ["turns"]),
        helper.make_node("Loop", ["turns", "true", "x"], ["spent"], body=body),
        helper.make_node("Mul", ["spent", "zero"], ["nothing"]),
        helper.make_node("Tanh", ["x"], ["y0"]),
        helper.make_node("Add", ["y0", "nothing"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "client",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 8])],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.fixture
def hanging_bundle(tiny_bundle: Any, tmp_path: Path) -> Any:
    import io

    frame = np.linspace(0, 0.9, 64, dtype=np.float32).reshape(1, 8, 8)
    activation = np.tanh(np.concatenate((frame, np.tanh(frame))))
    arrays = {}
    for name, array in (("golden-frame.npy", frame), ("golden-activation.npy", activation)):
        file = io.BytesIO()
        np.save(file, array)
        arrays[name] = file.getvalue()
    return tiny_bundle.rewrite(tmp_path / "hanging.bundle", {"client.onnx": hanging_client(), **arrays})


def write_images(folder: Path, count: int, white: int) -> None:
    folder.mkdir()
    for index in range(count):
        pixels = np.full((8, 8), 255 if index == white else 10 + index, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def test_a_frame_that_hangs_the_runtime_is_set_aside_and_the_others_go_on(
    tmp_path: Path, mosquitto: Broker, hanging_bundle: Any
) -> None:
    config = configure(tmp_path, mosquitto, hanging_bundle, 1, runtime=RuntimeConfig(deadline_s=0.5))
    images = tmp_path / "images"
    write_images(images, 8, white=3)
    config = msgspec.structs.replace(config, capture=CaptureConfig(kind="folder", path=str(images), sort=True))
    with cloud_at(mosquitto):
        report = run_agent(config, until_answered=True)
    assert report.results == 7
    assert report.dropped == {"crashed": 1}
    assert sorted(read_answers(tmp_path)) == [f"{index:02d}.png" for index in range(8) if index != 3]
    assert len(list((images / "done").iterdir())) == 7
    assert json.loads((images / "failed" / "03.png.json").read_bytes())["reason"] == "crashed"
    assert not list(images.glob("*.png"))


def test_a_frame_that_cannot_be_released_is_no_file_that_is_done(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    padding = tiny_bundle.rewrite(tmp_path / "padding.bundle", input=InputSpec(1, 8, 8, fit="pad"))
    images = tmp_path / "images"
    write_images(images, 2, white=-1)
    Image.fromarray(np.zeros((3000, 9000), np.uint8)).save(images / "long.png")
    capture = CaptureConfig(kind="folder", path=str(images), sort=True, keep_done_s=0.0)
    config = msgspec.structs.replace(configure(tmp_path, mosquitto, padding, 1), capture=capture)
    with cloud_at(mosquitto):
        for _ in range(2):
            report = run_agent(config, until_answered=True)
            assert report.dropped == {"unreadable": 1}
            assert sorted(path.name for path in images.glob("**/*.*")) == ["long.png", "long.png.json"]
            failure = json.loads((images / "failed" / "long.png.json").read_bytes())
            assert failure["reason"] == "unreadable"
            assert failure["message"].startswith("long.png: ")


def test_a_frame_that_ends_the_releaser_is_set_aside_though_the_agent_ends_with_it(
    tmp_path: Path, mosquitto: Broker, hanging_bundle: Any
) -> None:
    runtime = RuntimeConfig(deadline_s=0.5, restarts=0)
    config = configure(tmp_path, mosquitto, hanging_bundle, 1, runtime=runtime)
    images = tmp_path / "images"
    write_images(images, 4, white=1)
    config = msgspec.structs.replace(config, capture=CaptureConfig(kind="folder", path=str(images), sort=True))
    with cloud_at(mosquitto):
        for _ in range(2):
            with pytest.raises(ReleaserError):
                run_agent(config, until_answered=True)
        report = run_agent(config, until_answered=True)
    assert report.dropped == {"crashed": 1}
    assert sorted(read_answers(tmp_path)) == ["00.png", "02.png", "03.png"]
    assert (images / "failed" / "01.png").exists()


def test_a_releaser_that_keeps_dying_ends_the_agent_for_its_supervisor(
    tmp_path: Path, mosquitto: Broker, hanging_bundle: Any
) -> None:
    runtime = RuntimeConfig(deadline_s=0.3, restarts=2)
    config = configure(tmp_path, mosquitto, hanging_bundle, 1, runtime=runtime)
    np.savez(config.capture.path, images=np.full((9, 8, 8), 255, np.uint8))
    with cloud_at(mosquitto) as cloud:
        with pytest.raises(ReleaserError, match="3 times"):
            run_agent(config, until_answered=True)
        process = start_process(config, tmp_path)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 75
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")


def test_a_killed_or_stopped_releaser_comes_back_and_no_frame_is_lost(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, monkeypatch: Any
) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 150, capture=CaptureConfig(rate_hz=50))
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path, "--until-answered")
        cloud.wait(lambda: len(cloud.answers) > 20)
        (releaser,) = children_of(process.pid)
        subprocess.run(["kill", "-SEGV", str(releaser)], check=True)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert json.loads(output)["dropped"] == {}
    assert len(read_answers(tmp_path)) == len(cloud.answers) == 150


def test_neither_process_leaves_its_memory_behind(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        config = configure(tmp_path, mosquitto, tiny_bundle, 150, capture=CaptureConfig(rate_hz=50))
        alone = launch()
        with cloud_at(mosquitto) as cloud:
            process = start_process(config, tmp_path)
            cloud.wait(lambda: len(cloud.answers) > 0)
            agent_and_releaser = (process.pid, *children_of(process.pid))
            limits = [resource.prlimit(one, resource.RLIMIT_CORE)[0] for one in agent_and_releaser]
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)
            # Started by no command line, and waiting to be told what to run.
            cloud.wait(lambda: resource.prlimit(alone.process.pid, resource.RLIMIT_CORE)[0] == 0)
        alone.pipe.close()
        alone.process.wait(TIMEOUT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert limits == [0, 0]


def test_what_cannot_start_is_said_by_its_own_error(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    nowhere = msgspec.structs.replace(config.capture, path=str(tmp_path / "nowhere.npz"))
    with pytest.raises(CaptureError, match="nowhere"):
        run_agent(msgspec.structs.replace(config, capture=nowhere))
    runtime = RuntimeConfig(providers=("cuda",))
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        run_agent(msgspec.structs.replace(config, runtime=runtime))


def test_several_sources_share_one_agent(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 20)
    images = tmp_path / "images"
    write_images(images, 5, white=-1)
    more = (
        CaptureConfig(name="ward", kind="folder", path=str(images), priority=5),
        CaptureConfig(name="copy", path=config.capture.path),
    )
    config = msgspec.structs.replace(config, sources=more)
    with cloud_at(mosquitto) as cloud:
        report = run_agent(config, until_answered=True)
    names = read_answers(tmp_path)
    assert report.results == len(names) == len(cloud.answers) == 45
    assert {name.split("/")[0] for name in names if "/" in name} == {"ward", "copy"}
    twice = msgspec.structs.replace(config, sources=(*more, more[0]))
    with pytest.raises(CaptureError, match="'ward'"):
        run_agent(twice)


def test_a_source_that_has_nothing_does_not_keep_the_room_for_one_frame(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    images, empty = tmp_path / "images", tmp_path / "empty"
    write_images(images, 5, white=-1)
    empty.mkdir()
    idle = CaptureConfig(kind="folder", path=str(empty), watch=True, max_unanswered=1)
    busy = CaptureConfig(name="ward", kind="folder", path=str(images), max_unanswered=1)
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    with cloud_at(mosquitto) as cloud, running(msgspec.structs.replace(config, capture=idle, sources=(busy,))):
        cloud.wait(lambda: len(cloud.answers) == 5)


def test_the_agent_loads_no_camera_library_and_no_numpy_beside_the_spool(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    # More frames than the test waits for: a releaser that has none left ends.
    capture = CaptureConfig(rate_hz=20, max_unanswered=8)
    config = configure(tmp_path, mosquitto, tiny_bundle, 2000, capture=capture)
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path)
        try:
            cloud.wait(lambda: len(cloud.answers) >= 5)
            (releaser,) = children_of(process.pid)
            maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, releaser)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=TIMEOUT_S)
    assert all("/cv2" not in text for text in maps.values())
    assert "/numpy/" not in maps[process.pid]
    assert "/cryptography/" not in maps[process.pid] + maps[releaser]
    assert "/onnxruntime/" in maps[releaser]
    assert "_ssl" not in maps[releaser], "what sees pixels has no network"


def test_a_releaser_without_an_agent_ends(tmp_path: Path) -> None:
    import socket

    from edge.pipe import Page

    page = Page()
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge.releaser", str(theirs.fileno()), str(page.descriptor)],
        pass_fds=[theirs.fileno(), page.descriptor],
    )
    theirs.close()
    ours.close()
    assert process.wait(TIMEOUT_S) == 0
    page.close()


def test_the_page_tells_what_was_opened_last() -> None:
    from edge.pipe import Opened, Page

    ours = Page()
    theirs = Page(os.dup(ours.descriptor))
    assert ours.read().number == 0
    theirs.write(Opened(1, "ward/längeres Bild.dcm", True))
    assert ours.read() == Opened(1, "ward/längeres Bild.dcm", True)
    theirs.write(Opened(2, "b", False))
    assert ours.read() == Opened(2, "b", False)
    theirs.write(Opened(3, "ä" * 5000, False))
    assert ours.read().number == 3
    assert set(ours.read().name) <= {"ä", "\N{REPLACEMENT CHARACTER}"}
    ours.close()
    theirs.close()


def test_the_default_configuration_is_sent_whole() -> None:
    from edge.pipe import Start

    start = Start(EdgeConfig(), "b", b"", ())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=Start) == start
