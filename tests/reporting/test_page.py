"""Parts of a page: what is escaped, exact, reachable, and which files it carries."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pages import Page, check_accessible

from pyprune.reporting import page
from pyprune.reporting.page import Markup, Point, Section, Table, asset, chart, figure, lines, safe

ASSETS = Path(page.__file__).parent / "assets"


def test_vendored_files_are_those_that_the_note_names():
    note = (ASSETS / "README.md").read_text()
    sums = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", note, flags=re.M))
    assert set(sums.values()) == {"uPlot.iife.min.js", "uPlot.min.css"}
    for digest, name in sums.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
    version = re.search(r"uPlot \(v([\d.]+)\)", asset("uPlot.iife.min.js"))
    assert version and f"uPlot {version[1]}" in note and f"uplot@{version[1]}" in note


def test_text_is_escaped_and_markup_is_not():
    assert safe("<b>&") == "&lt;b&gt;&amp;" and safe(Markup("<b>")) == "<b>" and safe(None) == "–"
    assert Markup("<i>") + "<b>" == "<i>&lt;b&gt;" and isinstance(Markup("a") + "b", Markup)
    whole = page.page("<script>x</script>", [Section("A", Table("<c>", ["<h>"], [["<r>"]]).html())], lead="<l>")
    for text in ("<script>x", "<c>", "<h>", "<r>", "<l>"):
        assert text not in whole
    assert Page(whole).tables[0]["caption"] == "<c>"


def test_a_figure_keeps_every_bit():
    value = 0.1 + 0.2
    (found,) = Page(figure(value, "a.0.b")).figures
    assert found == ("a.0.b", "0.30000000000000004", "0.3") and float(found[1]) == value
    assert figure(None, "a") == "–"


def test_lines_share_their_places_in_ascending_order():
    table = lines("c", "x", [Point("a", 0.5, 2.0, "p.1"), Point("b", 0.25, 3.0), Point("a", 0.25, 1.0, "p.0")])
    assert table.head == ["x", "a", "b"] and list(table.plotted) == [1, 2]
    assert [[float(Page(cell).figures[0][1]) if cell else None for cell in row] for row in table.rows] == [
        [0.25, 1.0, 3.0],
        [0.5, 2.0, None],
    ]


def test_a_page_carries_the_library_and_its_licence_only_where_it_draws():
    drawing = chart(lines("c", "x", [Point("a", 0, 1), Point("a", 1, 2)]))
    whole, plain = (page.page("t", [Section("A b", part)]) for part in (drawing, Table("c", ["h"], [["r"]]).html()))
    assert "uPlot" in whole and "The MIT License" in whole and "uPlot" not in plain
    assert len(whole.encode()) < 100_000
    check_accessible(Page(whole))
    assert page.page("t", [Section("Empty", Markup(""))]).count("Empty") == 0
    assert chart(Table("c", ["x", "y"], [], plotted=[1])) == ""
