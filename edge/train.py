"""`edge train`: this device takes part in a training across sites, as itself.

The device never imports torch: what trains is `splitward train --over mqtt`, which takes this process's place, with the
device's identity, broker and certificates.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from edge.config import EdgeConfig
from edge.errors import EdgeError

USERNAME, PASSWORD = "SPLITWARD_BROKER_USERNAME", "SPLITWARD_BROKER_PASSWORD"  # names of variables


def training_command(
    config: EdgeConfig, training: str, rest: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """The command that takes part in `training`, and its environment: a broker's password never is an argument.

    Parameters
    ----------
    rest : sequence of str
        Further options of `splitward train`: data, defence, run folder.

    Raises
    ------
    EdgeError
        What trains is not installed.
    """
    if find_spec("torch") is None:
        raise EdgeError("training needs torch, which inference does not: pip install 'splitward[edge-train]'.")
    broker = config.broker
    command = [
        *(sys.executable, "-m", "splitward.cli", "train", "--over", "mqtt", "--training", training),
        *("--site", config.device.site, "--device", config.device.id),
        *("--broker", f"{broker.host}:{broker.port}"),
    ]
    if broker.tls is not None:
        given = {"--ca": broker.tls.ca, "--cert": broker.tls.cert, "--key": broker.tls.key}
        command += [word for option, path in given.items() if path for word in (option, path)]
    told = dict(environment)
    if broker.username is not None:
        told |= {USERNAME: broker.username, PASSWORD: broker.password or ""}
    return [*command, *rest], told
