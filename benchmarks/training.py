"""Training across sites beside pooled training, to docs/results/training.json. A finished cell is not run again.

`python -m benchmarks.training --data FOLDER`, where FOLDER holds pneumoniamnist.npz; `--only`, `--seeds`, `--cells` and
`--trials` choose. All sites run in one process, through the very state machines and messages that cross a network.
Batch and rounds of a site were set before the first run; test data is looked at once for each cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_trials import (
    measure_hijack,
    measure_kills,
    measure_label_leakage,
    measure_throughput,
)
from splitward.data import Dataset, open_dataset
from splitward.data.partition import partition
from splitward.method.fusion import rank_weights
from splitward.training.guard import GuardSettings
from splitward.training.loop import evaluate, reproducible
from splitward.training.remote.client import Client
from splitward.training.remote.plan import Arrangement, Plan, Precision
from splitward.training.remote.server import Replies, Server
from splitward.training.remote.site import whole_network
from splitward.training.remote.together import run_together
from splitward.training.settings import RunSettings, split_settings
from splitward.versions import versions
from splitward.wire.training import Phase, decode_training

SITES = 4
STREAMS = ("attacked", "recovered", "fused")


@dataclass(frozen=True)
class Data:
    """A data set and its schedule; `batch` is the pooled training's, `site_batch` each site's."""

    name: str
    file: str
    epochs: int
    batch: int
    site_batch: int
    rounds: int
    shift: int


DATA = (
    Data("pneumoniamnist", "pneumoniamnist.npz", epochs=20, batch=64, site_batch=32, rounds=40, shift=2),
    Data("mnist", "mnist", epochs=3, batch=128, site_batch=64, rounds=12, shift=1),
)


@dataclass(frozen=True)
class Cell:
    """One training: how the images are dealt out (None: all at one site), who averages what, and the precision;
    `batch` of a site where it is not its data set's."""

    split: str | None
    arrangement: Arrangement
    precision: Precision = "float32"
    batch: int | None = None

    @property
    def name(self) -> str:
        if self.split is None:
            return "pooled"
        batch = f" batch-{self.batch}" if self.batch else ""
        return f"{self.split} {self.arrangement} {self.precision}{batch}"


CELLS = (
    Cell(None, "single"),
    Cell("identical", "splitfed-v2"),
    Cell("identical", "splitfed-v2", "int8"),
    Cell("dirichlet-0.3", "splitfed-v2"),
    Cell("dirichlet-0.3", "splitfed-v1"),
    Cell("identical", "splitfed-v1"),
    Cell("dirichlet-0.3", "fedsgd"),
)
LARGE = (Cell("identical", "splitfed-v2", batch=64), Cell("identical", "splitfed-v2", "int8", batch=64))
"""What int8 saves depends on how many frames share a header; for data whose sites have smaller batches."""


class CountingServer(Server):
    """Counts the bytes of steps alone: activations with labels up, gradients down."""

    step_bytes = 0

    def handle(self, device: str, payload: bytes) -> Replies:
        """As the server's own."""
        replies = super().handle(device, payload)
        if decode_training(payload).phase is Phase.STEP:
            self.step_bytes += len(payload) + sum(len(reply) for _, reply in replies)
        return replies


def train_cell(dataset: Dataset, data: Data, cell: Cell, seed: int) -> dict[str, Any]:
    """Train one cell and measure it."""
    began_s = time.process_time()
    sites = 1 if cell.split is None else SITES
    alpha = 0.3 if cell.split == "dirichlet-0.3" else None
    parts = (
        [dataset.train] if sites == 1 else partition(dataset.train, sites, alpha=alpha, least=128, seed=seed)
    )
    settings = RunSettings(
        *(data.file, None, None, split_settings(dataset, "sealed")),
        epochs=data.epochs,
        batch=data.batch if sites == 1 else cell.batch or data.site_batch,
        shift=data.shift,
        seed=seed,
    )
    frames = data.epochs * sum(map(len, parts))
    rounds = 1 if sites == 1 else data.rounds
    if cell.arrangement == "fedsgd":
        rounds = frames // (sites * settings.batch)  # one batch a site, on average
    plan = Plan(settings, cell.arrangement, sites, rounds, precision=cell.precision)
    training = seed.to_bytes(16, "little")
    server = CountingServer(plan, training)
    clients = [
        Client(f"site-{number}", training, part, settings.split, guard=GuardSettings())
        for number, part in enumerate(parts)
    ]
    run_together(server, clients)
    network = whole_network(clients[0])
    with reproducible(seed):
        validation = evaluate(network, dataset.validation)
        ranked = rank_weights([validation[name] for name in STREAMS])
        network.server.get_buffer("weights").copy_(torch.tensor(ranked))
        test = evaluate(network, dataset.test)
    steps = sum(client.course.trainer.steps_done for client in clients if client.course.trainer is not None)
    return {
        "data": data.name,
        "cell": cell.name,
        "seed": seed,
        "sites": [
            [int((part.labels == label).sum()) for label in range(len(dataset.classes))] for part in parts
        ],
        "settings": {"epochs": data.epochs, "batch": settings.batch, "rounds": plan.rounds},
        "validation": validation,
        "test": test,
        "steps": steps,
        "step_bytes_per_frame": round(server.step_bytes / frames, 2),
        "bytes_up_per_frame": round(server.session.bytes_up / frames, 2),
        "bytes_down_per_frame": round(server.session.bytes_down / frames, 2),
        "cpu_s": round(time.process_time() - began_s, 1),
    }


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """`accuracy` by data set and cell, beside pooled, in percent on test data; what int8 costs and saves."""
    accuracy: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        found = accuracy.setdefault(line["data"], {}).setdefault(line["cell"], [])
        found.append(round(100 * line["test"]["decision"], 2))
    whole = {
        data: {cell: round(sum(values) / len(values), 2) for cell, values in cells.items()}
        for data, cells in accuracy.items()
    }
    by_cell = {(line["data"], line["cell"]): line for line in lines}
    carried = {
        data: {
            cell: round(sum(by_cell[data, cell][f"bytes_{way}_per_frame"] for way in ("up", "down")))
            for cell in cells
        }
        for data, cells in whole.items()
    }
    saving, cost = {}, {}
    for data, cells in whole.items():
        for coarse in (cell for cell in cells if " int8" in cell):
            exact = coarse.replace("int8", "float32")
            if exact in cells:
                spent = [by_cell[data, cell]["step_bytes_per_frame"] for cell in (exact, coarse)]
                name = data + coarse.partition(" int8")[2]
                saving[name] = round(spent[0] / spent[1], 2)
                cost[name] = round(cells[exact] - cells[coarse], 2)
    return {
        "accuracy": whole,
        "accuracy_by_seed": accuracy,
        "bytes_per_frame": carried,
        "int8_bytes_saving": saving,
        "int8_accuracy_cost": cost,
    }


def format_page(result: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [
        f"| {data} | {cell} | {value:.2f} | {value - cells['pooled']:+.2f} | "
        f"{', '.join(f'{one:.2f}' for one in result['accuracy_by_seed'][data][cell])} | "
        f"{result['bytes_per_frame'][data][cell]:,} |"
        for data, cells in result["accuracy"].items()
        for cell, value in cells.items()
    ]
    saved = ", ".join(f"{data} {value:.2f} times" for data, value in result["int8_bytes_saving"].items())
    cost = ", ".join(f"{data} {value:+.2f} points" for data, value in result["int8_accuracy_cost"].items())
    chaos, hijack = result["chaos"], result["hijack"]
    guarded = [
        f"| {precision} | {', '.join(str(one['step']) for one in found['trainings'])} | "
        f"{found['ssim_at_detection']:.3f} | {found['false_alarms']} of {found['honest_trainings']} |"
        for precision, found in {"float32": hijack, **result["hijack_rounded"]}.items()
    ]
    leaked = [
        f"| {one['precision']} | {one['steps']} | {one['norm_auc']:.3f} | {one['cosine_auc']:.3f} | "
        f"{one['clustered']:.3f} | {one['few_shot']:.3f} | {one['majority']:.3f} |"
        for one in result["label_leakage"]["found"]
    ]
    equal = "are" if chaos["weights_equal_in_process"] else "are not"
    return f"""# Training across sites

Command: `{result["command"]}`. `training.jsonl` has a line for each training: classes at each site, bytes, settings.
{SITES} sites, `sealed`, accuracy of the decision on test data, mean over seeds. `pooled`: one site has all the images.
Bytes: everything that crosses the network, both ways, for one frame of one epoch; most of it is client halves.

| data | sites | accuracy % | beside pooled | each seed | bytes a frame |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Bytes of a step, both ways: int8 saves {saved}; it costs {cost} of accuracy (negative: it is better).

Kills of either side: {chaos["kills"]} over {chaos["steps"]} steps; {chaos["steps_lost"]} lost,
{chaos["steps_twice"]} taken twice. The weights of both halves {equal} those of one process, bit for bit.

A cloud that hijacks the training (sealed MNIST, seeds {", ".join(str(one["seed"]) for one in hijack["trainings"])}), by
precision of the messages: the steps at which the client stops, the SSIM of its reconstructions then (the image of the
class alone has {hijack["floor_ssim"]:.3f}), and the honest trainings of {hijack["steps"]} steps that were stopped.

| precision | stopped at step | worst SSIM | false alarms |
| --- | --- | --- | --- |
{chr(10).join(guarded)}

Speed: at {result["throughput"]["rtt_ms"]:.0f} ms from site to cloud and back, journals on disk, `sealed`, batch
{result["throughput"]["batch"]}: {100 * result["throughput_fraction_20ms"]:.0f} % of the steps a second of one process.

## Labels that stay at the client

What the gradient at the last layers tells the cloud of them (`splitward/audit/label_leakage.py`): PneumoniaMNIST,
`sealed`, {result["label_leakage"]["epochs"]} epochs, {result["label_leakage"]["steps"]} steps of each stage.
Areas under the curve, 0.5 is chance; shares of labels found, with no label known (clusters) and with five of each class
(few-shot). Where labels go to the cloud, it has them in any case.

| precision | steps | by length, AUC | by cosine, AUC | clusters | few-shot | majority |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(leaked)}
"""


def _kills(_path: str) -> dict[str, Any]:
    chaos = measure_kills(2000, 30)
    return {"chaos": chaos, "weights_equal_in_process": chaos["weights_equal_in_process"]}


def _hijack(_path: str) -> dict[str, Any]:
    rounded: tuple[Precision, ...] = ("int8", "int4")
    return {"hijack": measure_hijack(), "hijack_rounded": {one: measure_hijack(one) for one in rounded}}


TRIALS: dict[str, Callable[[str], dict[str, Any]]] = {
    "kills": _kills,
    "throughput": lambda _path: measure_throughput(),
    "hijack": _hijack,
    "labels": measure_label_leakage,
}
"""Each takes the path of PneumoniaMNIST."""


def main() -> int:
    """Run what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[one.name for one in DATA])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--cells", nargs="*", default=[one.name for one in (*CELLS, *LARGE)])
    parser.add_argument("--trials", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--out", type=Path, default=Path("docs/results/training.json"))
    given = parser.parse_args()
    ledger = given.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    for data in (one for one in DATA if one.name in given.only):
        done = {(line["cell"], line["seed"]) for line in lines if line["data"] == data.name}
        missing = [
            (cell, seed)
            for seed in given.seeds
            for cell in (*CELLS, *(LARGE if data.site_batch < 64 else ()))
            if cell.name in given.cells and (cell.name, seed) not in done
        ]
        where = str(given.data / data.file) if data.file.endswith(".npz") else data.file
        dataset = open_dataset(where) if missing else None
        for cell, seed in missing:
            assert dataset is not None  # opened above
            lines.append(train_cell(dataset, data, cell, seed))
            sys.stdout.write(json.dumps(lines[-1]) + "\n")
            sys.stdout.flush()
            with ledger.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    result = (json.loads(given.out.read_text()) if given.out.exists() else {}) | summarise(lines)
    for name in given.trials:
        result |= TRIALS[name](str(given.data / DATA[0].file))
    result["command"] = "python -m benchmarks.training --data FOLDER"
    result["versions"] = versions()
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(format_page(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
