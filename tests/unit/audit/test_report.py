"""The whole audit with stand-in attacks: what it writes, what it decides, and that the page stands alone."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from splitward.audit import flow
from splitward.audit.flow import run_audit
from splitward.audit.frontier import Point, draw_frontier, frontier, read_points
from splitward.audit.gallery import strip_png
from splitward.audit.settings import AuditSettings, Effort, Sizes
from splitward.audit.target import open_target
from splitward.errors import AuditError

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture
def audit(run_folder, phantoms, fake, tmp_path, monkeypatch):
    """Runs the audit with these attacks in the place of the real ones."""
    monkeypatch.setattr(flow, "open_dataset", lambda spec, task, size: phantoms)

    def run(attacks=None, **settings):
        attacks = attacks or {"ridge": fake(name="ridge"), "few": fake(name="few", limit=4, phase="training")}
        attacks = {flow.CEILING: fake(name="ceiling", grey=0.4), **attacks}
        monkeypatch.setitem(flow.EFFORTS, "quick", Effort("quick", attacks, 20, 6, 2))
        settings = AuditSettings(
            run_folder, out=tmp_path / "out", quick=True, command="splitward audit x", **settings
        )
        code = run_audit(settings)
        return (
            code,
            json.loads((settings.out / "audit.json").read_text()),
            (settings.out / "report.html").read_text(),
        )

    return run


class Page(HTMLParser):
    """Collects the links, pictures and open elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found)
        self.outside += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")
        ]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(audit):
    code, results, text = audit(max_ssim=0.9)
    page = Page(text)
    assert code == 0
    assert page.open == []
    assert page.outside == []
    assert "<script" not in text
    assert len(page.pictures) >= 5
    assert all(picture["alt"] for picture in page.pictures)
    for stated in (
        "Gate SSIM at most 0.9: held",
        "a ridge",
        "splitward audit x",
        results["target"]["fingerprint"],
    ):
        assert stated in text


def test_the_json_holds_everything(audit):
    _, results, _ = audit()
    assert results["worst"]["ssim"]["attack"] in ("ridge", flow.CEILING)
    assert {"mean_image", "class_mean", "class_template"} == set(results["floors"])
    ridge = next(row for row in results["attacks"] if row["name"] == "ridge")
    assert ridge["seeds"] == [0, 1]
    assert ridge["mse"]["mean"] == pytest.approx(np.mean(ridge["mse_by_seed"]))
    assert [row["name"] for row in results["map_off"]] == [flow.CEILING, "ridge"]
    assert [row["name"] for row in results["ceiling"]] == [flow.CEILING]
    assert results["certificate"]["broken_by"] == []
    assert {one["attack"] for one in results["certificate"]["attacks"]} == {"ridge", flow.CEILING}
    assert results["certificate"]["bound_mse"] > 0
    assert [(one["name"], one["targets"]) for one in results["inference"]] == [
        ("label-inference", 6),
        ("attribute-inference", 6),
    ]
    assert results["data"]["synthetic"] is True
    assert results["versions"]["torch"]


def test_a_broken_gate_exits_with_1_and_names_the_attack(audit, capsys):
    code, results, text = audit(min_mse=0.9)
    assert code == 1
    (gate,) = results["gates"]
    assert gate["broken"]
    assert f"gate min_mse 0.9: BROKEN, {gate['attack']} reaches {gate['value']:.4f}" in capsys.readouterr().out
    assert "Gate MSE at least 0.9: broken" in text


def test_a_failed_attack_ends_with_an_error(audit, fake, capsys):
    code, results, text = audit({"bad": fake(name="bad", error="no memory")})
    assert code == 2
    assert "bad failed: RuntimeError: no memory" in capsys.readouterr().err
    assert "Not complete: bad failed" in text
    assert next(row for row in results["attacks"] if row["name"] == "bad")["status"] == "failed"


def test_a_gate_that_nothing_was_measured_for_is_no_pass(audit, fake, capsys):
    training = {name: fake(name=name, phase="training") for name in (flow.CEILING, "ridge")}
    code, results, _ = audit(training, max_ssim=0.5)
    assert (code, results["worst"], results["gates"]) == (2, None, [])
    assert "no attack at inference was measured" in capsys.readouterr().err


def test_an_attack_below_the_bound_breaks_the_certificate(audit, fake, phantoms, monkeypatch):
    monkeypatch.setattr("splitward.audit.summary.candidates_bound", lambda *_: (1.0, 0.0))
    code, results, text = audit()
    assert code == 2
    assert results["certificate"]["broken_by"] == [flow.CEILING, "ridge"]
    assert "The certificate is broken by" in text


def test_nothing_is_done_twice_and_nothing_is_mixed(audit, fake):
    calls: list[int] = []
    attacks = {"ridge": fake(calls, name="ridge")}
    _, first, _ = audit(attacks)
    done = list(calls)
    _, second, _ = audit(attacks)
    assert calls == done
    assert second["attacks"] == first["attacks"]
    with pytest.raises(AuditError, match="another audit"):
        audit(attacks, targets=5)


def test_images_that_the_run_was_trained_on_are_refused_wherever_they_come_from(audit, phantoms, monkeypatch):
    """The same folder with more patients is split otherwise: training images are among its test images."""
    mixed = replace(phantoms, validation=phantoms.train, test=phantoms.test)
    found = {"phantom": phantoms, "phantom-of-today": mixed, "./phantom": phantoms}
    monkeypatch.setattr(flow, "open_dataset", lambda spec, task, size: found[spec])
    with pytest.raises(AuditError, match=rf"phantom-of-today: {len(phantoms.train)} of its .* are among those"):
        audit(data="phantom-of-today")
    _, results, _ = audit(data="./phantom")  # its own, however it is spelled
    assert results["data"]["own"] is True


def test_classes_that_are_only_sorted_otherwise_are_put_in_the_targets_order(run_folder, phantoms, monkeypatch):
    assert phantoms.classes == ("normal", "mass")
    turned = phantoms.in_order(("mass", "normal"))
    assert (turned.test.labels == 1 - phantoms.test.labels).all()
    monkeypatch.setattr(flow, "open_dataset", lambda spec, task, size: turned)
    target = replace(open_target(run_folder), data=None)  # as of a bundle
    dataset, own = flow._open_data(target, AuditSettings(run_folder, data="folder"))
    assert not own
    assert dataset.digest() == phantoms.digest()
    sizes = Sizes(20, 6)
    (case, images), (same, same_images) = (sizes.draw(target, one) for one in (phantoms, dataset))
    assert torch.equal(case.labels, same.labels)
    assert torch.equal(images, same_images)


def test_an_unknown_attack_is_refused(fake):
    known = {"ridge": fake(), "prior": fake()}
    assert list(flow.choose_attacks(known, ("prior",))) == ["prior"]
    with pytest.raises(AuditError, match=r"magic: not known\. Choose from ridge, prior"):
        flow.choose_attacks(known, ("ridge", "magic"))


def test_hostile_names_are_only_text(audit, fake):
    _, _, text = audit({"x": fake(name="<script>alert(1)</script>")})
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_frontier_is_what_nothing_beats():
    points = [Point("a", 0.9, 0.5), Point("b", 0.8, 0.4), Point("c", 0.85, 0.6), Point("d", 0.95, 0.9)]
    assert [point.name for point in frontier(points)] == ["b", "a", "d"]
    png = draw_frontier([*points, Point("e", 0.9, 0.3, 0.01, 0.02, highlighted=True)], {"label": 0.3}, "title")
    assert Image.open(io.BytesIO(png)).size[0] > 600


def test_points_are_read_from_a_results_file(tmp_path):
    path = tmp_path / "privacy.json"
    path.write_text(json.dumps({"mnist": {"defences": {"none": {"accuracy": 0.99, "worst_ssim": 0.9}}}}))
    assert read_points(path, "mnist") == [Point("none", 0.99, 0.9)]
    with pytest.raises(AuditError, match=re.escape("privacy.json")):
        read_points(path, "mias")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_holds_the_very_pixels(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, channels, 28, 28), dtype=np.uint8)
    strip = np.array(Image.open(io.BytesIO(strip_png(images, 5))))
    assert strip.shape == (28, 5 * 30 - 2, 4)
    for index, image in enumerate(images):
        found = strip[:, 30 * index : 30 * index + 28]
        assert (found[..., 3] == 255).all()
        assert (found[..., :channels].transpose(2, 0, 1) == image).all()
    assert (strip[:, 90:, 3] == 0).all()
