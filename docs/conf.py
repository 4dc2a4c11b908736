"""Sphinx settings of the book's site. `tools/build_site.py` puts the chapters beside this file and runs it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinxcontrib.bibtex.plugin import register_plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

SETTINGS = Path(__file__).with_name("settings.ini").read_text(encoding="utf-8")


def setting(name: str) -> str:
    """Read one line of settings.ini."""
    return re.search(rf"^{name} *= *(.*)$", SETTINGS, re.M)[1]


project, author, copyright = "metabook", setting("author"), setting("copyright")
version = release = setting("version")
extensions = [
    "myst_nb",
    "sphinxcontrib.bibtex",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_togglebutton",
]
exclude_patterns = ["_build", "settings.ini"]
nitpick_ignore_regex = [("py:.*", r"(?!metabook\.).*")]  # names in signatures that others document
python_maximum_signature_line_length = 76
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Chapters come executed; an output with sliders carries its frames as HTML.
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 1)]
nb_ipywidgets_js = {}
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_enable_extensions += ["dollarmath", "fieldlist", "tasklist"]
myst_heading_anchors = 3
myst_update_mathjax = False  # docs/_static/mathjax-config.js says it, without an inline script
mathjax_path = "mathjax/tex-chtml.js"

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "book"
bibtex_default_style = "plain"

# Figures and equations are numbered within their chapter, whose number is in its file name.
numfig = math_numfig = True
numfig_secnum_depth = 1
math_eqref_format = "({number})"
html_secnumber_suffix = "\u2002"

html_theme = "sphinx_book_theme"
html_title = "metabook"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["metabook.css"]
html_js_files = [("mathjax-config.js", {"priority": 100}), ("explore.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}
html_copy_source = True
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "logo": {
        "text": "metabook",
        "image_light": "_static/logo.svg",
        "image_dark": "_static/logo.svg",
    },
    "use_download_button": True,
    "use_fullscreen_button": False,
    "use_issues_button": False,
    "home_page_in_toc": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    # An empty header: the theme would show a second search bar in it.
    "navbar_persistent": [],
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "pygments_light_style": "github-light-colorblind",
    "pygments_dark_style": "github-dark-colorblind",
    "extra_footer": "Apache License 2.0",
}


@dataclass
class AuthorYear(AuthorYearReferenceStyle):
    """Cite as Finn et al. (2017), or (Finn et al., 2017)."""

    bracket_textual: BracketStyle = field(default_factory=lambda: BracketStyle("(", ")"))
    bracket_parenthetical: BracketStyle = field(default_factory=lambda: BracketStyle("(", ")"))


register_plugin("sphinxcontrib.bibtex.style.referencing", "book", AuthorYear)


def number_chapters(self, env) -> list[str]:
    """Take a chapter's number from its file name: 08_maml is 8, A14_explore is A14."""
    for name, contents in env.tocs.items():
        if match := re.match(r"0*(A?\d+)_", name):
            number = (match[1],)
            title, *sections = contents.findall(nodes.reference)
            env.titles[name]["secnumber"] = title["secnumber"] = number
            env.toc_secnumbers[name] = {section["anchorname"]: () for section in sections}
            env.toc_secnumbers[name][""] = number
    return []


TocTreeCollector.assign_section_numbers = number_chapters


def without_handlers(app, page, template, context, doctree) -> None:
    """Leave out the theme's buttons whose script stands in the tag: printing is in every browser's menu."""
    for group in context.get("header_buttons", []):
        group["buttons"] = [b for b in group["buttons"] if b["type"] != "javascript"]


def fold_checks(app, doctree: nodes.document) -> None:
    """Put what is marked as a check, text and code, into one fold at the end of its section."""
    for section in list(doctree.findall(nodes.section)):
        marked = [n for n in section.children if {"metabook-checks", "tag_checks"} & classes_of(n)]
        if not marked:
            continue
        for node in marked:
            section.remove(node)
        cells = sum("cell" in classes_of(node) for node in marked)
        title = f"Checks ({cells})" if cells else "Details"
        start = f'<details class="metabook-fold"><summary>{title}</summary>'
        fold = [
            nodes.raw("", start, format="html"),
            *marked,
            nodes.raw("", "</details>", format="html"),
        ]
        inner = (i for i, n in enumerate(section.children) if isinstance(n, nodes.section))
        at = next(inner, len(section.children))
        section[at:at] = fold


def classes_of(node: nodes.Node) -> set[str]:
    return set(node["classes"]) if isinstance(node, nodes.Element) else set()


def setup(app) -> None:
    app.connect("doctree-read", fold_checks)
    app.connect("html-page-context", without_handlers, priority=900)  # after the theme
