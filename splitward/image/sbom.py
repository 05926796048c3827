"""The bill of materials of an image, in CycloneDX 1.5."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from urllib.parse import quote

from splitward.image.debian import Package
from splitward.image.wheels import Requirement


def format_sbom(
    name: str, version: str, packages: Sequence[Package], wheels: Sequence[Requirement], epoch: int
) -> str:
    """JSON text; the same contents give the same bytes."""
    components = [_debian(one) for one in sorted(packages)] + [_python(one) for one in sorted(wheels)]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'splitward:{name}:{version}')}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "operating-system", "bom-ref": "image", "name": name, "version": version},
        },
        "components": components,
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _debian(package: Package) -> dict[str, object]:
    architecture = "all" if package.path.endswith("_all.deb") else "arm64"
    purl = f"pkg:deb/debian/{quote(package.name)}@{quote(package.version)}?arch={architecture}"
    return _component(package.name, package.version, purl, package.sha256)


def _python(wheel: Requirement) -> dict[str, object]:
    name = wheel.name.replace("_", "-").lower()
    return _component(name, wheel.version, f"pkg:pypi/{name}@{quote(wheel.version)}", wheel.sha256)


def _component(name: str, version: str, purl: str, sha256: str) -> dict[str, object]:
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }
