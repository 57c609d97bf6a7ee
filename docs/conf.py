"""The site: `sphinx-build -W docs docs/_build`. Its tutorials are run while it is built."""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# this checkout is documented, whatever else is installed, by this process and by those that run the tutorials
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, which would draw one with ipywidgets

project = "pyro_vae"
author = "the authors of pyro_vae"
project_copyright = author
repository = "OWNER/pyro_vae"  # on GitHub; badges and first cells of tutorials/ name it, which a test compares
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]  # where executed pages are left, beside the site

html_theme = "furo"
html_title = "pyro_vae"
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "html_image"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 300
os.environ["OMP_NUM_THREADS"] = "1"  # pages are run side by side, and threads of one would wait for those of another
nb_execution_in_temp = True  # what a tutorial writes does not stay
nb_output_stderr = "remove-warn"  # a tutorial that warns is an error; cells that show progress are tagged

add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def resolve_public_name(app, env, node, contnode):
    """A reference to ``pyro_vae.fit`` leads to where ``fit`` is defined and described."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("pyro_vae."):
        return None
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        defined = f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError):
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], defined, node, contnode)


def skip_member(app, what, name, found, skip, options):
    """The fields of a named tuple are described by its docstring."""
    return True if type(found).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("missing-reference", resolve_public_name)
    app.connect("autodoc-skip-member", skip_member)
