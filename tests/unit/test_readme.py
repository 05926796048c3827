"""What the README shows is what the product prints and reads."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib

from benchmarks import cloud_page, training
from cloud.config import CloudConfig
from edge.config import EdgeConfig
from splitward.cli import build_parser
from splitward.config import build_config
from splitward.demo.report import format_summary
from splitward.reproduce.privacy_page import readme_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_table_is_the_demos_own():
    summary = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    assert format_summary(summary) in README


def test_its_privacy_table_is_that_of_the_results():
    results = json.loads((ROOT / "docs/results/privacy.json").read_text(encoding="utf-8"))
    assert readme_table(results).strip() in README


@pytest.mark.parametrize(
    ("name", "format_page"), [("cloud", cloud_page.format_page), ("training", training.format_page)]
)
def test_pages_of_results_are_those_of_their_json(name, format_page):
    page = ROOT / f"docs/results/{name}.md"
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == format_page(result)


def test_its_configurations_are_accepted():
    edge, cloud = blocks("toml")
    device = build_config(tomllib.loads(edge), EdgeConfig, "README")
    assert device.device.id == "ward-3-camera"
    assert Path(device.capture.path).is_relative_to(device.device.state_dir), (
        "elsewhere the unit lets nothing be written"
    )
    assert build_config(tomllib.loads(cloud), CloudConfig, "README").models == ("out/mnist.server.json",)


def test_its_commands_parse():
    lines = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[:1] == ["splitward"]]
    assert len(commands) >= 3
    for words in commands:
        assert callable(build_parser().parse_args(words).run)


CITATION = re.compile(r"(?:(docs/)?(\w+\.md)), section (\d+)(?:,\s+(?:rule|property) (\d+))?")


def test_what_the_code_cites_is_in_the_docs():
    """Sections are headings `## N.`, rules and properties numbered items of theirs."""
    code = [path for room in ("splitward", "edge", "cloud", "export") for path in (ROOT / room).rglob("*.py")]
    cited = [found for path in code for found in CITATION.findall(path.read_text(encoding="utf-8"))]
    assert len(cited) > 10
    for docs, page, section, item in cited:
        text = (ROOT / docs / page).read_text(encoding="utf-8")
        _, found, rest = text.partition(f"\n## {section}. ")
        assert found, (page, section)
        assert not item or f"\n{item}. " in rest.split("\n## ")[0], (page, section, item)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_modules_it_runs_can_be_run(page):
    for name in set(re.findall(r"python -m ([\w.]+)", (ROOT / page).read_text(encoding="utf-8"))):
        found = find_spec(name)
        assert found is not None, name
        assert found.submodule_search_locations is None or find_spec(f"{name}.__main__"), name


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!https?:)[^)#]+)\)", README))))
def test_its_links_lead_somewhere(link):
    assert (ROOT / link).exists()
