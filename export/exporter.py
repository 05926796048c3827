"""From a run folder to a signed bundle, with the server half beside it."""

from __future__ import annotations

import copy
import hashlib
import io
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from export.onnx_graph import quantise_onnx, to_onnx
from export.parity import check_parity
from export.tflite_graph import quantise_tflite, to_tflite
from splitward.audit.certificate import certify
from splitward.data import Dataset, Split
from splitward.errors import ExportError
from splitward.method.split import DEFENCES, SplitNetwork
from splitward.training.loop import frames_of, to_unit
from splitward.training.run import Run, save_tensors
from splitward.training.settings import release_law
from splitward.wire import bundle as bundles
from splitward.wire.server import FORMAT as SERVER_FORMAT
from splitward.wire.server import ServerCard, server_card_path, write_server_card

CALIBRATION_FRAMES = 256
PARITY_FRAMES = 1000
CERTIFIED_FRAMES = 2000
SUFFIX = ".bundle"


def export_run(run: Run, dataset: Dataset, target: Path, key: Ed25519PrivateKey) -> bytes:
    """Export the finished `run` to the bundle `target`, checked, signed, with its server half beside it.

    Parameters
    ----------
    dataset : Dataset
        The run's own: training images calibrate int8, validation images check parity and are certified.

    Returns
    -------
    bytes
        Model id, 16 bytes.

    Raises
    ------
    ExportError
        `target` has another suffix, the defence does not ship, or a graph does not do what the network does.
    TrainingError
        The run's training has not finished, or the data is not what it was trained on.
    """
    check_target(run, target)
    run.check_data(dataset.digest())
    network = run.load_network()
    target.parent.mkdir(parents=True, exist_ok=True)  # where that cannot be, it is better said before the work
    settings = run.settings.split
    law = release_law(settings.network, settings.defence)
    calibration, _ = _drawn(dataset.train, CALIBRATION_FRAMES)
    parity, parity_labels = _drawn(dataset.validation, PARITY_FRAMES)
    saliency = _saliency_graphs(network)
    clients = _client_graphs(network, calibration)
    found = check_parity(network, law, clients, saliency, parity, parity_labels)
    files = {f"client-{name}.{_extension(name)}": data for name, data in clients.items()}
    files |= {f"saliency.{_extension(name)}": data for name, data in saliency.items()}
    files |= _golden(network)
    held_out, held_out_labels = _drawn(dataset.validation, CERTIFIED_FRAMES)
    certificate = certify(network, held_out, torch.from_numpy(held_out_labels))
    manifest = bundles.Manifest(
        format=bundles.FORMAT,
        name=target.stem,
        created_at=_now(),
        task=str(run.card["task"]),
        classes=tuple(run.card["classes"]),
        input=bundles.InputSpec(settings.network.channels, settings.network.side, settings.network.side),
        release=law,
        client={name: f"client-{name}.{_extension(name)}" for name in clients},
        saliency={name: f"saliency.{_extension(name)}" for name in saliency},
        golden=("golden_frame.npy", "golden_activation.npy"),
        defence=asdict(settings.defence),
        data={key: run.card[key] for key in ("name", "task", "synthetic", "licence", "source")},
        metrics={"test": run.read_metrics()[-1]["test"], "parity": {k: asdict(v) for k, v in found.items()}},
        files={},
        certificate=certificate.to_dict() if certificate else None,
    )
    model = bundles.write_bundle(target, manifest, files, key)
    _write_server(network, target, manifest, model)
    return model


def check_target(run: Run, target: Path) -> None:
    """Refuse what no data could make a bundle: `ExportError` for a defence that does not ship or another suffix."""
    if run.settings.split.defence.profile not in DEFENCES:
        raise ExportError(
            f"{run.folder}: {run.settings.split.defence.profile} is there to be compared with and does not ship; "
            f"train {', '.join(DEFENCES)}."
        )
    if target.suffix != SUFFIX:
        raise ExportError(f"{target}: a bundle's name ends in {SUFFIX}.")


def _drawn(split: Split, count: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """At most `count` frames [N, C, H, W] and their labels, the same at each export.

    Drawn at random: the rows of a folder lie class by class, so that the first ones may be all of one class.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(split))[:count])
    return to_unit(frames_of(split)[rows]), split.labels[rows]


def _extension(variant: str) -> str:
    return variant.split("-")[0]


def _saliency_graphs(network: SplitNetwork) -> dict[str, bytes]:
    """Float32 only: int8 ruins a gradient."""
    if network.saliency is None:
        return {}
    shape = (network.settings.network.channels, network.settings.network.side, network.settings.network.side)
    return {"onnx": to_onnx(network.saliency, shape), "tflite": to_tflite(network.saliency, shape)}


def _client_graphs(network: SplitNetwork, calibration: torch.Tensor) -> dict[str, bytes]:
    """The client half with its folded stem, by variant."""
    client = copy.deepcopy(network.client)
    client.fold()
    inputs = network.attack(calibration)
    shape = tuple(inputs.shape[1:])
    frames: list[NDArray[np.float32]] = [frame[None].numpy() for frame in inputs]
    onnx, tflite = to_onnx(client, shape), to_tflite(client, shape)
    return {
        "onnx-float32": onnx,
        "onnx-int8": quantise_onnx(onnx, frames),
        "tflite-float32": tflite,
        "tflite-int8": quantise_tflite(tflite, frames),
    }


def _golden(network: SplitNetwork) -> dict[str, bytes]:
    """A frame and its activation, on which a device proves its runtime before it goes to work.

    Drawn and not captured: bundles go to every device and to the cloud, and hold nobody's image. It is smooth, as
    images are, so that int8 is in its range.
    """
    settings = network.settings.network
    coarse = torch.rand(1, settings.channels, 7, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frame = F.interpolate(coarse, size=(settings.side, settings.side), mode="bilinear")
        activation = network.client(network.attack(frame))
    return {"golden_frame.npy": _npy(frame[0].numpy()), "golden_activation.npy": _npy(activation[0].numpy())}


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_server(network: SplitNetwork, target: Path, manifest: bundles.Manifest, model: bytes) -> None:
    weights = target.with_name(target.stem + ".server.safetensors")
    save_tensors(weights, dict(network.server.state_dict()))
    card = ServerCard(
        format=SERVER_FORMAT,
        model=model.hex(),
        name=manifest.name,
        classes=manifest.classes,
        release=manifest.release,
        network=asdict(network.settings.network),
        weights=weights.name,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )
    write_server_card(server_card_path(target), card)


def _now() -> str:
    """Time of export, UTC; SOURCE_DATE_EPOCH makes a bundle reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return moment.isoformat(timespec="seconds")
