"""Trainings as jobs of the service: what may be asked, and what becomes of the process that leads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud import audit, training

pytestmark = pytest.mark.anyio
START_S = 90.0
ASKED = {"name": "chest", "channels": 1, "side": 28, "classes": 2, "sites": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PERIOD_S", 0.05)


def folder_of(cloud) -> Path:
    return Path(cloud.parts.fleet.state_dir) / "trainings"


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what a new process brings about: it imports torch first, at a low priority."""
    async with asyncio.timeout(START_S):
        while not holds():
            await asyncio.sleep(0.05)


async def until(cloud, name: str, wanted: Callable[[dict], bool]) -> dict:
    """The training, once it is as `wanted`."""
    async with asyncio.timeout(START_S):
        while not wanted(found := (await cloud.http.get(f"/v1/trainings/{name}")).json()):
            await asyncio.sleep(0.05)
    return found


async def test_a_training_is_made_stopped_and_gone_on_with(cloud):
    answer = await cloud.http.post("/v1/trainings", json=ASKED)
    assert answer.status_code == 201, answer.text
    name = answer.json()["id"]
    found = await until(cloud, name, lambda found: bool(found["progress"]))
    assert found["progress"] | {"bytes_up": 0, "bytes_down": 0} == {
        "failure": "", "finished": False, "round": 0, "rounds": 1, "bytes_up": 0, "bytes_down": 0, "sites": [],
    }  # fmt: skip
    broker = folder_of(cloud) / "broker.json"
    assert broker.stat().st_mode & 0o777 == 0o600
    process = cloud.parts.trainings._process
    assert (await cloud.http.post(f"/v1/trainings/{name}/stop")).json()["state"] == "stopped"
    assert await asyncio.wait_for(process.wait(), 30) == 0
    again = await cloud.http.post(f"/v1/trainings/{name}/stop")
    assert (again.status_code, again.json()["reason"]) == (409, "wrong_state")
    assert (await cloud.http.post(f"/v1/trainings/{name}/resume")).json()["state"] == "running"
    assert [one.action for one in await audit.entries(cloud.parts.store)] == [
        "training.create", "training.stopped", "training.running",
    ]  # fmt: skip
    await cloud.parts.trainings.count()
    assert cloud.metric("splitward_trainings", state="running") == 1
    (listed,) = (await cloud.http.get("/v1/trainings")).json()["trainings"]
    assert listed["id"] == name


async def test_trainings_begun_at_once_are_no_more_than_may_run(run_cloud, postgres_url, monkeypatch):
    monkeypatch.setattr(training, "PERIOD_S", 3600.0)
    monkeypatch.setattr(training, "MAX_RUNNING", 2)
    async with run_cloud(url=postgres_url) as cloud:
        answers = await asyncio.gather(*(cloud.http.post("/v1/trainings", json=ASKED) for _ in range(5)))
    assert sorted(one.status_code for one in answers) == [201, 201, 409, 409, 409]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"defence": "armour"}, "defence 'armour' is not known"),
        ({"side": 30}, "multiple of 4"),
        ({"noise": 1.0}, "noise without clip"),
        ({"arrangement": "single"}, "single is for one client"),
    ],
)
async def test_what_cannot_be_planned_fails_and_says_why(cloud, wrong, words):
    name = (await cloud.http.post("/v1/trainings", json=ASKED | wrong)).json()["id"]
    found = await until(cloud, name, lambda found: found["state"] == "failed")
    assert words in found["reason"]


async def test_a_failed_training_that_is_resumed_is_opened_anew(cloud):
    name = (await cloud.http.post("/v1/trainings", json=ASKED | {"side": 30})).json()["id"]
    await until(cloud, name, lambda found: found["state"] == "failed")
    resumed = await cloud.http.post(f"/v1/trainings/{name}/resume")
    assert resumed.json()["state"] == "running"
    found = await until(cloud, name, lambda found: found["state"] == "failed")
    assert "multiple of 4" in found["reason"]


async def test_a_request_that_makes_no_sense_is_refused(cloud):
    for wrong in ({"classes": 1}, {"epochs": 0}, {"precision": "int3"}, {"colour": "red"}, {"name": "a b"}):
        assert (await cloud.http.post("/v1/trainings", json=ASKED | wrong)).status_code == 422
    assert (await cloud.http.get(f"/v1/trainings/{'0' * 32}")).status_code == 404
    assert (await cloud.http.post(f"/v1/trainings/{'0' * 32}/resume")).status_code == 404


async def test_there_is_a_limit(cloud, monkeypatch):
    monkeypatch.setattr(training, "MAX_RUNNING", 1)
    assert (await cloud.http.post("/v1/trainings", json=ASKED)).status_code == 201
    second = await cloud.http.post("/v1/trainings", json=ASKED)
    assert (second.status_code, second.json()["reason"]) == (409, "too_many")


async def test_a_host_without_torch_says_so(cloud, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda _name: None)
    answer = await cloud.http.post("/v1/trainings", json=ASKED)
    assert (answer.status_code, answer.json()["reason"]) == (409, "cannot_train")


async def test_a_process_that_ends_is_started_again_and_the_service_ends_it(run_cloud, caplog):
    async with run_cloud() as cloud:
        name = (await cloud.http.post("/v1/trainings", json=ASKED)).json()["id"]
        progress = folder_of(cloud) / name / "progress.json"
        seen = []
        for _ in range(2):
            await eventually(lambda: cloud.parts.trainings._process not in (None, *seen) and progress.exists())
            process = cloud.parts.trainings._process
            seen.append(process)
            progress.unlink()
            process.kill()
            await process.wait()
        assert "ended with -9" in caplog.text
        await eventually(progress.exists)
        last = cloud.parts.trainings._process
        assert json.loads(progress.read_text())["rounds"] == 1
    assert last is not None
    assert last.returncode == 0, "the drained service has ended it"


@pytest.mark.parametrize("when", ["it starts", "it ends"])
async def test_a_service_that_ends_leaves_no_process_behind(run_cloud, monkeypatch, when):
    monkeypatch.setattr(training, "END_S", 0.5)
    spawn, begun, told = asyncio.create_subprocess_exec, [], []

    async def spawn_slowly(*_command: str, **options: Any) -> asyncio.subprocess.Process:
        begun.append(await spawn("sleep", "600", **options))
        begun[-1].terminate = lambda: told.append("to end")  # which it does not mind
        await asyncio.sleep(0.3 if when == "it starts" else 0)
        return begun[-1]

    monkeypatch.setattr("asyncio.create_subprocess_exec", spawn_slowly)
    async with run_cloud() as cloud:
        name = (await cloud.http.post("/v1/trainings", json=ASKED)).json()["id"]
        await eventually(lambda: bool(begun))
        if when == "it ends":
            await eventually(lambda: cloud.parts.trainings._process is not None)
            await cloud.http.post(f"/v1/trainings/{name}/stop")
            await eventually(lambda: bool(told))
    assert [one.returncode for one in begun] == [-9]
