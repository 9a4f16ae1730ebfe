"""Sphinx: ``make docs`` builds docs/_build/html, with every warning an error."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "pyprune"
copyright = "the pyprune authors, Apache-2.0"
release = re.search(r'^__version__ = "(.+)"', (ROOT / "pyprune" / "__init__.py").read_text(), re.M)[1]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.xref_missing", "ref.python"]
"""Links out of docs/ name files of the repository; ``tests/test_architecture.py`` checks that they exist."""

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"

html_theme = "furo"
html_title = f"pyprune {release}"
html_copy_source = False
