from __future__ import annotations

import csv
import io
import json

import pytest
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from pyarrow import parquet

from cloud.record import Record
from splitward.wire.control import Result

pytestmark = pytest.mark.anyio


async def test_a_result_is_a_valid_fhir_report(cloud):
    await cloud.send(cloud.activation(7))
    stored = (await cloud.http.get("/v1/results")).json()["results"][0]
    result = stored["result"]
    answer = await cloud.http.get(f"/v1/results/{stored['device']}/{result['boot']}/7/fhir")
    assert answer.headers["content-type"] == "application/fhir+json"
    report = DiagnosticReport.model_validate_json(answer.text)  # HL7's own rules
    [observation] = report.contained
    assert (report.status, observation.status) == ("preliminary", "preliminary")
    assert report.result[0].reference == f"#{observation.id}"
    assert observation.valueCodeableConcept.text == result["class_name"]
    assert report.identifier[0].value == f"{stored['device']}/{result['boot']}/7"
    assert [part.code.text for part in observation.component] == ["zero", "one", "two"]
    scores = [float(part.valueQuantity.value) for part in observation.component]
    assert scores == pytest.approx(result["scores"], abs=1e-6)
    assert report.effectiveDateTime.timestamp() * 1e9 == pytest.approx(result["captured_at_ns"], abs=1e6)


async def test_an_unknown_frame_has_no_report(cloud):
    answer = await cloud.http.get(f"/v1/results/pi-1/{'0' * 32}/0/fhir")
    assert answer.status_code == 404
    assert json.loads(answer.text)["detail"].endswith("no such result is in the store.")


async def test_the_csv_has_every_result_once_over_many_pages(cloud, monkeypatch):
    monkeypatch.setattr("cloud.export._PAGE", 2)
    for sequence in range(5):
        await cloud.send(cloud.activation(sequence))
    answer = await cloud.http.get("/v1/results/export.csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert answer.headers["content-type"].startswith("text/csv")
    assert [int(row["sequence"]) for row in rows] == [0, 1, 2, 3, 4]
    stored = (await cloud.http.get("/v1/results?after=0")).json()["results"]
    for row, one in zip(rows, stored, strict=True):
        assert int(row["stored_at_ns"]) == one["result"]["stored_at_ns"]
        assert [float(score) for score in row["scores"].split()] == pytest.approx(
            one["result"]["scores"], rel=1e-5
        )
    assert len((await cloud.http.get("/v1/results/export.csv?device=another")).text.splitlines()) == 1


async def test_the_parquet_file_has_every_result_once_over_many_row_groups(cloud, monkeypatch):
    monkeypatch.setattr("cloud.export._PAGE", 2)
    monkeypatch.setattr("cloud.export.ROW_GROUP", 1)
    for sequence in range(5):
        await cloud.send(cloud.activation(sequence))
    answer = await cloud.http.get("/v1/results/export.parquet")
    file = parquet.ParquetFile(io.BytesIO(answer.content))
    assert file.num_row_groups == 3
    table = file.read()
    times = table.column("stored_at").cast("int64").to_pylist()
    rows = table.drop_columns(["captured_at", "received_at", "stored_at"]).to_pylist()
    stored = (await cloud.http.get("/v1/results?after=0")).json()["results"]
    assert times == [one["result"]["stored_at_ns"] for one in stored]
    for row, one in zip(rows, stored, strict=True):
        result = one["result"]
        assert row["sequence"] == result["sequence"]
        assert row["scores"] == pytest.approx(result["scores"], rel=1e-6)
        assert {name: row[name] for name in result["streams"]} == result["streams"]
    empty = await cloud.http.get("/v1/results/export.parquet?device=another")
    assert parquet.read_table(io.BytesIO(empty.content)).num_rows == 0
    monkeypatch.setattr("cloud.api.find_spec", lambda _name: None)
    refused = await cloud.http.get("/v1/results/export.parquet")
    assert (refused.status_code, refused.json()["reason"]) == (501, "no_parquet")


def test_no_spreadsheet_takes_a_name_for_a_formula():
    from cloud.export import _row

    result = Result("0" * 32, 0, "0" * 32, 0, "=cmd()", (1.0,), {}, 1, 2)
    assert "'=cmd()" in _row(Record("ward", "pi-1", 1, result))
