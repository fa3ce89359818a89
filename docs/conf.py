"""The documentation: `make docs` builds it into build/docs, without a network and without warnings."""

import sys
from pathlib import Path

import triton_deq

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "triton-deq"
author = "The triton-deq authors"
copyright = f"2026, {author}"
version = release = triton_deq.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "traffic",
    "commands",
]
exclude_patterns = ["_extensions"]
html_theme = "furo"
html_title = f"triton-deq {version}"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # the docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
