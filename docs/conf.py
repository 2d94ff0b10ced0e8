"""Settings of Sphinx. `make docs` builds docs/_build/html and fails on any warning."""

import importlib.metadata

project = "superserve-jax"
author = "the authors of superserve-jax"
copyright = f"2026, {author}"
release = importlib.metadata.version("superserve-jax")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"superserve-jax {release}"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_fence_as_directive = {"math"}  # GitHub draws such blocks, too
myst_heading_anchors = 3  # links such as page.md#a-heading work

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autoclass_content = "class"
default_role = "code"  # docstrings write `names` like Markdown does
nitpicky = False
