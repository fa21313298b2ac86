"""Sphinx's settings; read by Sphinx alone."""

import functools
import os
import socket
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

import autorank_jax
from autorank_jax.manual import docstrings

project = "autorank_jax"
author = "the autorank_jax authors"
release = autorank_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["*.py"]
bibtex_bibfiles = ["references.bib"]
default_role = "code"

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "autorank_jax"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the theme's other place for the search
}
html_static_path = ["sphinx"]
html_css_files = ["wide.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style"), "Example", "Examples"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "config.cache"]
nb_execution_timeout = 1800  # of a block, on a machine that is busy
nb_execution_show_tb = True  # of every block that failed; -W makes errors of them
nb_merge_streams = True


def _online(host: str) -> bool:
    """Return whether a host is to be had, so that a build without a network passes all the same."""
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return False
    return True


_INVENTORIES = {
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
}
_NETWORK = os.environ.get("AUTORANK_JAX_OFFLINE") is None
intersphinx_mapping = {
    name: (url, None) for name, url in _INVENTORIES.items() if _NETWORK and _online(url.split("/")[2])
}


def _write_equation(page: Any, node: nodes.Element, *, block: bool) -> None:
    """Write an equation as MathML, which browsers draw by themselves: no script, no network."""
    written = latex2mathml.tex2mathml(node.astext(), as_block=block)
    page.body.append(f'<div class="math">{written}</div>' if block else written)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Connect the rewriting of docstrings, before napoleon takes their sections apart, and the writing of equations."""
    inline, block = (functools.partial(_write_equation, block=block) for block in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("autodoc-process-docstring", lambda *event: docstrings.process(event[1], event[3], event[5]), 400)
    app.connect("autodoc-process-signature", lambda *event: docstrings.shorten(*event[-2:]))
    app.connect("autodoc-skip-member", lambda *event: docstrings.skip(event[3]))
