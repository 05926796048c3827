"""The attacks that learn: near perfect on a cut that hides nothing, and on noise no better than the label."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitward.audit.attack import Attack, Case
from splitward.audit.averaging import STRONGEST, Averaging
from splitward.audit.decoder import LABELLED, LARGE, MEDIUM, RESIDUAL, SMALL, Decoder, DecoderAttack
from splitward.audit.floors import class_mean_image, mean_image
from splitward.audit.gan import Gan
from splitward.audit.metrics import mse, ssim
from splitward.audit.neighbour import Neighbour
from splitward.audit.practice import Practice
from splitward.audit.ridge import Ridge
from splitward.method.halves import NetworkSettings
from splitward.method.split import DEFENCES, SplitNetwork, SplitSettings
from splitward.training.loop import reproducible

SIDE = 16
CLASSES = 3
BRIEF = DecoderAttack(width=16, steps=40, batch=16, rate=4e-3)
ATTACKS: dict[str, Attack] = {
    "ridge": Ridge(),
    "neighbour": Neighbour(draws=2),
    "decoder": BRIEF,
    "residual": replace(BRIEF, residual=True, ssim_weight=1.0),
    "labelled": replace(BRIEF, labelled=True),
    "gan": Gan(BRIEF, critic_width=4),
    "averaging": Averaging(BRIEF),
    "averaging-residual": Averaging(replace(BRIEF, residual=True, labelled=True, ssim_weight=1.0)),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def frames_for(count: int, labels: Tensor, seed: int, channels: int = 1) -> Tensor:
    """Smooth random images whose brightness tells their class."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True)
    return (0.6 * smooth.clamp(0, 1) + 0.2 * labels.view(-1, 1, 1, 1)).clamp(0, 1)


def case_for(
    profile: str = "none", *, auxiliary: int = 400, channels: int = 1, sigma: float = 0.0, captures: int = 2
) -> tuple[Case, Tensor]:
    """40 targets of an untrained network, and their originals; `sigma` adds noise to what is released."""
    torch.manual_seed(0)
    defence = replace(DEFENCES[profile], map=None, sigma=0.05 if profile == "sealed" else 0.0)
    settings = NetworkSettings("small", channels, SIDE, CLASSES, mapped=False, values=defence.values)
    network = SplitNetwork(SplitSettings(settings, defence, scale=1.05 / 127)).eval()

    def release(frames: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(frames), *settings.release_shape, generator=generator)
        with torch.no_grad():
            return network.release(network.client(frames), noise) + sigma * noise

    own, labels = torch.arange(auxiliary) % CLASSES, torch.arange(40) % CLASSES
    originals, generator = frames_for(40, labels, 1, channels), torch.Generator().manual_seed(2)
    released = torch.stack([release(originals, generator) for _ in range(captures)])
    known = frames_for(auxiliary, own, 3, channels)
    return Case(released[0], released, labels, known, own, CLASSES, release, network), originals


def error(attack: Attack, case: Case, originals: Tensor) -> float:
    return mse(attack.reconstruct(case, 0), originals).mean().item()


@pytest.mark.parametrize(
    "attack",
    [
        replace(ATTACKS[name], effort=3.0)
        for name in ("decoder", "residual", "labelled", "gan", "averaging", "averaging-residual")
    ],
    ids=lambda attack: attack.card.name,
)
def test_decoders_invert_an_undefended_cut(attack: Attack) -> None:
    case, originals = case_for()
    assert ssim(attack.reconstruct(case, 0), originals).mean() > 0.85


@pytest.mark.parametrize("dead", [0, 1, 2, 3])
def test_a_decoder_that_dies_begins_anew(dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, originals = case_for()
    made: list[Decoder] = []

    def dead_at_first(*shape: Any, **options: Any) -> Decoder:
        made.append(Decoder(*shape, **options))
        if len(made) <= dead:
            for parameter in made[-1].parameters():
                torch.nn.init.zeros_(parameter)
        return made[-1]

    monkeypatch.setattr("splitward.audit.decoder.Decoder", dead_at_first)
    found = ssim(replace(BRIEF, effort=3.0).reconstruct(case, 0), originals).mean()
    assert len(made) == min(dead + 1, 3)
    assert (found > 0.75) == (dead < 3)  # the last start has no SSIM in its loss


def test_ridge_inverts_an_undefended_cut() -> None:
    case, originals = case_for()
    assert error(Ridge(), case, originals) < 1e-3


def test_neighbour_finds_the_target_among_its_own_images() -> None:
    case, _ = case_for()
    with reproducible(0):
        rows = Practice(case).rows[:20]
    known = case.auxiliary[rows]
    among = replace(case, released=case.release(known, torch.Generator()))
    assert error(Neighbour(bandwidths=(1e-3,)), among, known) < 1e-4


@each_attack
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("profile", ["none", "sealed"])
def test_any_release_and_the_same_bits_again(attack: Attack, profile: str, channels: int) -> None:
    if "effort" in vars(attack):
        attack = replace(attack, effort=0.1)  # type: ignore[type-var]  # each attack is a dataclass
    case, originals = case_for(profile, channels=channels, auxiliary=100)
    guesses = attack.reconstruct(case, 5)
    assert guesses.shape == originals.shape
    assert guesses.dtype == torch.float32
    assert 0 <= guesses.min() <= guesses.max() <= 1
    assert torch.equal(attack.reconstruct(case, 5), guesses)


@each_attack
def test_more_auxiliary_images_never_help_the_defender(attack: Attack) -> None:
    few, many = case_for("sealed", auxiliary=30), case_for("sealed", auxiliary=400)
    if "effort" in vars(attack):
        attack = replace(attack, effort=3.0)  # type: ignore[type-var]  # each attack is a dataclass
    # Steps are the same, so a decoder that is far from trained gains nothing: a small tolerance.
    assert error(attack, *many) <= error(attack, *few) + 3e-3


@pytest.mark.parametrize(
    "name", [name for name, one in ATTACKS.items() if "label of the target" not in one.card.knows]
)
def test_pure_noise_gives_no_more_than_the_mean_image(name: str) -> None:
    case, originals = case_for("sealed", sigma=1e4)
    nothing = mse(mean_image(case.auxiliary, len(originals)), originals).mean().item()
    assert error(ATTACKS[name], case, originals) > 0.95 * nothing


def test_the_label_alone_gives_the_class_mean() -> None:
    case, originals = case_for("sealed", sigma=1e4)
    floor = mse(class_mean_image(case.auxiliary, case.auxiliary_labels, case.labels), originals).mean().item()
    told = replace(BRIEF, labelled=True, ssim_weight=0.0, effort=6.0)
    assert 0.95 * floor < error(told, case, originals) < 1.1 * floor


def test_averaging_gains_from_captures() -> None:
    case, originals = case_for("sealed", captures=8)
    noisy = replace(case, captures=case.captures[:1])
    assert error(Averaging(BRIEF), case, originals) <= error(Averaging(BRIEF), noisy, originals) + 1e-3


def test_noise_is_drawn_afresh_at_every_draw() -> None:
    case, _ = case_for("sealed")
    with reproducible(0):
        practice = Practice(case)
        once, again = practice.release(practice.held_rows), practice.release(practice.held_rows)
    assert torch.equal(once.frames, again.frames)
    assert not torch.equal(once.released, again.released)
    assert not set(practice.held_rows.tolist()) & set(practice.rows.tolist())


def test_too_few_auxiliary_images_are_refused() -> None:
    case, _ = case_for()
    few = replace(case, auxiliary=case.auxiliary[:4], auxiliary_labels=case.auxiliary_labels[:4])
    with pytest.raises(ValueError, match="4 auxiliary images"):
        Ridge().reconstruct(few, 0)


def test_every_attack_has_its_own_name() -> None:
    cards = [
        a.card
        for a in (Ridge(), Neighbour(), SMALL, MEDIUM, LARGE, RESIDUAL, LABELLED, Gan(), Averaging(), STRONGEST)
    ]
    assert len({card.name for card in cards}) == len(cards)
    for attack in (LABELLED, STRONGEST):
        assert "label of the target" in attack.card.knows


@pytest.mark.parametrize(
    ("shape", "side"),
    [((16,), 28), ((4, 14, 14), 28), ((8, 7, 7), 28), ((6, 16, 16), 64), ((64,), 128), ((32, 32, 32), 128)],
)
@torch.no_grad()
def test_the_decoder_makes_frames_from_any_release(shape: tuple[int, ...], side: int) -> None:
    for residual in (False, True):
        decoder = Decoder(shape, 3, side, 16, residual=residual, classes=2)
        assert decoder(torch.randn(2, *shape), torch.tensor([0, 1])).shape == (2, 3, side, side)
