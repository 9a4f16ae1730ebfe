"""HTML pages taken apart, by the standard library's parser and by a headless Chromium."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest

VOID = {"meta", "link", "br", "img", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


class Page(html.parser.HTMLParser):
    """Figures, tables and addresses of a page. Raises AssertionError where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        """Path, exact value and text of every ``<data>``."""
        self.tables: list[dict] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.charts: list[dict] = []
        self.open: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], f"never closed: {[tag for tag, _ in self.open]}"

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("src", "href") if name in given]
        if tag == "data":
            self.figures.append((given.get("data-path", ""), given["value"], ""))
        if tag == "table":
            around = self.open[-1][1]
            self.tables.append({"caption": "", "scopes": [], "around": around})
        if tag == "th":
            self.tables[-1]["scopes"].append(given.get("scope"))
        if tag == "figure":
            self.charts.append(given)
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> inside {[tag for tag, _ in self.open]}"
        self.open.pop()

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "script" in inside or "style" in inside:
            return
        self.text += data
        if "caption" in inside:
            self.tables[-1]["caption"] += data
        if inside and inside[-1] == "data":
            path, value, text = self.figures[-1]
            self.figures[-1] = (path, value, text + data)


def at(data, path: str):
    """``weights.0.error`` of plain data."""
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def check_figures(page: Page, data) -> set[str]:
    """Every figure that names a place is what stands there, and its text the same number; the places, for more."""
    for path, value, text in page.figures:
        if path:
            assert float(value) == at(data, path), path
        with_unit = text.strip("×% ").replace(",", "").replace("−", "-")
        try:
            shown = float(with_unit)
        except ValueError:
            continue  # 12 MiB, 3.4 s
        factor = 100 if text.endswith("%") else 1
        assert shown == pytest.approx(factor * float(value), rel=5.1e-3, abs=0.51 if factor == 100 else 0.0051), path
    return {path for path, _, _ in page.figures if path}


def check_accessible(page: Page) -> None:
    """Tables can be reached, scrolled and understood without eyes or mouse; nothing is fetched from anywhere."""
    assert page.tables
    for table in page.tables:
        assert table["caption"].strip() and set(table["scopes"]) <= {"col", "row"} and None not in table["scopes"]
        assert table["around"].get("tabindex") == "0" and table["around"].get("aria-label")
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def drawn(path: Path, folder: Path) -> list[list[list[float | None]]]:
    """What the charts of a page drew when Chromium opened it: per chart the columns of its data."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Uncaught" not in done.stderr, done.stderr
    page = Page(done.stdout.split("<!DOCTYPE html>")[-1].partition("</html>")[0] + "</html>")
    assert all("data-drawn" in chart for chart in page.charts), "a chart was not drawn"
    return [json.loads(chart["data-drawn"]) for chart in page.charts]
