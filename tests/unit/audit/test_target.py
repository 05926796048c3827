"""Run folder and bundle are attacked as they are deployed, on images that nobody trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitward.audit.case import make_case
from splitward.audit.target import open_target, switch_map_off, undefended
from splitward.errors import AuditError
from splitward.training.loop import frames_of, to_unit
from splitward.wire.bundle import read_trusted_key

SIZES = {"auxiliary": 1000, "targets": 1000, "captures": 2, "seed": 0}


@pytest.fixture(scope="module")
def target(run_folder):
    return open_target(run_folder)


def test_a_run_releases_as_its_network(target, phantoms):
    frames = to_unit(frames_of(phantoms.test))
    released = target.release(frames, torch.Generator().manual_seed(3))
    with torch.no_grad():
        noise = torch.randn(len(frames), 16, generator=torch.Generator().manual_seed(3))
        expected = target.network.release(target.network.client(target.network.attack(frames)), noise)
    assert torch.equal(released, expected)
    assert target.released_bytes == 16
    assert target.data == ("phantom", None, 28)
    assert target.defence["profile"] == "sealed"
    assert 0 <= target.accuracy <= 1


def test_a_frame_is_computed_once_and_released_afresh(run_folder, phantoms, monkeypatch):
    frames = to_unit(frames_of(phantoms.test))[:6]
    again = frames[[4, 0, 0, 5, 1, 2, 3]]
    released = {}
    for room, computed in ((256 << 20, [4, 2]), (0, [4, 6])):
        monkeypatch.setattr("splitward.audit.target._REMEMBERED_BYTES", room)
        target = open_target(run_folder)
        batches: list[int] = []
        target.network.client.register_forward_pre_hook(lambda _, given, to=batches: to.append(len(given[0])))
        noise = torch.Generator().manual_seed(5)
        released[room] = target.release(frames[:4], noise), target.release(again, noise)
        assert batches == computed
    remembered, computed_anew = (torch.cat(both) for both in released.values())
    assert not torch.equal(remembered[5], remembered[6])  # one frame, twice
    # A frame's activation differs by rounding with the batch it is computed in: a step of the release at most.
    assert (remembered - computed_anew).abs().max() <= 1.01 * target.law.scale
    assert ((remembered - computed_anew) == 0).double().mean() > 0.9


def test_the_clean_values_are_the_release_without_noise(target, phantoms):
    frames = to_unit(frames_of(phantoms.test))
    step = target.law.scale
    released = torch.stack([target.release(frames, torch.Generator().manual_seed(n)) for n in range(200)])
    assert (released.double().mean(0) - target.clean(frames)).abs().max() < 0.3 * 5 / 200**0.5 + step


def test_the_map_can_be_switched_off(target, phantoms):
    frames = to_unit(frames_of(phantoms.test))
    off = switch_map_off(target.network)
    assert torch.equal(off.attack(frames), torch.cat((frames, torch.zeros_like(frames)), 1))
    assert not torch.equal(target.network.attack(frames), off.attack(frames))
    assert torch.equal(target.unmapped.network.attack(frames), off.attack(frames))
    assert not torch.equal(target.clean(frames), target.unmapped.clean(frames))
    plain = undefended(phantoms)
    assert plain.unmapped is None
    with pytest.raises(AuditError, match="no map"):
        make_case(plain, phantoms, **SIZES, map_on=False)


def test_no_training_image_and_no_patient_on_both_sides(target, phantoms):
    """Every image finds its patient again by its bytes."""
    test = phantoms.test
    patients = {
        frame.tobytes(): patient
        for frame, patient in zip(to_unit(frames_of(test)).numpy(), test.patients, strict=True)
    }
    validation = {frame.tobytes() for frame in to_unit(frames_of(phantoms.validation)).numpy()}
    case, originals = make_case(target, phantoms, **SIZES)
    known = [frame.tobytes() for frame in case.auxiliary.numpy()]
    assert len(known) + len(originals) == len(test) + len(phantoms.validation)
    assert validation <= set(known)
    near = {patients[frame] for frame in known if frame not in validation}
    far = {patients[frame.tobytes()] for frame in originals.numpy()}
    assert near
    assert near.isdisjoint(far)


def test_a_case_is_drawn_by_its_seed(target, phantoms):
    few = {"auxiliary": 5, "targets": 3, "captures": 2}
    case, originals = make_case(target, phantoms, **few, seed=1)
    same, same_originals = make_case(target, phantoms, **few, seed=1)
    _, other_originals = make_case(target, phantoms, **few, seed=2)
    assert torch.equal(originals, same_originals)
    assert torch.equal(case.captures, same.captures)
    assert not torch.equal(originals, other_originals)
    assert (len(case.auxiliary), len(case.labels), case.captures.shape) == (5, 3, (2, 3, 16))
    assert torch.equal(case.captures[0], case.released)
    assert not torch.equal(case.captures[0], case.captures[1])


def test_data_that_does_not_fit_is_refused(target, phantoms):
    for changes, said in (
        ({"classes": ("normal", "lesion")}, r"has lesion, .* and lacks mass, .* the classes normal, mass\.$"),
        ({"classes": ("normal", "mass", "cyst")}, r"phantom: has cyst, which \S+ does not know\. Give data"),
        ({"classes": ("normal",)}, r"phantom: lacks mass, which"),
        ({"classes": ("a", "b"), "tasks": ("mass", "roi")}, r"or give the --task .*: roi\.$"),
    ):
        with pytest.raises(AuditError, match=said):
            make_case(target, replace(phantoms, **changes), **SIZES)
    wide = replace(phantoms, test=replace(phantoms.test, images=phantoms.test.images[..., :20]))
    with pytest.raises(AuditError, match="--size 28"):
        make_case(target, wide, **SIZES)


def test_a_bundle_is_attacked_through_its_own_graphs(tiny_bundle):
    """The tiny bundle's graphs are tanh(x, tanh x); its noise is keyed by a fresh secret for each frame."""
    pytest.importorskip("onnxruntime")
    bundle = open_target(tiny_bundle.path, read_trusted_key(tiny_bundle.trusted_key))
    frame = torch.rand(1, 1, 8, 8).expand(300, -1, -1, -1).contiguous()
    released = bundle.release(frame, torch.Generator().manual_seed(0))
    expected = torch.tanh(torch.cat((frame[0], torch.tanh(frame[0]))))
    assert bundle.network is None
    assert torch.allclose(bundle.clean(frame)[0].float(), expected, atol=1 / 127)
    assert released.unique(dim=0).shape[0] == 300
    assert (released.mean(0) - expected).abs().max() < 0.1
    assert float((released - expected).std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(released, bundle.release(frame, torch.Generator().manual_seed(0)))
    off = bundle.unmapped.clean(frame)[0]
    assert torch.allclose(off[0].float(), torch.tanh(frame[0, 0]), atol=1 / 127)
    assert float(off[1].abs().max()) == 0


def test_what_cannot_be_opened_is_explained(tiny_bundle, run_folder):
    with pytest.raises(AuditError, match="--key"):
        open_target(tiny_bundle.path)
    with pytest.raises(AuditError, match="no variant 'onnx-int4'"):
        open_target(tiny_bundle.path, read_trusted_key(tiny_bundle.trusted_key), variant="onnx-int4")
    with pytest.raises(AuditError, match="is a run folder"):
        open_target(run_folder, variant="onnx-int8")
