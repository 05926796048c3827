"""The dashboard in a real browser, over the real API: what it shows, who may see it, and whether everybody can use it.

Screenshots of both colour schemes are kept in build/dashboard/.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright, expect

from cloud import audit, tables
from cloud.config import ApiConfig
from firmware_sim.broker import free_port
from splitward.wire import topics
from splitward.wire.control import Status, encode_control
from tests.unit.cloud.conftest import CARD, MODEL, Cloud

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = Path("build") / "dashboard"
expect.set_options(timeout=30_000)  # milliseconds: a busy machine draws slowly
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt install chromium")
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        await browser.close()


@asynccontextmanager
async def served(cloud: Cloud) -> AsyncIterator[str]:
    """Address of the service's API, whose lifespan runs already."""
    config = uvicorn.Config(
        cloud.app, port=free_port(), lifespan="off", log_level="warning", timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{config.port}/"
    finally:
        cloud.parts.feed.close()
        server.should_exit = True
        await running


async def fill_with_life(cloud: Cloud) -> None:
    """Devices of two sites, a bundle with its certificate, roll-outs, labels, and messages that are refused."""
    now_ns = time.time_ns()
    for site, device, temperature_c in (
        ("ward", "pi-1", 51.0),
        ("ward", "pi-2", 84.0),
        ("lab", "jetson-1", None),
    ):
        status = Status(
            *("online",),
            model_name="digits" if device != "pi-2" else HOSTILE,
            runtime="onnx-int8",
            at_ns=now_ns,
            queued=3,
            dropped={"expired": 2} if device == "pi-2" else {},
            temperature_c=temperature_c,
        )
        await cloud.transport.send(topics.status(site, device), encode_control(status))
    manifest = {
        "release": {"shape": [16], "dtype": "int8", "sigma": 0.3},
        "certificate": {"bound_mse": 0.0412, "identified": 0.31},
    }
    bundle = {"name": CARD.name, "sha256": "0" * 64, "size": 1, "created_at": "", "added_at_ns": now_ns}
    plan = {"canary_share": 0.25, "max_failure_rate": 0.1, "min_outcomes": 1, "patience_s": 3600.0}
    plan |= {"allow_older": False, "roll_back": True, "created_at_ns": now_ns, "changed_at_ns": now_ns}
    async with cloud.parts.store.write() as connection:
        await connection.execute(tables.bundles.insert(), bundle | {"model": CARD.model, "manifest": manifest})
        for number, state in enumerate(("canary", "halted")):
            row = {"id": f"{number:032x}", "model": CARD.model, "site": None, "state": state, "actor": "alice"}
            await connection.execute(
                tables.rollouts.insert(), plan | row | {"reason": "" if number == 0 else "2 of 4 failed"}
            )
    await add_training(cloud)
    await cloud.transport.send(topics.activation("ward", "pi-1"), b"not a message")


async def add_training(cloud: Cloud) -> None:
    """A stopped training of two sites, of which one was left out."""
    now_ns, name = time.time_ns(), "7" * 32
    wanted = {"channels": 1, "side": 28, "classes": 2, "sites": 2}  # can be led, and so can go on
    row = {"id": name, "name": "chest", "wanted": wanted, "state": "stopped", "reason": "", "actor": "alice"}
    async with cloud.parts.store.write() as connection:
        await connection.execute(
            tables.trainings.insert(), row | {"created_at_ns": now_ns, "changed_at_ns": now_ns}
        )
    curve = [{"epoch": epoch + 1, "loss": 1.2 / (epoch + 1), "accuracy": 0.5} for epoch in range(4)]
    sites = [
        {"device": "ward-1", "state": "training", "frames": 900, "steps": 40, "of": 80, "curve": curve},
        {"device": "lab-2", "state": "left out", "frames": 70, "steps": 3, "of": 80, "curve": curve[:1]},
    ]
    folder = Path(cloud.parts.fleet.state_dir) / "trainings" / name
    folder.mkdir(parents=True)
    progress = {"failure": "", "finished": False, "round": 3, "rounds": 8, "sites": sites}
    (folder / "progress.json").write_text(json.dumps(progress))


async def send_frames(cloud: Cloud, first: int, count: int) -> None:
    for sequence in range(first, first + count):
        captured = time.time_ns() - 20_000_000
        await cloud.send(cloud.activation(sequence, (sequence % 7, 40, -sequence), captured_at_ns=captured))


async def open_page(browser: Browser, address: str, scheme: str = "light") -> tuple[Page, list[str]]:
    """A page, and what its console complains of."""
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 1500})  # type: ignore[arg-type]  # one of its two
    page = await context.new_page()
    complaints: list[str] = []
    page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(address)
    return page, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_shows_the_fleet_and_everybody_can_read_it(
    cloud: Cloud, browser: Browser, scheme: str
) -> None:
    await fill_with_life(cloud)
    await send_frames(cloud, 0, 8)
    label = {"device": "pi-1", "boot": (b"b" * 16).hex(), "sequence": 0, "class_index": 1}
    await cloud.http.post("/v1/labels", json=[label])
    async with served(cloud) as address:
        page, complaints = await open_page(browser, address, scheme)
        await expect(page.locator("#stream")).to_have_text("Live events: connected")
        await send_frames(cloud, 8, 6)
        await expect(page.locator("#results canvas")).to_have_count(6)
        await expect(page.locator("#devices")).to_contain_text("ward: 2 of 2 online")
        await expect(page.locator("#devices")).to_contain_text("84 °C")
        await expect(page.locator("#devices")).to_contain_text(HOSTILE)  # as text
        await expect(page.locator("#online")).to_have_text("3")
        await expect(page.locator("#models")).to_contain_text("100.0 %")
        await expect(page.locator("#models")).to_contain_text("error ≥ 0.0412")
        await expect(page.locator("#rollouts")).to_contain_text("2 of 4 failed")
        await expect(page.locator("#trainings")).to_contain_text("3 of 8")
        await expect(page.locator("#trainings")).to_contain_text("lab-2: 3 of 80, loss 1.20 (left out)")
        await expect(page.get_by_label("loss of ward-1 by epoch: 1.20, 0.60, 0.40, 0.30")).to_be_visible()
        await expect(page.locator("#letters")).to_contain_text("truncated")
        assert await page.title() == "Splitward cloud"
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=SCREENSHOTS / f"{scheme}.png", full_page=True)
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        await page.set_viewport_size({"width": 400, "height": 800})
        await page.screenshot(path=SCREENSHOTS / f"{scheme}-phone.png", full_page=True)
        assert await page.evaluate("document.documentElement.scrollWidth") == 400
        assert not complaints


async def test_the_picture_is_of_the_released_values(cloud: Cloud, browser: Browser) -> None:
    async with served(cloud) as address:
        page, _ = await open_page(browser, address)
        await expect(page.locator("#stream")).to_have_text("Live events: connected")
        await cloud.send(cloud.activation(0, (0, 100, 50)))
        picture = page.locator("#results canvas")
        await expect(picture).to_have_attribute("aria-label", "The 2 by 2 values that pi-1 released")
        grey = await picture.evaluate(
            "canvas => [...canvas.getContext('2d').getImageData(0, 0, 2, 2).data].filter((_, i) => i % 4 === 0)"
        )
        assert grey == [0, 255, 127, 0]


async def test_nothing_is_shown_without_a_token_and_the_tab_keeps_it(run_cloud, browser: Browser) -> None:
    async with run_cloud(api=ApiConfig()) as cloud:
        reader = await cloud.parts.access.create("page", ("read",), "test")
        await cloud.transport.send(
            topics.status("ward", "pi-1"), encode_control(Status("online", at_ns=time.time_ns()))
        )
        await send_frames(cloud, 0, 2)
        async with served(cloud) as address:
            page, _ = await open_page(browser, address)
            dialog = page.get_by_role("dialog", name="Log in")
            await expect(dialog).to_be_visible()
            for _ in range(3):  # Chromium lets a page keep a dialog open against one Escape, not against two
                await page.keyboard.press("Escape")
                await expect(dialog).to_be_visible()
            assert "pi-1" not in await page.content()
            await page.get_by_label("Token").fill("swt_wrong")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert")).to_contain_text("The token was refused")
            await page.get_by_label("Token").fill(reader)
            await page.keyboard.press("Enter")
            await expect(dialog).to_be_hidden()
            await expect(page.locator("#devices")).to_contain_text("pi-1")
            await expect(page.locator("#stream")).to_have_text("Live events: connected")
            kept = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
            assert await page.evaluate(kept) == [[reader], [], ""]
            await expect(page.locator("#results tr")).to_have_count(2)

            other = await cloud.parts.access.create("other", ("read",), "test")
            await cloud.parts.access.revoke("page", "test")
            await expect(dialog).to_be_visible()
            await page.get_by_label("Token").fill(other)
            await page.keyboard.press("Enter")
            await expect(dialog).to_be_hidden()
            await expect(page.locator("#stream")).to_have_text("Live events: connected")
            await send_frames(cloud, 2, 1)
            await expect(page.locator("#results canvas")).to_have_count(1)
            sequences = await page.locator("#results td:nth-child(3)").all_text_contents()
            assert sequences == ["2", "1", "0"]  # none twice
            await page.get_by_role("button", name="Log out").click()
            await expect(dialog).to_be_visible()


async def test_a_rollout_is_halted_from_the_keyboard(cloud: Cloud, browser: Browser) -> None:
    await fill_with_life(cloud)
    async with served(cloud) as address:
        page, _ = await open_page(browser, address)
        asked: list[str] = []

        async def answer(dialog) -> None:
            asked.append(dialog.message)
            await (dialog.dismiss() if len(asked) == 1 else dialog.accept())

        page.on("dialog", answer)
        button = page.get_by_role("button", name=f"Halt the roll-out of {MODEL.hex()[:12]}")
        await button.focus()
        await page.keyboard.press("Enter")
        async with cloud.parts.store.write() as connection:  # the table goes on around a button that is held
            await connection.execute(tables.rollouts.update().values(reason="of the night shift"))
        await expect(page.locator("#rollouts")).to_contain_text("of the night shift")
        await expect(page.locator("#rollouts tr")).to_have_count(2)
        await expect(button).to_be_focused()
        assert len(asked) == 1
        await page.keyboard.press("Enter")
        await expect(page.locator("#rollouts-said")).to_contain_text("is halted")
        await expect(page.get_by_role("button", name="Halt the roll-out")).to_have_count(0)
        await expect(page.get_by_role("group", name="Roll-outs")).to_be_focused()
        assert len(asked) == 2
        (halted,) = [one for one in await cloud.parts.rollouts.latest() if one["id"] == f"{0:032x}"]
        assert halted["state"] == "halted"
        assert halted["reason"] == "halted on the dashboard"


async def test_a_training_is_stopped_and_gone_on_with_from_the_keyboard(cloud: Cloud, browser: Browser) -> None:
    await add_training(cloud)
    async with served(cloud) as address:
        page, complaints = await open_page(browser, address)
        page.on("dialog", lambda dialog: dialog.accept())
        for button, state in (("Resume", "running"), ("Stop", "stopped")):
            await page.get_by_role("button", name=f"{button} the training chest").focus()
            await page.keyboard.press("Enter")
            await expect(page.locator("#trainings-said")).to_have_text(f"The training chest is {state}.")
        (found,) = await cloud.parts.trainings.latest()
        assert found["state"] == "stopped"
        actions = [one.action for one in await audit.entries(cloud.parts.store)]
        assert actions[-2:] == ["training.running", "training.stopped"]
        assert not complaints


async def test_the_keyboard_reaches_everything(cloud: Cloud, browser: Browser) -> None:
    async with served(cloud) as address:
        page, _ = await open_page(browser, address)
        await page.keyboard.press("Tab")
        await expect(page.get_by_text("Skip to the content")).to_be_focused()
        reached = set()
        for _ in range(12):
            await page.keyboard.press("Tab")
            reached.add(
                await page.evaluate(
                    "document.activeElement.id || document.activeElement.getAttribute('aria-labelledby')"
                )
            )
        titles = ("devices", "results", "models", "rollouts", "trainings", "letters")
        assert reached >= {"pause", *(f"{name}-title" for name in titles)}
        pause = page.get_by_role("button", name="Pause")
        await pause.focus()
        await page.keyboard.press("Space")
        await expect(pause).to_have_attribute("aria-pressed", "true")
        await expect(page.locator("#stream")).to_have_text("Live events: connected")
        await send_frames(cloud, 0, 2)
        await expect(page.locator("#p50")).not_to_have_text("–")  # the figures go on
        await expect(page.locator("#results canvas")).to_have_count(0)
        await page.keyboard.press("Space")
        await expect(page.locator("#results canvas")).to_have_count(2)
