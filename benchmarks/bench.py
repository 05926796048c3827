"""`make bench`: run everything and write docs/results/bench.json. Needs what `make demo` made."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from benchmarks.device import measure_agent, measure_graphs
from benchmarks.recovery import measure_recovery
from benchmarks.service import measure_service
from firmware_sim.broker import start_broker
from splitward.demo.services import start_cloud
from splitward.versions import versions
from splitward.wire.bundle import public_key_path, read_bundle, read_trusted_key


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder that the demo made")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench.json"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--messages", type=int, default=20_000)
    arguments = parser.parse_args()
    bundle_path, key = arguments.demo / "model.bundle", public_key_path(arguments.demo / "signing.key")
    if not bundle_path.exists():
        sys.stderr.write(f"{bundle_path}: not there. Run `make demo` first.\n")
        return 2
    bundle = read_bundle(bundle_path, read_trusted_key(key))
    recovery = measure_recovery(arguments.repeats)
    graphs = measure_graphs(bundle, 20 * arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch, start_broker() as broker:
        folder = Path(scratch)
        with start_cloud(folder, bundle_path, broker.port) as address:
            agent = measure_agent(folder, bundle_path, key, arguments.demo / "frames.npz", broker.port)
            service = measure_service(address, broker.port, bundle, arguments.messages)
        broker_kind = broker.kind
    result = {
        "svt_speedup": recovery["speedup"],
        "saliency_over_client": graphs["onnx-float32"]["ratio"],
        "agent_overhead_us": agent["onnx-float32"]["overhead_us"],
        "cloud_cpu_us": service["parts_us"],
        "detail": {"recovery": recovery, "graphs": graphs, "agent": agent, "service": service},
        "broker": broker_kind,
        "machine": f"{platform.machine()}, {platform.system()}",
        "command": f"make bench (repeats {arguments.repeats}, messages {arguments.messages})",
        "versions": versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: result[key] for key in list(result)[:4]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
