"""What `./kit site` does: the notebooks as a book of web pages that needs no network.

python .ci/book/build.py [FOLDER]    write it to FOLDER (outputs/site); needs the extra `site`

The notebooks are written to a folder of their own as a reader should see them, and Sphinx makes pages of that folder.
"""

import ast
import html
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from notebooks import ROOT, module_name, notebooks

CARDS = {"The trained model": "assets/kiwi-edit-tiny/README.md", "Credits": "assets/world/CREDITS.md"}
ROOMS = {"data": "Data", "weights": "Weights", "train": "Training", "eval": "Evaluation", "apps": "Apps"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # where a relative link of Markdown leads
# a name in backticks that is no link yet; plain words, such as `train`, mean many things
NAME = re.compile(r"(?<![`\[])`((?=\w*[A-Z_])[A-Za-z_]\w+)`(?![`\]])")


def symbols(
    path: Path,  # a notebook
) -> dict[str, tuple[str, str]]:  # public name -> id of the cell that defines it, first line of its docstring
    "What a notebook exports."
    found = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.match(r"#\|\s*export", source):
            continue
        for node in ast.parse(source).body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not any("patch" in ast.dump(d) for d in node.decorator_list)
            ):
                found[node.name] = cell["id"], (ast.get_docstring(node) or "").split("\n")[0]
    return found


def chapters(
    root: Path,  # a checkout
) -> dict[str, list[Path]]:  # heading -> its notebooks
    "The parts of the book: the lessons, then the rooms of the library."
    found = {"Lessons": [], "Ground": []} | {title: [] for title in ROOMS.values()}
    room = ""
    for path in notebooks(root):  # one that exports nothing belongs to those before it
        room = module.rpartition(".")[0] if (module := module_name(path)) else room
        if path.stem != "index":
            found["Lessons" if path.parent.name == "nbs" else ROOMS.get(room, "Ground")].append(path)
    return found


def place(
    path: Path,  # a file of the checkout
    root: Path,
) -> str:  # where it lies in the book, without `.ipynb` and `.md`
    "Lessons lie at the top of the book."
    inside = path.resolve().relative_to(root.resolve()).as_posix().removeprefix("nbs/")
    return re.sub(r"\.(ipynb|md)$", "", inside)


class Book:
    "The pages that Sphinx reads, written from a checkout."

    def __init__(
        self,
        root: Path,  # a checkout
        folder: Path,  # where the pages are written
    ):
        self.root, self.folder = root, folder
        self.exported = {path: symbols(path) for path in notebooks(root)}
        names = [name for found in self.exported.values() for name in found]
        # a name that two modules have leads nowhere, which is better than astray
        self.homes = {n: path for path, found in self.exported.items() for n in found if names.count(n) == 1}

    def write(self) -> None:
        "All pages, and the files that they show or link to."
        for path in self.exported:
            self.notebook(path)
        cards = {title: self.root / card for title, card in CARDS.items() if (self.root / card).exists()}
        for card in cards.values():
            self.save(card, self.text(card.read_text(encoding="utf-8"), card))
        lines = ["# All names", "", "What each notebook exports.", ""]
        for path, found in self.exported.items():
            lines += [f"## `kiwi_edit.{module_name(path)}`", ""] if found else []
            lines += [f"- {self.link(n, path)}: {html.escape(text)}" for n, (_, text) in found.items()] + [""]
        (self.folder / "names.md").write_text("\n".join(lines), encoding="utf-8")

    def save(self, path, text):
        "A page of the book in the place of a file of the checkout."
        page = self.folder / (place(path, self.root) + path.suffix)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")

    def notebook(self, path):
        "A notebook without what is hidden, without directives, and with links to definitions."
        notebook = json.loads(path.read_text(encoding="utf-8"))
        ids = {}
        for name, (cell, _) in self.exported[path].items():
            ids.setdefault(cell, []).append(name)
        cells = []
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                cells.append(cell | {"source": self.text(source, path)})
            elif not re.search(r"^#\|\s*(hide|default_exp)\b", source, re.M):
                if cell["id"] in ids:
                    anchors = "".join(f'<span class="definition" id="def-{name}"></span>' for name in ids[cell["id"]])
                    cells.append(dict(cell_type="markdown", id=f"at-{cell['id']}", metadata={}, source=anchors))
                source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
                cells.append(cell | {"source": source, "outputs": stored(cell["outputs"])})
        if path.stem == "index":
            cells.append(dict(cell_type="markdown", id="contents", metadata={}, source=self.contents()))
        self.save(path, json.dumps(notebook | {"cells": cells}))

    def text(self, markdown, path):
        "Markdown with links that fit the book: to pages, to files that are copied, and from names to definitions."
        up = "../" * place(path, self.root).count("/")

        def follow(match):
            target = (path.parent / match[1]).resolve()
            if not target.is_file():
                return match[1]  # Sphinx says which page has it
            inside = target.relative_to(self.root.resolve()).as_posix()
            if target.suffix != ".ipynb" and inside not in CARDS.values():
                (self.folder / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(target, self.folder / inside)
            return up + inside.removeprefix("nbs/")

        def linked(line):
            return line if line.startswith("#") else NAME.sub(lambda m: self.link(m[1], self.homes.get(m[1]), up), line)

        markdown = re.sub(r"\n*^\[!\[Open in Colab\].*$", "", markdown, flags=re.M)
        parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)  # every second one is code
        parts[::2] = ["\n".join(map(linked, LINK.sub(follow, part).split("\n"))) for part in parts[::2]]
        return "".join(parts)

    def link(self, name, path, up=""):
        "A name as a link to the cell that defines it, if there is one."
        return (
            f'<a href="{up}{place(path, self.root)}.html#def-{name}"><code>{name}</code></a>' if path else f"`{name}`"
        )

    def contents(self):
        "The table of contents, which the sidebar shows."
        parts = []
        for title, paths in chapters(self.root).items():
            entries = [f"{label(path)} <{place(path, self.root)}>" for path in paths]
            parts.append((title, entries))
        cards = [f"{t} <{card.removesuffix('.md')}>" for t, card in CARDS.items() if (self.root / card).exists()]
        parts.append(("Reference", ["All names <names>", *cards]))
        lists = ["\n".join(["```{toctree}", ":hidden:", f":caption: {t}", "", *e, "```"]) for t, e in parts if e]
        return "\n\n".join(lists)


def label(
    path: Path,  # a notebook
) -> str:  # number and title
    "What the contents call a notebook."
    text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    return f"{path.stem[:2]} {text.removeprefix('# ').splitlines()[0]}"


def stored(
    outputs: list[dict],  # of a cell
) -> list[dict]:
    "The outputs that are for readers: no progress bars, no words in the place of a widget, no links into a running page."
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or "".join(data.get("text/plain", "")).startswith("interactive("):
            continue
        if "text/markdown" in data:
            text = re.sub(r"(?<!!)\[([^\]\n]*)\]\((?!\w+:|#)[^)\s]*\)", r"\1", "".join(data["text/markdown"]))
            output = output | {"data": data | {"text/markdown": text}}
        kept.append(output)
    return kept


def build(
    root: Path,  # a checkout
    out: Path,  # folder of the pages, made if missing
) -> int:  # Sphinx's exit status
    "Make the book."
    from sphinx.cmd.build import main

    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder).resolve() / "pages"
        Book(root, pages).write()
        here = str(Path(__file__).resolve().parent)
        # a link that leads nowhere is a warning, and a warning is a failure
        options = ["-q", "-W", "--keep-going", "-E", "-b", "html", "-c", here, "-d", f"{folder}/trees"]
        return main([*options, str(pages), str(out)])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    to = Path(sys.argv[1] if sys.argv[1:] else ROOT / "outputs" / "site").resolve()
    if failed := build(ROOT, to):
        sys.exit(failed)
    print(f"The book is {to / 'index.html'}; a browser opens it as it is.")
    print(f"Search shows excerpts, too, where the pages are served: python -m http.server --directory {to}")
