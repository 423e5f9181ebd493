"""Sphinx configuration: `make docs` builds the site; every warning is an error there."""

import ast
import os
import re
import sys
from pathlib import Path

import torchopt


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
# the kernels that execute the pages: one thread each, since two pages run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "TorchOpt"
author = "The TorchOpt developers"
copyright = f"2026, {author}, Apache-2.0"
version = release = torchopt.__version__
html_title = f"TorchOpt {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.mathml",
    "extensions.math_font",
    "extensions.symbol_links",
    "extensions.generated_pages",
    "extensions.clone_links",
    "extensions.parallel_execution",
    "extensions.navigation",
]
exclude_patterns = ["_build", "extensions", "generated"]
nitpicky = True  # a reference that leads nowhere is a warning
# what lies outside this site; inventories of other sites would need the network
nitpick_ignore_regex = [
    (r"py:.*", r"torch(\..*)?$"),
    (r"py:.*", r"(?:.*\.)?(Tensor|Module|Parameter|device|dtype|Size)$"),
    (
        r"py:.*",
        r"(typing|typing_extensions|collections|graphviz|optree|numpy|types|os|pathlib)\..*",
    ),
    (r"py:class", r"(.*\.)?[A-Z]$"),  # type variables
    (r"py:class", r"torchopt(\.[a-z_]+){2,}\.\w+"),  # internals: public ones are not so deep
    (r"py:class", r"(OnFailure|Choice|By|ParamsT)"),  # names of unions, texts
    (r"py:(class|obj)", r"(ellipsis|optional|function|Ellipsis)"),
]

# Python --------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name for name in ("Hyperparameter", "PyTree", "Schedule", "Step", "TensorTree")
}
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries = False
napoleon_custom_sections = [("Reference", "notes_style")]
napoleon_use_admonition_for_examples = False

# Executed pages ------------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "force"  # a page that ran yesterday proves nothing about today
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Look ----------------------------------------------------------------------------------------
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5d7a",
        "color-brand-content": "#0b5d7a",
        "color-brand-visited": "#0b5d7a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6cc5e0",
        "color-brand-content": "#6cc5e0",
        "color-brand-visited": "#6cc5e0",
    },
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
# The address of the repository stands in setup.py; None as long as it is published nowhere.
SOURCES = re.search(r"^SOURCES[^=]*= (.+)$", (HERE.parent / "setup.py").read_text(), re.MULTILINE)
if SOURCES is not None and (address := ast.literal_eval(SOURCES.group(1))):
    html_theme_options["source_repository"] = address
    html_theme_options["footer_icons"] = [
        {"name": "Repository", "url": address, "html": "Repository", "class": ""}
    ]
