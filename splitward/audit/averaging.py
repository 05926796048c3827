"""Several captures of one scene: the noise is averaged out before decoding (docs/method.md, section 5, rule 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.decoder import MEDIUM, RESIDUAL, DecoderAttack, decode
from splitward.audit.practice import Practice
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="averaging",
    title="average over several captures of one scene",
    phase="inference",
    knows=(
        "several captures of one scene",
        "release law",
        "client runs as a black box",
        "auxiliary images",
    ),
    method="Averages what was released of one scene, and decodes the mean with a decoder trained on auxiliary "
    "images that were each released, with fresh noise, and averaged as many times.",
    source="docs/method.md, section 5, rule 3",
)


@dataclass(frozen=True)
class Averaging:
    """As many captures as the case has, and a decoder of the given budget.

    Attributes
    ----------
    decoder : DecoderAttack
    effort : float
        Multiplies the decoder's steps.
    """

    decoder: DecoderAttack = MEDIUM
    effort: float = 1.0

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        if not self.decoder.labelled:
            return CARD
        return replace(
            CARD,
            name=f"averaging-{self.decoder.size}",
            title=f"{CARD.title} of a known label, mostly for SSIM",
            knows=(*CARD.knows, "auxiliary labels", "label of the target"),
            method=f"{CARD.method} The decoder is told the label of each image.",
        )

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[M, C, H, W]."""
        budget = replace(self.decoder, effort=self.decoder.effort * self.effort)
        with reproducible(seed):
            trained = budget.train(case, Practice(case, captures=len(case.captures)))
            return decode(trained, case.captures.mean(0), case.labels)


STRONGEST = Averaging(replace(RESIDUAL, labelled=True, steps=3200))
"""Everything that helps against a noised release at once: captures, label, SSIM as the aim, and time to learn."""
