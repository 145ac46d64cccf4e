"""How Sphinx makes the book of `./kit site`; `build.py` writes the pages that it reads."""

from docutils import nodes
from latex2mathml.converter import convert

project = "kiwi-edit"
root_doc = "index"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "kiwi-edit"
html_static_path = ["book.css", "book.js"]
html_css_files, html_js_files = ["book.css"], ["book.js"]
html_show_copyright = html_show_sphinx = html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "github-light", "github-dark"
html_permalinks_icon = "#"
html_math_renderer = "mathml"

nb_execution_mode = "off"  # outputs are shown as they are stored
nb_merge_streams = True
nb_render_markdown_format = "gfm"
nb_ipywidgets_js = {}  # would be fetched; a widget's cell shows its static figure
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4


def setup(app):
    "Formulas as MathML, which browsers draw without a script or a font from elsewhere."

    def inline(self, node):
        self.body.append(convert(node.astext()))
        raise nodes.SkipNode

    def block(self, node):
        self.body.append(convert(node.astext(), display="block"))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
