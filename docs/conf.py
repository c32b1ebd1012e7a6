"""The documentation's settings: `make docs` builds it, strictly and without a network."""

import attnspan

project = "attnspan"
author = "The attnspan authors"
copyright = "the attnspan authors, Apache-2.0"
version = release = attnspan.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]
templates_path = []
# In our docstrings single backticks are code, as in Markdown.
default_role = "code"
napoleon_use_rtype = False
napoleon_use_ivar = True  # else attributes of frozen values are documented twice
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

html_theme = "furo"
html_title = "attnspan"
html_static_path = []
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#005b8f",
        "color-brand-content": "#005b8f",
    },
    "dark_css_variables": {
        "color-brand-primary": "#56b4e9",
        "color-brand-content": "#56b4e9",
    },
}
