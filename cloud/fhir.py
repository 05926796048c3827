"""A result as FHIR R4B: a DiagnosticReport that contains its Observation.

The report is `preliminary` and says so in words: this is research software, and no physician has seen the frame.
Nothing in it names a patient, because the cloud knows none; who asks joins it to the examination by the frame's
identifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from cloud.record import Record

MEDIA_TYPE = "application/fhir+json"
SYSTEM = "urn:splitward"
"""Of our identifiers: `SYSTEM:frame` holds DEVICE/BOOT/SEQUENCE, `SYSTEM:device` and `SYSTEM:model` those ids."""
UCUM = "http://unitsofmeasure.org"
_NOTE = "Made by research software. It is not a medical device and no physician has confirmed this."


def diagnostic_report(record: Record, classes: Sequence[str] = ()) -> dict[str, Any]:
    """DiagnosticReport of one result (HL7 FHIR R4B, 10.3), as plain values for JSON.

    Parameters
    ----------
    record : Record
    classes : sequence of str
        Names of the model's classes, in the order of the scores; without them the scores are named by index.
    """
    result = record.result
    frame = [{"system": f"{SYSTEM}:frame", "value": "/".join(map(str, record.key))}]
    captured = _instant(result.captured_at_ns)
    conclusion = {"text": result.class_name}
    names = classes if len(classes) == len(result.scores) else [f"class {i}" for i in range(len(result.scores))]
    observation = {
        "resourceType": "Observation",
        "id": "decision",
        "identifier": frame,
        "status": "preliminary",
        "code": {"text": "Class by decision fusion of the attacked, recovered and fused stream"},
        "effectiveDateTime": captured,
        "issued": _instant(result.stored_at_ns),
        "valueCodeableConcept": conclusion,
        "method": {
            "coding": [{"system": f"{SYSTEM}:model", "code": result.model}],
            "text": "Proximal gradient split learning (arXiv:2201.04569)",
        },
        "device": {"identifier": {"system": f"{SYSTEM}:device", "value": record.device}},
        "note": [{"text": _NOTE}],
        "component": [
            {
                "code": {"text": name},
                "valueQuantity": {"value": round(float(score), 6), "unit": "score", "system": UCUM, "code": "1"},
            }
            for name, score in zip(names, result.scores, strict=True)
        ],
    }  # fmt: skip
    return {
        "resourceType": "DiagnosticReport",
        "contained": [observation],
        "identifier": frame,
        "status": "preliminary",
        "code": {"text": "Image classification by split inference"},
        "effectiveDateTime": captured,
        "issued": _instant(result.stored_at_ns),
        "result": [{"reference": "#decision"}],
        "conclusion": f"{result.class_name}. {_NOTE}",
        "conclusionCode": [conclusion],
    }


def _instant(at_ns: int) -> str:
    """A FHIR instant, to the millisecond."""
    at = datetime.fromtimestamp(at_ns // 1_000_000_000, timezone.utc)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at_ns // 1_000_000 % 1000:03d}Z"
