"""The API, version 1: results, devices, labels, live events, tokens, enrolment, bundles, roll-outs, trainings, the
audit trail.

Reading needs the scope `read`, changing `operate`. Devices need no token for what proves itself: an enrolment token,
a certificate's signature, a ticket. Every error is a problem detail (RFC 9457).
"""

from __future__ import annotations

import base64
import binascii
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from cloud import audit
from cloud.access import Operator, Reader, count_stranger
from cloud.export import csv_of_results, parquet_of_results
from cloud.fhir import MEDIA_TYPE, diagnostic_report
from cloud.problem import Problem
from cloud.record import HEX, NAME, Label
from cloud.rollout import Plan
from cloud.routes import Parts, as_json
from splitward.wire.control import MAX_BYTES
from splitward.wire.names import MAX_INTEGER
from splitward.wire.orders import Command, encode_order

MAX_LIMIT = 1000
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "The request cannot be read.",
        401: "A token is needed.",
        403: "Not allowed.",
        404: "Not here.",
        409: "In conflict with what is here.",
        413: "Too large.",
        422: "A value makes no sense.",
        429: "Too many requests.",
        503: "Not now.",
    }.items()
}
router = APIRouter(prefix="/v1", responses=PROBLEMS)
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]
Name = Annotated[str, Query(pattern=NAME)]
InPath = Annotated[str, PathParameter(pattern=NAME)]
Model = Annotated[str, PathParameter(pattern=HEX)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewToken(_Body):
    """A token to be made."""

    name: str = Field(pattern=NAME)
    scopes: list[Literal["read", "operate"]] = Field(min_length=1, max_length=2)
    days: float | None = Field(default=None, gt=0, le=3650)


class Invitation(_Body):
    """A one-time token for a device of a site."""

    site: str = Field(pattern=NAME)
    device: str | None = Field(default=None, pattern=NAME)
    hours: float = Field(default=24.0, gt=0, le=24 * 30)


class Enrol(_Body):
    """A device's request (docs/wire.md, section 8)."""

    token: str = Field(max_length=200)
    site: str = Field(pattern=NAME)
    device: str = Field(pattern=NAME)
    csr: str = Field(max_length=8192)


class Renew(_Body):
    """A device's request for the certificate that follows."""

    certificate: str = Field(max_length=16_384)
    csr: str = Field(max_length=8192)
    signature: str = Field(max_length=512)


class Why(_Body):
    """Why something is ended."""

    reason: str = Field(default="", max_length=200, pattern=r"^[^\x00]*$")  # PostgreSQL's texts hold no 0


NO_REASON = Why()
"""What a request without a body says."""


class NewLabel(_Body):
    """The true class of a frame."""

    device: str = Field(pattern=NAME)
    boot: str = Field(pattern=HEX)
    sequence: int = Field(ge=0, le=MAX_INTEGER)
    class_index: int = Field(ge=0, le=100_000)


class NewCommand(_Body):
    """An order to one device."""

    name: Literal["configure", "rollback", "diagnostics", "restart"]
    arguments: dict[str, Any] = Field(default_factory=dict, max_length=64)


class NewTraining(_Body):
    """A training across sites; `splitward.training.remote.plan.Plan` says what each value means.

    The sites' own data has to fit: frames of [channels, side, side] in so many classes, and the same defence.
    """

    name: str = Field(pattern=NAME)
    channels: int = Field(ge=1, le=3)
    side: int = Field(ge=8, le=512)
    classes: int = Field(ge=2, le=1000)
    defence: str = Field(default="sealed", pattern=NAME)
    values: int | None = Field(default=None, ge=1, le=65_536)
    sigma: float | None = Field(default=None, ge=0, le=100)
    entropy_weight: float | None = Field(default=None, ge=0, le=100)
    spread: Literal["class", "frame"] | None = None
    captures: int | None = Field(default=None, ge=1, le=1000)
    steps: int | None = Field(default=None, ge=1, le=127)
    training_sigma: float | None = Field(default=None, ge=0, le=100)
    epochs: int = Field(default=5, ge=1, le=10_000)
    batch: int = Field(default=128, ge=2, le=16_384)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    shift: int = Field(default=0, ge=0, le=64)
    seed: int = Field(default=0, ge=0, le=MAX_INTEGER)
    sites: int = Field(default=1, ge=1, le=256)
    arrangement: Literal["single", "turn", "splitfed-v1", "splitfed-v2", "fedsgd"] | None = None
    rounds: int = Field(default=1, ge=1, le=1_000_000)
    labels: Literal["cloud", "client"] = "cloud"
    precision: Literal["float32", "int8", "int4"] = "float32"
    clip: float = Field(default=0.0, ge=0, le=1e6)
    noise: float = Field(default=0.0, ge=0, le=1e6)
    silence_s: float = Field(default=60.0, gt=0, le=86_400)


# --- results -------------------------------------------------------------------------------------------------


@router.get("/models")
async def models(parts: Parts, _: Reader) -> Response:
    """The models that are served, and the names of their classes."""
    cards = parts.engine.cards.values()
    return as_json({"models": [{"model": c.model, "name": c.name, "classes": c.classes} for c in cards]})


@router.get("/devices")
async def devices(
    parts: Parts, _: Reader, site: Name | None = None, after: str = "", limit: Limit = 100
) -> Response:
    """Devices by site and name; go on after `next`, which is `SITE/DEVICE`."""
    _refuse_zero(after)
    place, _slash, device = after.partition("/")
    found = await parts.store.devices(site=site, after=(place, device), limit=limit)
    return as_json({"devices": found, "next": f"{found[-1].site}/{found[-1].device}" if found else after})


@router.get("/results")
async def results(
    parts: Parts,
    _: Reader,
    device: Name | None = None,
    site: Name | None = None,
    model: Annotated[str | None, Query(pattern=HEX)] = None,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Limit = 100,
) -> Response:
    """Results in the order of storing: the last `limit`, or the first `limit` after `after`.

    `after` is the `next` of an earlier answer, or a time in nanoseconds of UTC since 1970. Whoever follows `next` gets
    every result once.
    """
    _refuse_zero(after or "")
    try:
        page = await parts.store.page(device=device, site=site, model=model, after=after, limit=limit)
    except (ValueError, OverflowError) as error:
        raise Problem(422, "bad_cursor", f"after: {error}") from error
    return as_json(page)


@router.get("/results/export.{form}")
async def export_results(
    parts: Parts,
    _: Reader,
    form: Literal["csv", "parquet"],
    device: Name | None = None,
    site: Name | None = None,
    model: Annotated[str | None, Query(pattern=HEX)] = None,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
) -> StreamingResponse:
    """All results since `after`, a time in nanoseconds of UTC since 1970, as one file of any length."""
    if form == "parquet" and find_spec("pyarrow") is None:
        raise Problem(
            501, "no_parquet", "pyarrow is missing: install `splitward[parquet]`, or take export.csv."
        )
    write = {"csv": csv_of_results, "parquet": parquet_of_results}[form]
    rows = write(parts.store, device=device, site=site, model=model, since_ns=after)
    headers = {"content-disposition": f"attachment; filename=results.{form}"}
    kinds = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}
    return StreamingResponse(rows, media_type=kinds[form], headers=headers)


@router.get("/results/{device}/{boot}/{sequence}/fhir")
async def result_as_fhir(
    parts: Parts,
    _: Reader,
    device: InPath,
    boot: Annotated[str, PathParameter(pattern=HEX)],
    sequence: Annotated[int, PathParameter(ge=0, le=MAX_INTEGER)],
) -> Response:
    """One result as a FHIR R4B DiagnosticReport that contains its Observation."""
    key = (device, boot, sequence)
    record = (await parts.store.find([key])).get(key)
    if record is None:
        raise Problem(404, "no_result", f"{device}/{boot}/{sequence}: no such result is in the store.")
    card = parts.engine.cards.get(bytes.fromhex(record.result.model))
    return as_json(diagnostic_report(record, card.classes if card else ()), media_type=MEDIA_TYPE)


@router.get("/events")
async def events(parts: Parts, _: Reader, request: Request) -> StreamingResponse:
    """New results as server-sent events: `result`, and `missed` with a count when the reader was slow."""
    if parts.feed.full:
        raise Problem(503, "readers", "as many readers as there may be; close one, or poll /v1/results")
    stream = parts.feed.stream(partial(parts.access.is_good, request))
    return StreamingResponse(stream, media_type="text/event-stream")


@router.post("/labels", status_code=201)
async def label(
    parts: Parts, caller: Operator, labels: Annotated[list[NewLabel], Field(min_length=1, max_length=1000)]
) -> Response:
    """Tell the true classes of frames, from which the accuracy is known."""
    await parts.store.save_labels([Label(**one.model_dump()) for one in labels], time.time_ns(), caller.name)
    return as_json({"labels": len(labels)}, 201)


@router.get("/accuracy")
async def accuracy(parts: Parts, _: Reader) -> Response:
    """How many labelled results of each model are right."""
    return as_json({"models": await parts.store.accuracy()})


@router.get("/dead-letters")
async def dead_letters(parts: Parts, _: Reader, limit: Limit = 100) -> Response:
    """The last refused messages, newest first."""
    return as_json({"dead_letters": await parts.store.dead_letters(limit)})


# --- people --------------------------------------------------------------------------------------------------


@router.post("/tokens", status_code=201)
async def create_token(parts: Parts, caller: Operator, body: NewToken) -> Response:
    """Make a token; this answer is the only time that it is shown."""
    token = await parts.access.create(body.name, tuple(body.scopes), caller.name, body.days)
    return as_json({"name": body.name, "token": token}, 201)


@router.delete("/tokens/{name}")
async def revoke_token(parts: Parts, caller: Operator, name: InPath) -> Response:
    """Make a token useless at once."""
    await parts.access.revoke(name, caller.name)
    return as_json({"revoked": name})


@router.get("/audit")
async def audit_trail(
    parts: Parts, _: Reader, after: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0, limit: Limit = 100
) -> Response:
    """Who did what, oldest first; go on after the last number."""
    return as_json({"entries": await audit.entries(parts.store, after, limit)})


@router.get("/audit/check")
async def check_audit(parts: Parts, _: Reader) -> Response:
    """Whether the trail's chain is whole, and else the first entry that does not follow."""
    broken = await audit.verify(parts.store)
    return as_json({"whole": broken is None, "broken_at": broken})


# --- devices -------------------------------------------------------------------------------------------------


@router.post("/enrolment-tokens", status_code=201)
async def invite(parts: Parts, caller: Operator, body: Invitation) -> Response:
    """Make a one-time token for a device of a site; this answer is the only time that it is shown."""
    return as_json(await parts.enrolment.create_token(body.site, body.device, body.hours, caller.name), 201)


@router.post("/enrolments", status_code=201, dependencies=[Depends(count_stranger)])
async def enrol(parts: Parts, body: Enrol) -> Response:
    """Sign a device's certificate, and tell it whom to trust and where the broker is."""
    fleet = parts.fleet
    if fleet.trusted_key is None:
        raise Problem(409, "no_trusted_key", "set fleet.trusted_key to the public key that signs bundles.")
    certificate = await parts.enrolment.enrol(body.token, body.site, body.device, body.csr)
    answer = {
        "certificate": certificate,
        "authority": parts.authority.pem,
        "order_key": parts.authority.order_key_pem,
        "trusted_key": Path(fleet.trusted_key).read_text(encoding="ascii"),
        "broker": {"host": fleet.broker_host, "port": fleet.broker_port},
    }
    return as_json(answer, 201)


@router.post("/enrolments/renew", dependencies=[Depends(count_stranger)])
async def renew(parts: Parts, body: Renew) -> Response:
    """Sign the certificate that follows a valid one."""
    try:
        signature = base64.b64decode(body.signature, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(422, "bad_signature", f"signature: {error}") from error
    certificate = await parts.enrolment.renew(body.certificate, body.csr, signature)
    return as_json({"certificate": certificate, "authority": parts.authority.pem})


@router.get("/revocations.crl", dependencies=[Depends(count_stranger)])
async def revocations(parts: Parts) -> Response:
    """The revocation list for the broker's `crlfile`, PEM."""
    parts.metrics.revocations_fetched.set_to_current_time()
    return Response(await parts.enrolment.revocation_list(), media_type="application/x-pem-file")


@router.post("/devices/{device}/revoke")
async def revoke_device(parts: Parts, caller: Operator, device: InPath, body: Why = NO_REASON) -> Response:
    """Revoke a device's certificates; the broker refuses it once it has the new revocation list."""
    return as_json({"revoked": await parts.enrolment.revoke(device, body.reason, caller.name)})


@router.post("/devices/{site}/{device}/commands", status_code=202)
async def command(parts: Parts, caller: Operator, site: InPath, device: InPath, body: NewCommand) -> Response:
    """Order one device to do something."""
    _refuse_unsendable(parts, site, device, body)
    order = await parts.orders.command(site, device, body.name, body.arguments, caller.name)
    return as_json({"order": order}, 202)


# --- bundles -------------------------------------------------------------------------------------------------


@router.post(
    "/bundles",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
)
async def add_bundle(parts: Parts, caller: Operator, request: Request) -> Response:
    """Upload a signed bundle."""
    return as_json(await parts.registry.add(request.stream(), caller.name), 201)


@router.get("/bundles")
async def bundles(parts: Parts, _: Reader) -> Response:
    """Every bundle with its manifest, certificate included, newest first."""
    return as_json({"bundles": await parts.registry.every()})


@router.get("/bundles/{model}/file", dependencies=[Depends(count_stranger)])
async def bundle_file(
    parts: Parts, model: Model, ticket: Annotated[str, Query(max_length=300)]
) -> FileResponse:
    """The bundle's bytes, whole or by range, for the holder of a ticket."""
    if parts.authority.check_ticket(ticket, model, time.time()) is None:
        raise Problem(403, "bad_ticket", "the ticket is unknown, for another bundle, or expired.")
    about = await parts.registry.find(model)
    path = parts.registry.path(model)
    if not path.exists():
        raise Problem(404, "missing_file", f"the file of bundle {model} is gone: upload it again.")
    return FileResponse(path, media_type="application/octet-stream", headers={"ETag": f'"{about["sha256"]}"'})


@router.post("/rollouts", status_code=201)
async def create_rollout(parts: Parts, caller: Operator, body: Plan) -> Response:
    """Roll a bundle out: to a canary share first, then to the rest."""
    return as_json(await parts.rollouts.create(body, caller.name), 201)


@router.get("/rollouts")
async def rollouts(parts: Parts, _: Reader, limit: Limit = 100) -> Response:
    """The last roll-outs and the states of their orders."""
    return as_json({"rollouts": await parts.rollouts.latest(limit)})


@router.post("/rollouts/{rollout}/halt")
async def halt_rollout(parts: Parts, caller: Operator, rollout: Model, body: Why = NO_REASON) -> Response:
    """Stop a roll-out: nothing more is announced, and it is taken back within seconds of a broker being there."""
    await parts.rollouts.halt(rollout, body.reason or "halted by an operator", caller.name)
    return as_json({"halted": rollout})


@router.post("/trainings", status_code=201)
async def create_training(parts: Parts, caller: Operator, body: NewTraining) -> Response:
    """Begin a training across sites, which take part by its id."""
    return as_json(await parts.trainings.create(body.name, body.model_dump(exclude={"name"}), caller.name), 201)


@router.get("/trainings")
async def trainings(parts: Parts, _: Reader, limit: Limit = 100) -> Response:
    """The last trainings: state, round, and each site's steps and curve."""
    return as_json({"trainings": await parts.trainings.latest(limit)})


@router.get("/trainings/{training}")
async def training(parts: Parts, _: Reader, training: Model) -> Response:
    """One training."""
    return as_json(await parts.trainings.find(training))


@router.post("/trainings/{training}/stop")
async def stop_training(parts: Parts, caller: Operator, training: Model) -> Response:
    """Stop a training; every step is kept."""
    return as_json(await parts.trainings.change(training, "stop", caller.name))


@router.post("/trainings/{training}/resume")
async def resume_training(parts: Parts, caller: Operator, training: Model) -> Response:
    """Go on with a training where it was stopped."""
    return as_json(await parts.trainings.change(training, "resume", caller.name))


def _refuse_zero(text: str) -> None:
    """PostgreSQL has no place for the character 0 in a text."""
    if "\0" in text:
        raise Problem(422, "invalid", "after: holds a character that no name has.")


def _refuse_unsendable(parts: Parts, site: str, device: str, body: NewCommand) -> None:
    """The device would refuse the order, or it cannot be written, so it is refused here; made of the longest values."""
    order = Command(
        id="0" * 32, serial=MAX_INTEGER, site=site, device=device, name=body.name, arguments=body.arguments
    )
    try:
        size = len(encode_order(order, parts.authority.order_key))
    except (ValueError, RecursionError) as error:
        raise Problem(422, "bad_arguments", f"arguments: {error}.") from error
    if size > MAX_BYTES:
        detail = f"arguments: the order would have {size} bytes, and a device takes {MAX_BYTES}."
        raise Problem(422, "oversize", detail)
