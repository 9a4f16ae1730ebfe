"""The description of the code is that of the code: packages name their modules, docs name what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import pyprune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyprune"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def listed(docstring: str) -> set[str]:
    """Modules that have a line of their own."""
    return set(re.findall(r"^``(\w+)`` ", docstring, flags=re.M))


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_lives_in_it(package):
    docstring = importlib.import_module(f"pyprune.{package}").__doc__
    assert listed(docstring) == modules(PACKAGE / package)
    assert "From outside:" in docstring or "Nothing imports from here" in docstring
    assert "May import:" in docstring


def test_the_top_level_says_what_belongs_to_no_package():
    assert listed(pyprune.__doc__) == modules(PACKAGE)


def test_the_picture_has_the_packages_in_the_order_of_the_contract():
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    order = re.findall(r"pyprune\.(\w+)", contract)
    picture = (ROOT / "docs" / "architecture.md").read_text().partition("```\n")[2].partition("```")[0]
    drawn = [
        name
        for line in picture.splitlines()
        if re.match(r" \w", line)
        for name in re.findall(r"\w+", re.split(r"  +", line.strip())[0])
    ]
    assert drawn == order


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:pyprune|tests|benchmarks|docs|csrc|triton_kernels)/[\w./*-]+)`", text))
    named |= {str(Path(document).parent / link) for link in re.findall(r"\]\(([\w./-]+)\)", text)}
    missing = [name for name in sorted(named) if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing


def test_sources_name_files_that_exist():
    """In their comments and docstrings; the wheel has the kernels inside the package."""
    sources = [path for folder in ("pyprune", "triton_kernels", "csrc") for path in (ROOT / folder).rglob("*")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
        for name in re.findall(
            r"\b((?:pyprune|tests|csrc|triton_kernels)/[\w/]+\.(?:py|h|cpp|cuh?))\b", path.read_text()
        )
        if not (ROOT / name).is_file()
    ]
    assert len(sources) > 200 and missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_code_that_exists(document):
    text = (ROOT / document).read_text()
    names = re.findall(r"`((?:pyprune\.)?(?:" + "|".join([*PACKAGES, "config", "effects"]) + r")(?:\.\w+)+)", text)
    missing = [name for name in dict.fromkeys(names) if not exists(name.removeprefix("pyprune."))]
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    if parts[-1] in ("py", "md", "json", "yaml", "toml"):
        return True  # a file
    found = pyprune
    for depth, part in enumerate(parts):
        try:
            found = importlib.import_module("pyprune." + ".".join(parts[: depth + 1]))
        except ImportError:
            if part not in getattr(found, "__dataclass_fields__", {}) and not hasattr(found, part):
                return False
            found = getattr(found, part, found)
    return True
