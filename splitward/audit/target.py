"""What is audited: a run folder, or the signed bundle that a device runs."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import Tensor

from edge.config import RuntimeConfig
from edge.model import ClientModel
from edge.runtime import Runtime, load_runtime
from splitward.audit.attack import Release
from splitward.data import Dataset
from splitward.errors import AuditError
from splitward.method.saliency import Saliency
from splitward.method.split import SplitNetwork
from splitward.training.run import open_run
from splitward.training.settings import release_law, split_settings
from splitward.wire.bundle import Bundle, read_bundle
from splitward.wire.release import SECRET_BYTES, ReleaseLaw, release
from splitward.wire.tensor import dequantise, quantise

BUNDLE_SUFFIX = ".bundle"
VARIANT = "onnx-float32"
_CHUNK = 250
_REMEMBERED_BYTES = 256 << 20


@dataclass(frozen=True)
class Target:
    """One defended network, ready to be attacked.

    Attributes
    ----------
    name, kind : str
        Of the run folder or the bundle; "run", "bundle", or "untrained" for the undefended ceiling.
    fingerprint : str
        SHA-256 of the weights, or the model id with the variant.
    defence : dict
        Profile and settings.
    classes : tuple of str
    frame_shape : tuple of int
        [C, H, W].
    release : Release
        Frames to released tensors in real units, as a device makes them.
    law : ReleaseLaw
    network : SplitNetwork or None
        None for a bundle: it holds no weights that an attack could differentiate.
    clean : callable or None
        Frames to the values that the noise is added to, [B, k]; None where the release is not sealed.
    unmapped : Target or None
        The same with the intentional attack switched off (x_hat = x, a map of zeros); None where there is none.
    accuracy : float or None
        Of the decision on the test split, as recorded by training or export.
    data : tuple or None
        Spec, task and size of the run's own data.
    certificate : dict or None
        What the bundle's manifest certifies.
    """

    name: str
    kind: str
    fingerprint: str
    defence: dict[str, Any]
    classes: tuple[str, ...]
    frame_shape: tuple[int, int, int]
    release: Release
    law: ReleaseLaw
    network: SplitNetwork | None = None
    clean: Callable[[Tensor], Tensor] | None = None
    unmapped: Target | None = None
    accuracy: float | None = None
    data: tuple[str, str | None, int | None] | None = None
    certificate: dict[str, Any] | None = None

    @property
    def released_bytes(self) -> int:
        """Payload of one released tensor."""
        return math.prod(self.law.shape) * (1 if self.law.dtype == "int8" else 4)


def open_target(
    path: Path, trusted_key: Ed25519PublicKey | None = None, *, variant: str | None = None
) -> Target:
    """The run folder or bundle at `path`.

    Parameters
    ----------
    trusted_key : Ed25519PublicKey, optional
        A bundle must be signed by it.
    variant : str, optional
        Which of a bundle's graphs is attacked, `onnx-float32` by default; a run has none.

    Raises
    ------
    AuditError
        A bundle without its key, a run with a variant, or an unknown variant.
    TrainingError, BundleError, BackendError
        The run or the bundle cannot be used.
    """
    if path.suffix == BUNDLE_SUFFIX:
        if trusted_key is None:
            raise AuditError(f"{path}: is a bundle; give the .pub file of the key that signed it with --key.")
        return _bundle_target(read_bundle(path, trusted_key), variant or VARIANT)
    if variant is not None:
        raise AuditError(f"{path}: is a run folder, and has no variant {variant}. Audit the exported bundle.")
    return _run_target(path)


def undefended(dataset: Dataset, seed: int = 0) -> Target:
    """An untrained client half of the same architecture, undefended: the most that an attack can reach."""
    settings = split_settings(dataset, "none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SplitNetwork(settings).eval()
    return _of_network("undefended", "untrained", network, f"seed {seed}", tuple(dataset.classes))


def _run_target(folder: Path) -> Target:
    run = open_run(folder)
    network = run.load_network()
    fingerprint = hashlib.sha256(run.weights.read_bytes()).hexdigest()
    target = _of_network(folder.resolve().name, "run", network, fingerprint, tuple(run.card["classes"]))
    settings = run.settings
    return replace(
        target,
        accuracy=run.read_metrics()[-1]["test"]["decision"],
        data=(settings.data, settings.task, settings.size),
        unmapped=_of_network(
            f"{target.name}, map off", "run", switch_map_off(network), fingerprint, target.classes
        )
        if network.saliency is not None
        else None,
    )


class _NoMap(Saliency):
    """The intentional attack, switched off."""

    def forward(self, frame: Tensor, y: Tensor | None = None) -> Tensor:
        """The frame itself and a map of zeros: [B, 2C, H, W]."""
        del y
        return torch.cat((frame, torch.zeros_like(frame)), dim=1)


def switch_map_off(network: SplitNetwork) -> SplitNetwork:
    """A copy of a network with a map that hands on the frame as it is, as public code does when attacked."""
    other = copy.deepcopy(network)
    if other.saliency is not None:
        other.saliency = _NoMap(other.saliency.classifier, other.saliency.settings).eval()
    return other


def _of_network(
    name: str, kind: str, network: SplitNetwork, fingerprint: str, classes: tuple[str, ...]
) -> Target:
    settings = network.settings.network
    shape = settings.release_shape

    @_Remembered
    @torch.no_grad()
    def activate(frames: Tensor) -> Tensor:
        return torch.cat([network.client(network.attack(chunk)) for chunk in torch.split(frames, _CHUNK)])

    def release_frames(frames: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(frames), *shape, generator=generator)
        return network.release(activate(frames), noise)

    seal = network.seal
    return Target(
        name=name,
        kind=kind,
        fingerprint=fingerprint,
        defence=asdict(network.settings.defence),
        classes=classes,
        frame_shape=(settings.channels, settings.side, settings.side),
        release=release_frames,
        law=release_law(settings, network.settings.defence),
        network=network,
        clean=(lambda frames: seal.round_clean(activate(frames))) if seal is not None else None,
    )


def _bundle_target(bundle: Bundle, variant: str) -> Target:
    manifest, spec = bundle.manifest, bundle.manifest.input
    if variant not in manifest.client:
        raise AuditError(
            f"{manifest.name}: has no variant {variant!r}. It has {', '.join(sorted(manifest.client))}."
        )
    backend, precision = variant.split("-")
    config = RuntimeConfig(backend=backend, precision=precision)  # type: ignore[arg-type]  # checked against the manifest
    model = ClientModel(bundle, config, bytes(SECRET_BYTES))  # probes the graphs as a device does
    fingerprint = f"{bundle.model.hex()} {variant}"
    common: dict[str, Any] = {
        "kind": "bundle",
        "fingerprint": fingerprint,
        "defence": {"profile": "unknown", **manifest.defence, "variant": variant},
        "classes": manifest.classes,
        "frame_shape": (spec.channels, spec.height, spec.width),
        "law": manifest.release,
    }
    unmapped = None
    if manifest.saliency:
        client = load_runtime(config.backend, bundle.files[manifest.client[variant]], config.threads)
        device = _Device(lambda frame: _without_map(client, frame), manifest.release)
        unmapped = Target(
            f"{manifest.name}, map off", release=device.release, clean=device.clean_or_none, **common
        )
    device = _Device(model.activation, manifest.release)
    return Target(
        manifest.name,
        release=device.release,
        clean=device.clean_or_none,
        unmapped=unmapped,
        accuracy=manifest.metrics.get("test", {}).get("decision"),
        certificate=manifest.certificate,
        **common,
    )


def _without_map(client: Runtime, frame: np.ndarray) -> np.ndarray:
    return client.run(np.concatenate((frame, np.zeros_like(frame))))


class _Remembered:
    """Frames [B, C, H, W] to activations [B, *shape], each frame's computed once.

    Attacks release the same auxiliary frames again and again, and only the noise is new. What does not fit in
    `_REMEMBERED_BYTES` is computed each time.
    """

    def __init__(self, activate: Callable[[Tensor], Tensor]) -> None:
        self._activate = activate
        self._known: dict[bytes, Tensor] = {}
        self._room = _REMEMBERED_BYTES

    def __call__(self, frames: Tensor) -> Tensor:
        keys = [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames.detach().numpy()]
        unknown = {key: row for row, key in enumerate(keys) if key not in self._known}
        fresh: dict[bytes, Tensor] = {}
        if unknown:
            computed = self._activate(frames[list(unknown.values())])
            fresh = dict(zip(unknown, computed, strict=True))
            if computed.nbytes <= self._room:
                self._room -= computed.nbytes
                self._known |= fresh
        return torch.stack([self._known[key] if key in self._known else fresh[key] for key in keys])


class _Device:
    """The deployed graphs, and the release with a secret that is drawn afresh for each frame."""

    def __init__(self, activation: Callable[[Any], Any], law: ReleaseLaw) -> None:
        self._activate = _Remembered(
            lambda frames: torch.from_numpy(np.stack([activation(frame) for frame in frames.numpy()]))
        )
        self._law = law

    @property
    def clean_or_none(self) -> Callable[[Tensor], Tensor] | None:
        return self.clean if self._law.dtype == "int8" else None

    def clean(self, frames: Tensor) -> Tensor:
        rows = [quantise(row, self._law.grid) for row in self._activate(frames).numpy()]
        return torch.from_numpy(np.stack(rows)).double() * self._law.grid

    def release(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        secrets = torch.randint(
            256, (len(frames), SECRET_BYTES), dtype=torch.uint8, generator=generator
        ).numpy()
        rows = [
            dequantise(release(row, self._law, secret.tobytes()), self._law.scale)
            for row, secret in zip(self._activate(frames).numpy(), secrets, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))
