"""The `splitward` command. The rooms load only when they are needed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitward import __version__
from splitward.errors import SplitwardError
from splitward.image.cli import add_image
from splitward.reproduce.cli import add_reproduce
from splitward.wire.names import NAME

DEFAULT_KEY = Path("~/.config/splitward/signing.key")
DEFAULT_BROKER = "127.0.0.1:1883"
OVER = ("training", "site", "device", "peer", "no_guard", "labels", "broker", "ca", "cert", "key")
"""Options of `train` that mean nothing without `--over`."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; an explained error, or one of the disk or the network, exits with 2, without a traceback."""
    # Before torch loads: threads that spin while they wait make small steps far slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(words, argparse.Namespace(words=words))
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (SplitwardError, OSError) as error:
        sys.stderr.write(f"splitward: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("splitward: interrupted.\n")
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="splitward", description="Split inference for medical devices.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole product, small, on real images")
    demo.add_argument(
        "--data", default="mnist", help="mnist, phantom, a .npz file or a folder (default: mnist)"
    )
    demo.add_argument("--task", help="what the labels say, where the data can be read in several ways")
    demo.add_argument("--size", type=int, help="height and width of the frames in pixels")
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for everything made (default: demo)"
    )
    demo.add_argument(
        "--frames", type=_positive, default=1000, help="test images for each device (default: 1000)"
    )
    demo.add_argument("--serve", action="store_true", help="keep it running and print the dashboard's address")
    demo.add_argument("--fresh", action="store_true", help="train again, even where a finished run lies")
    demo.set_defaults(run=_demo)

    data = commands.add_parser("data", help="fetch, and describe, a data set")
    data.add_argument("spec", help="mnist, phantom, a .npz file or a folder")
    data.add_argument("--task")
    data.add_argument("--size", type=int)
    data.set_defaults(run=_data)

    train = commands.add_parser("train", help="train a split network under a defence")
    _add_training_options(train)
    train.add_argument(
        "--over", choices=("mqtt",), help="take part in a training of several sites, whose plan decides"
    )
    train.add_argument("--training", type=bytes.fromhex, help="with --over: its id, from its coordinator")
    train.add_argument("--site", help="with --over: where this is (default: default)")
    train.add_argument("--device", help="with --over: name of this client, as in its certificate")
    train.add_argument(
        "--peer", action="append", default=[], help="with --over: fingerprint of another site's key"
    )
    train.add_argument(
        "--no-guard", action="store_true", help="with --over: do not watch for a hijacking cloud"
    )
    train.add_argument(
        "--labels", choices=("client",), help="with --over: take no part unless the labels stay here"
    )
    _add_broker_options(train)
    train.set_defaults(run=_train)

    lead = commands.add_parser(
        "coordinate", help="be the cloud's side of a training of several sites, over MQTT"
    )
    _add_training_options(lead)
    lead.add_argument("--sites", type=int, default=1, help="the training begins when so many have joined")
    lead.add_argument("--arrangement", choices=("single", "turn", "splitfed-v1", "splitfed-v2", "fedsgd"))
    lead.add_argument("--rounds", type=int, default=1, help="client halves are exchanged after each")
    lead.add_argument("--labels", choices=("cloud", "client"), default="cloud", help="who has the labels")
    lead.add_argument("--precision", choices=("float32", "int8", "int4"), default="float32")
    lead.add_argument("--clip", type=float, default=0.0, help="largest norm of a frame's gradient; 0: no limit")
    lead.add_argument("--noise", type=float, default=0.0, help="on these gradients, in units of --clip")
    _add_broker_options(lead)
    lead.set_defaults(run=_coordinate)

    export = commands.add_parser("export", help="make a signed bundle and its server half from a run")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, metavar="NAME.bundle")
    export.add_argument("--key", type=Path, default=DEFAULT_KEY, help=f"signing key (default: {DEFAULT_KEY})")
    export.set_defaults(run=_export)

    _add_audit(commands)

    add_reproduce(commands)

    add_image(commands)

    keygen = commands.add_parser("keygen", help="make a signing key; devices trust its .pub file")
    keygen.add_argument("key", type=Path, nargs="?", default=DEFAULT_KEY)
    keygen.set_defaults(run=_keygen)
    return parser


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser("audit", help="attack a run or a bundle as it is deployed, and report")
    audit.add_argument("target", type=Path, metavar="TARGET", help="run folder or .bundle file")
    audit.add_argument("--data", help="as for train (default: the run's own data)")
    audit.add_argument("--task", help="what the labels say, where the data can be read in several ways")
    audit.add_argument("--size", type=int, help="height and width of the frames (default: the target's)")
    audit.add_argument(
        "--out", type=Path, default=Path("audit"), help="folder of the report; the same command again goes on"
    )
    audit.add_argument("--quick", action="store_true", help="smaller budgets: minutes for frames of 28x28")
    audit.add_argument("--seeds", type=_positive, help="attackers' seeds (default: 3, quick 1)")
    audit.add_argument("--attacks", help="names of attacks, with commas (default: all)")
    audit.add_argument("--auxiliary", type=_positive, help="most images of the attacker's own")
    audit.add_argument("--targets", type=_positive, help="most images attacked")
    audit.add_argument("--max-ssim", type=float, help="gate: exit with 1 when an attack's mean SSIM is above")
    audit.add_argument("--min-mse", type=float, help="gate: exit with 1 when an attack's mean MSE is below")
    audit.add_argument("--key", type=Path, help="public key that the bundle is signed by")
    audit.add_argument("--variant", help="bundle: graphs to attack (default: onnx-float32)")
    audit.add_argument("--compare", type=Path, metavar="JSON", help="defences for the plot, as privacy.json")
    audit.set_defaults(run=_audit)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return value


def _demo(arguments: argparse.Namespace) -> int:
    from splitward.demo.flow import DemoSettings, run_demo

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that broker, cloud and devices end with it
    settings = DemoSettings(arguments.data, arguments.task, arguments.size, arguments.out, arguments.frames)
    return run_demo(settings, serve=arguments.serve, fresh=arguments.fresh)


def _data(arguments: argparse.Namespace) -> int:
    from splitward.data import open_dataset

    dataset = open_dataset(arguments.spec, task=arguments.task, size=arguments.size)
    counts = {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")}
    described = {
        "name": dataset.name,
        "task": dataset.task,
        "classes": dataset.classes,
        "frame": dataset.train.images.shape[1:],
        "images": counts,
        "synthetic": dataset.synthetic,
        "licence": dataset.licence,
        "source": dataset.source,
    }
    sys.stdout.write(json.dumps(described, indent=2) + "\n")
    return 0


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="mnist, phantom, a .npz file or a folder")
    parser.add_argument("--task", help="what the labels say, where the data can be read in several ways")
    parser.add_argument("--size", type=int, help="height and width of the frames in pixels")
    parser.add_argument(
        "--defence",
        default="sealed",
        help="none, psgl or sealed (default); or, to compare: gaussian, nopeek, ressfl, cem, projection, "
        "psgl-published, label, scores",
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder; the same command again goes on")
    parser.add_argument(
        "--epochs", type=int, default=10, help="(default: 10); with --over the most that this site agrees to"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--shift", type=int, default=0, help="move training frames at random by so many pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--values", type=int, help="sealed: values of the bottleneck")
    parser.add_argument("--sigma", type=float, help="sealed: standard deviation of the noise")
    parser.add_argument(
        "--training-sigma", type=float, help="sealed: standard deviation in training, where it is another"
    )
    parser.add_argument(
        "--spread", choices=("class", "frame"), help="sealed: whose spread the entropy term takes"
    )
    parser.add_argument("--entropy-weight", type=float, help="sealed: weight of the entropy term")
    parser.add_argument(
        "--captures", type=int, help="sealed: captures of a scene that the entropy term reckons with"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="sealed: steps from 0 to the bound to which a value is rounded before the noise",
    )
    parser.add_argument("--eps", type=float, help="psgl, sealed: budget of the map")
    parser.add_argument("--gamma", type=float, help="psgl, sealed: fraction of the pixels that keep their map")
    parser.add_argument("--map", choices=("logits", "probabilities"), help="psgl, sealed: outputs of the map")


def _add_broker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broker", metavar="HOST:PORT", help=f"default: {DEFAULT_BROKER}")
    for name, what in (("ca", "the broker's authority"), ("cert", "own certificate"), ("key", "own key")):
        parser.add_argument(f"--{name}", help=f"for mutual TLS: {what}, a PEM file")


def _broker_of(arguments: argparse.Namespace) -> Any:
    from splitward.training.remote.carrier import Broker

    broker = DEFAULT_BROKER if arguments.broker is None else arguments.broker
    host, _, port = broker.rpartition(":")
    try:
        host.encode("idna")  # as the connection will, in a thread of its own
    except UnicodeError as error:
        raise SplitwardError(f"--broker {broker}: {host} is no host name ({error}). Give HOST:PORT.") from error
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise SplitwardError(f"--broker {broker}: give HOST:PORT, with a port of 1 to 65535.")
    secret = [os.environ.get(f"SPLITWARD_BROKER_{name}") for name in ("USERNAME", "PASSWORD")]
    return Broker(host, int(port), arguments.ca, arguments.cert, arguments.key, *secret)


def _settings_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The data set and the run's settings."""
    from splitward.data import open_dataset
    from splitward.training.settings import RunSettings, split_settings

    dataset = open_dataset(arguments.data, task=arguments.task, size=arguments.size)
    split = split_settings(
        dataset,
        arguments.defence,
        seal={
            name: getattr(arguments, name)
            for name in ("values", "sigma", "training_sigma", "steps", "entropy_weight", "spread", "captures")
        },
        saliency={"eps": arguments.eps, "gamma": arguments.gamma, "outputs": arguments.map},
    )
    return dataset, RunSettings(
        data=arguments.data,
        task=arguments.task,
        size=arguments.size,
        split=split,
        epochs=arguments.epochs,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        shift=arguments.shift,
        seed=arguments.seed,
    )


def _train(arguments: argparse.Namespace) -> int:
    from splitward.training.loop import train

    if arguments.over is None:
        idle = [
            f"--{name.replace('_', '-')}" for name in OVER if getattr(arguments, name) not in (None, False, [])
        ]
        if idle:
            raise SplitwardError(
                f"{', '.join(idle)}: only with --over mqtt. Give that, or train alone without."
            )
        dataset, settings = _settings_of(arguments)
        run = train(dataset, settings, arguments.out)
    else:
        from splitward.training.remote.site import Membership, train_at_site

        if arguments.training is None or arguments.device is None:
            raise SplitwardError(
                "--over mqtt needs --training and --device; `splitward coordinate` says the id."
            )
        site = "default" if arguments.site is None else arguments.site
        if not NAME.fullmatch(site):
            raise SplitwardError(f"--site {site}: give a name that matches {NAME.pattern}.")
        who = Membership(
            *(site, arguments.device, arguments.training, frozenset(arguments.peer)),
            guarded=not arguments.no_guard,
            keep_labels=arguments.labels == "client",
            broker=_broker_of(arguments),
        )
        dataset, settings = _settings_of(arguments)

        def tell(fingerprint: str) -> None:
            sys.stdout.write(f"this site's key: the others may check it with --peer {fingerprint}\n")
            sys.stdout.flush()

        run = train_at_site(dataset, settings, settings.split, arguments.out, who, tell)
    test = run.read_metrics()[-1]["test"]
    sys.stdout.write(
        f"{arguments.out}: test accuracy " + ", ".join(f"{k} {v:.4f}" for k, v in test.items()) + "\n"
    )
    return 0


def _coordinate(arguments: argparse.Namespace) -> int:
    from splitward.training.remote.plan import Plan
    from splitward.training.remote.site import coordinate

    broker = _broker_of(arguments)
    _, settings = _settings_of(arguments)
    plan = Plan(
        *(
            settings,
            arguments.arrangement or ("single" if arguments.sites == 1 else "splitfed-v2"),
            arguments.sites,
        ),
        *(arguments.rounds, arguments.labels, arguments.precision, arguments.clip, arguments.noise),
    )

    def tell(training: str) -> None:
        sys.stdout.write(f"training {training}: each site takes part with --over mqtt --training {training}\n")
        sys.stdout.flush()

    coordinate(plan, arguments.out, broker, tell)
    sys.stdout.write("every site has its run\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from export.exporter import check_target, export_run
    from splitward.data import open_dataset
    from splitward.training.run import open_run
    from splitward.wire.bundle import create_signing_key, public_key_path, read_signing_key

    run = open_run(arguments.run_folder)
    check_target(run, arguments.out)  # before a key is made for nothing
    path = arguments.key.expanduser()
    if arguments.key == DEFAULT_KEY and not path.exists():
        create_signing_key(path)
        sys.stdout.write(f"made a signing key: {path}; devices trust {public_key_path(path)}\n")
    key = read_signing_key(path)
    settings = run.settings
    dataset = open_dataset(settings.data, task=settings.task, size=settings.size)
    model = export_run(run, dataset, arguments.out, key)
    sys.stdout.write(f"{arguments.out}: model {model.hex()}\n")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from splitward.audit.flow import run_audit
    from splitward.audit.settings import AuditSettings

    values = {name: value for name, value in vars(arguments).items() if name not in ("run", "words")}
    if values["attacks"] is not None:
        values["attacks"] = tuple(values["attacks"].split(","))
    return run_audit(AuditSettings(**values, command=shlex.join(["splitward", *arguments.words])))


def _keygen(arguments: argparse.Namespace) -> int:
    from splitward.wire.bundle import create_signing_key, public_key_path

    path = arguments.key.expanduser()
    if path.exists():
        raise SplitwardError(f"{path}: exists already. Give another path; a lost key cannot be made again.")
    create_signing_key(path)
    sys.stdout.write(f"{path}: keep it secret; devices trust {public_key_path(path)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
