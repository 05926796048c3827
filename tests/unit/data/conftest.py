from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of pneumoniamnist.npz and mias.tar.xz: `SPLITWARD_DATA`, or shared/data beside the repository."""
    repository = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("SPLITWARD_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set SPLITWARD_DATA, or put it into {folder}")
    return folder
