"""What docs/wire.md says, for the tests that hold the code to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")


@dataclass(frozen=True)
class Specification:
    """The text of docs/wire.md."""

    text: str

    def section(self, number: int) -> str:
        """The section `## number. ...`."""
        found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", self.text, re.DOTALL | re.MULTILINE)
        assert found, f"docs/wire.md has no section {number}"
        return found.group()

    def blocks(self, number: int, language: str) -> list[str]:
        """The fenced code blocks of one `language` in section `number`."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.section(number), re.DOTALL | re.MULTILINE)

    def reasons(self, number: int) -> set[str]:
        """The last column of the table of checks in section `number`."""
        (table,) = re.findall(r"^\| # \| check \| reason \|\n((?:\|.*\n)+)", self.section(number), re.MULTILINE)
        return set(re.findall(r"`([a-z_]+)` \|$", table, re.MULTILINE))


@pytest.fixture(scope="session")
def specification() -> Specification:
    """docs/wire.md."""
    path = Path(__file__).resolve().parents[2] / "docs" / "wire.md"
    return Specification(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_bytes() -> dict[str, bytes]:
    """Golden messages by name, from their hexadecimal files."""
    return {path.stem: bytes.fromhex(path.read_text()) for path in GOLDEN.glob("*.hex")}
