"""Hostile messages: a million mutations of good ones against the decoder, to docs/results/cloud.json.

`python -m benchmarks.mutations --count 1000000 --seed 0`. The mutations know the format: most have their checksum
mended, as a check that ends everything at the CRC-32 would say nothing of what lies behind it. A decoder is right when
it refuses with a reason, or when encoding what it understood gives the same bytes again.

`--guided` looks for them by coverage instead, with atheris (pip install atheris), the checksum always mended.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from splitward.errors import MessageError
from splitward.versions import versions
from splitward.wire.message import Activation, decode, encode

HEADER_BYTES = 80
"""More than the fixed part of every header: where a mutation does most."""
EDGES = (0, 1, 2, 4, 5, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def corpus(draw: random.Random) -> list[bytes]:
    """Good messages of both dtypes and every number of dimensions."""
    numbers = np.random.default_rng(draw.randrange(1 << 32))
    found = []
    for shape in ((1,), (16,), (64,), (2, 3), (8, 7, 7), (1, 2, 3, 4)):
        for values in (
            numbers.standard_normal(shape).astype(np.float32),
            numbers.integers(-128, 128, shape, np.int8),
        ):
            device = "".join(draw.choices("abcXYZ019_-", k=draw.randint(1, 63)))
            scale, zero = (1.0, 0) if values.dtype == np.float32 else (0.0123, draw.randint(-128, 127))
            place = (f"d{device}", draw.randbytes(16), draw.randrange(1 << 63), draw.randrange(1 << 63))
            found.append(encode(Activation(*place, draw.randbytes(16), values, scale, zero)))
    return found


def mutate(message: bytes, other: bytes, draw: random.Random) -> bytes:
    """One to four changes; the checksum is mended three times out of four."""
    data = bytearray(message[:-4])
    for _ in range(draw.randint(1, 4)):
        if not data:
            break
        at = draw.randrange(min(len(data), HEADER_BYTES) if draw.random() < 0.7 else len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            size = draw.choice((1, 2, 4, 8))
            data[at : at + size] = (draw.choice(EDGES) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif kind == 3:
            del data[at : at + draw.randint(1, 16)]
        elif kind == 4:
            data[at:at] = draw.randbytes(draw.randint(1, 16))
        else:
            end = draw.randrange(len(other))
            data[at:] = other[min(at, end) : end]
    checksum = zlib.crc32(data) if draw.random() < 0.75 else draw.randrange(1 << 32)
    return bytes(data) + struct.pack("<I", checksum)


def judge(message: bytes) -> str:
    """ "refused: REASON", "understood", "wrong" or "crash: ERROR"."""
    try:
        understood = decode(message)
    except MessageError as error:
        return f"refused: {error.reason}"
    except Exception as error:  # noqa: BLE001  # which is what is looked for
        return f"crash: {type(error).__name__}"
    return "understood" if encode(understood) == message else "wrong"


def mutations(seed: int) -> Iterator[bytes]:
    """Mutations without end."""
    draw = random.Random(seed)
    good = corpus(draw)
    while True:
        yield mutate(draw.choice(good), draw.choice(good), draw)


def run(count: int, seed: int) -> dict[str, Any]:
    """Judge `count` mutations."""
    found: Counter[str] = Counter()
    source = mutations(seed)
    for _ in range(min(count, 10_000)):
        found[judge(next(source))] += 1
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count - min(count, 10_000)):
        found[judge(next(source))] += 1
    return {
        "tried": count,
        "crashes": sum(number for verdict, number in found.items() if verdict.startswith("crash")),
        "wrong_decodes": found["wrong"],
        "understood": found["understood"],
        "refused": {
            verdict.removeprefix("refused: "): number
            for verdict, number in sorted(found.items())
            if verdict.startswith("refused")
        },
        "peak_memory_growth_mb": round(
            (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024, 1
        ),
        "seed": seed,
    }


def guide(count: int, seed: int) -> None:
    """Let atheris choose `count` messages by what they reach; it ends the process."""
    import atheris

    atheris.instrument_all()

    def try_one(data: bytes) -> None:
        verdict = judge(data + struct.pack("<I", zlib.crc32(data)))
        if verdict == "wrong" or verdict.startswith("crash"):
            raise AssertionError(f"{verdict}: {data.hex()}")

    with tempfile.TemporaryDirectory() as folder:
        for number, message in enumerate(corpus(random.Random(seed))):
            Path(folder, str(number)).write_bytes(message[:-4])
        atheris.Setup([sys.argv[0], f"-runs={count}", f"-seed={seed + 1}", "-max_len=4096", folder], try_one)
        atheris.Fuzz()


def main() -> int:
    """Run, and write beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/cloud.json"))
    parser.add_argument("--guided", action="store_true")
    given = parser.parse_args()
    if given.guided:
        guide(given.count, given.seed)
    report = run(given.count, given.seed)
    report["command"] = f"python -m benchmarks.mutations --count {given.count} --seed {given.seed}"
    report["versions"] = {name: versions()[name] for name in ("python", "splitward", "numpy")}
    whole = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps(whole | {"mutated_messages": report}, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 1 if report["crashes"] or report["wrong_decodes"] else 0


if __name__ == "__main__":
    sys.exit(main())
