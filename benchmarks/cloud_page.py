"""The page of docs/results/cloud.json."""

from __future__ import annotations

from typing import Any


def format_page(result: dict[str, Any]) -> str:
    """The figures for people."""
    spent, heavy = result["cpu_us_per_inference"], result["heavy_fraction_of_bare"]
    fuzzed, chaos = result["mutated_messages"], result["chaos"]
    guided = fuzzed["guided"]
    crashes, wrong = (fuzzed[what] + guided[what] for what in ("crashes", "wrong_decodes"))
    by_client = [
        f"| {name} | {parts['total']:.0f} | {parts['total'] / spent['mqtt5']['total']:.1f} |"
        for name, parts in spent.items()
    ]
    by_part = [f"| {part} | {us:.0f} |" for part, us in spent["mqtt5"].items() if part != "total"]
    by_devices = [f"| {devices} | {us:.0f} |" for devices, us in result["cpu_us_by_devices"].items()]
    made = [f"| {part} | `{how['command']}` | {how['machine']} |" for part, how in result["parts"].items()]
    killed = ", ".join(f"{count} {what}" for what, count in chaos["kills"].items())
    return f"""# The cloud service, measured

Load, broker and service share the cores of one machine, which others use, too: ratios within a part hold, absolute
times differ by half from hour to hour. The small network is MNIST's (28x28), the heavy one a residual one for 64x64.

## CPU of the service for one inference, small network

Microseconds by what receives the message; behind it the same decoding, recovery, commit to SQLite and reply.
`fastapi_post` takes one activation with each POST, `litserve` batches them.

| received by | us | of mqtt5's |
| --- | --- | --- |
{chr(10).join(by_client)}

Of mqtt5's, by part; the bare network takes {result["model_us"]["small"]["compiled"]:.0f} us in a batch of 64,
{result["model_us"]["small"]["torch"]:.0f} by torch's own modules:

| part | us |
| --- | --- |
{chr(10).join(by_part)}

From few and many devices, in a run of its own:

| devices | us |
| --- | --- |
{chr(10).join(by_devices)}

## Throughput and latency

- Small network: {result["saturation_per_s"]:,.0f} results a second at saturation. At half of that, 99 of 100 replies
  come within {result["p99_ms_half_load"]:.0f} ms of the message, {result["p99_ms_half_load_memory_disk"]:.0f} with the
  store in memory. (Every commit waits for a flush: {result["disk_flush_ms"]["p50"]} ms in the median on this disk.)
- Heavy network: {100 * heavy["throughput_of_compiled"]:.0f} % of the bare one's results a second in batches of 64,
  {100 * heavy["of_compiled"]:.0f} % by CPU time; {heavy["of_torch"]:.2f} times those of torch's own modules.
- A second worker on a second core: {result["two_worker_speedup"]:.2f} times the results of one, heavy network; two
  processes that do nothing but run it: {result["two_bare_processes_speedup"]:.2f} times.

## Under attack

- {fuzzed["tried"]:,} mutated messages (`{fuzzed["command"]}`) and {guided["tried"]:,} guided by coverage
  (`{guided["command"]}`): {crashes} crashes, {wrong} wrong decodes,
  memory grown by {fuzzed["peak_memory_growth_mb"]} MB.
- Kills at random instants ({killed}) under {chaos["frames"]:,} frames from real edge spools: {chaos["lost"]} lost,
  {chaos["duplicated"]} twice (`{chaos["command"]}`).

## How it was made

| part | command | machine |
| --- | --- | --- |
{chr(10).join(made)}
"""
