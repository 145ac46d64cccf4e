"""What holds the repository together: notebooks, modules, README, kit and wheel say the same."""

import ast
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {*".py .md .ini .toml .txt .json .jsonl .ipynb .yaml .yml .csv .html .css .js".split(), ""}
UNWATCHED = {".git", ".venv", "build", "dist", "__pycache__", ".ipynb_checkpoints", ".gradio"}
UNWATCHED |= {".pytest_cache", ".ruff_cache"}
LOCAL = {ROOT / "outputs", ROOT / "data", ROOT / "runs"}  # what git ignores at the top


def script(name):
    "A script of .ci as a module."
    spec = importlib.util.spec_from_file_location(f"kit_{Path(name).stem}", ROOT / ".ci" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit_notebooks, kit_book = script("notebooks.py"), script("book/build.py")

NOTEBOOKS = kit_notebooks.notebooks(ROOT)
MODULES = sorted(p for p in (ROOT / "kiwi_edit").rglob("*.py") if not p.name.startswith("_"))


def text_of(*path):
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def load(path):
    return json.loads(text_of(path))


def source(cell):
    return "".join(cell["source"])


def code_cells(notebook):
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


README = text_of("README.md")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT / "kiwi_edit").as_posix())


# README and map


def test_readme_equals_the_index():
    assert README == kit_notebooks.readme(ROOT / "nbs" / "index.ipynb"), "`./kit export` writes it"


def test_every_number_of_the_readme_is_measured():
    assert not [line for line in README.splitlines() if "TODO" in line]


def test_the_map_matches_the_notebooks():
    rows = re.findall(r"^\| \[(\w+)\]\((nbs/[\w/]+)\.ipynb\) \| (?:`kiwi_edit\.([\w.]+)`|none) \|", README, re.M)
    assert [(name, file, module or None) for name, file, module in rows] == [
        (p.stem, p.relative_to(ROOT).with_suffix("").as_posix(), kit_notebooks.module_name(p))
        for p in NOTEBOOKS
        if p.stem != "index"
    ]


def test_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert "assets/figures/hero.gif" in links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_links_are_turned_towards_the_root():
    assert kit_notebooks.relink(
        '![a](../assets/a.png) [b](library/01_video.ipynb#x) <img src="../assets/c.png"> [d](https://e.org/../f)'
    ) == ('![a](assets/a.png) [b](nbs/library/01_video.ipynb#x) <img src="assets/c.png"> [d](https://e.org/../f)')


# badges


def test_badges_open_every_notebook_and_install_the_kit_once(tmp_path):
    from IPython.core.inputtransformer2 import TransformerManager

    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("llms.txt"))
    for _ in range(2):
        kit_notebooks.badges(tmp_path, "somebody/a-copy", "next")
    kit_notebooks.badges(tmp_path, "kiwi/kiwi-edit")
    for path in NOTEBOOKS:
        before, after = load(path), load(tmp_path / path.relative_to(ROOT))
        place = path.relative_to(ROOT).as_posix()
        assert source(after["cells"][0]).startswith(source(before["cells"][0]).rstrip())
        assert after["cells"][2:] == before["cells"][1:]
        links = re.findall(r"\]\((https://(?:colab|kaggle)[^)]*(?:ipynb))\)", source(after["cells"][0]))
        assert links == [
            f"https://colab.research.google.com/github/kiwi/kiwi-edit/blob/main/{place}",
            f"https://kaggle.com/kernels/welcome?src=https://github.com/kiwi/kiwi-edit/blob/main/{place}",
        ]
        install = TransformerManager().transform_cell(source(after["cells"][1]))
        ran = []
        shell = SimpleNamespace(run_line_magic=lambda *magic: ran.append(magic))
        exec(install, dict(get_ipython=lambda: shell))
        assert not ran and "run_line_magic('pip', 'install -q git+https://github.com/kiwi/kiwi-edit@main')" in install
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Open in Colab" in readme and "install0" not in readme
    with pytest.raises(ValueError, match="`repository` has to be OWNER/REPOSITORY but is 'kiwi'"):
        kit_notebooks.badges(tmp_path, "kiwi")


# the book


@pytest.fixture
def small(tmp_path):
    "A checkout of three notebooks."

    def notebook(name, *cells):
        "Texts, and tuples of code and what it shows."
        made = [dict(cell_type="markdown", id=f"c{i}", metadata={}, source=cell) for i, cell in enumerate(cells)]
        for cell in made:
            if isinstance(cell["source"], tuple):
                text, *outputs = cell["source"]
                cell.update(cell_type="code", source=text, outputs=outputs, execution_count=None)
        whole = dict(cells=made, metadata=load(NOTEBOOKS[0])["metadata"], nbformat=4, nbformat_minor=5)
        (tmp_path / "nbs" / name).write_text(json.dumps(whole), encoding="utf-8")

    (tmp_path / "nbs" / "library").mkdir(parents=True)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.json").write_text("{}")
    notebook("index.ipynb", "# kit\n\n[b](library/20_b.ipynb#then), `Twice`, `Never`, $x^2$")
    text = dict(output_type="display_data", metadata={}, data={"text/plain": "interactive(children=())"})
    notebook(
        "00_a.ipynb",
        "# One\n\n> first",
        ("#| default_exp a",),
        ('#| export\nclass Twice:\n    "Two <x>."',),
        ("#| hide\nsecret = 1",),
        ("slide()", text, dict(output_type="stream", name="stdout", text="seen")),
    )
    notebook(
        "library/20_b.ipynb",
        "# Two\n\n## Then\n\n[a](../00_a.ipynb), [f](../../assets/a.json), [`Twice`](../00_a.ipynb)",
        ("#| default_exp weights.b",),
        "`Twice`\n\n```python\nTwice()  # `Twice`\n```",
    )
    return tmp_path


def test_pages_of_the_book_are_what_a_reader_should_see(small):
    kit_book.Book(small, small / "pages").write()
    pages = {p.relative_to(small / "pages").as_posix(): p for p in (small / "pages").rglob("*") if p.is_file()}
    assert set(pages) == {"index.ipynb", "00_a.ipynb", "library/20_b.ipynb", "names.md", "assets/a.json"}
    index, lesson, room = (load(pages[name])["cells"] for name in ("index.ipynb", "00_a.ipynb", "library/20_b.ipynb"))
    definition = '<a href="{}00_a.html#def-Twice"><code>Twice</code></a>'
    assert index[0]["source"].endswith(f"[b](library/20_b.ipynb#then), {definition.format('')}, `Never`, $x^2$")
    assert ":caption: Lessons\n\n00 One <00_a>\n" in index[-1]["source"]
    assert ":caption: Weights\n\n20 Two <library/20_b>\n" in index[-1]["source"]
    assert "[a](../00_a.ipynb), [f](../assets/a.json), [`Twice`](../00_a.ipynb)" in room[0]["source"]
    assert room[1]["source"] == f"{definition.format('../')}\n\n```python\nTwice()  # `Twice`\n```"
    opened = [c["source"].partition("\n")[0] for c in lesson[1:]]
    assert opened == ['<span class="definition" id="def-Twice"></span>', "class Twice:", "slide()"]
    assert [o["text"] for o in lesson[-1]["outputs"]] == ["seen"], "a widget's words are no output for readers"
    assert "Two &lt;x&gt;." in pages["names.md"].read_text(encoding="utf-8")


def test_chapters_of_the_book_are_the_notebooks():
    found = kit_book.chapters(ROOT)
    assert [p.stem[:2] for p in found["Lessons"]] == [f"{i:02}" for i in range(11)]
    assert all(found.values())
    assert sorted(sum(found.values(), [])) == sorted(p for p in NOTEBOOKS if p.stem != "index")


def test_the_book_runs_nothing_and_fetches_nothing(small):
    conf = text_of(".ci", "book", "conf.py")
    assert 'nb_execution_mode = "off"' in conf and "nb_ipywidgets_js = {}" in conf and "://" not in conf
    pytest.importorskip("myst_nb", reason="`./kit site` installs it")
    assert kit_book.build(small, small / "out") == 0
    pages = {p: p.read_text(encoding="utf-8") for p in (small / "out").rglob("*.html")}
    for path, page in pages.items():
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', page)
        for link, anchor in re.findall(r'<a[^>]* href="(?!\w+:)([^"#]*)(?:#([^"]+))?"', page):
            target = (path.parent / link).resolve() if link else path
            assert target.is_file() and (not anchor or f'id="{anchor}"' in pages[target]), (path.name, link, anchor)
    assert "<math" in pages[small / "out" / "index.html"]
    assert (small / "out" / "searchindex.js").is_file()


# notebooks


@each_notebook
def test_headings_leave_out_no_level(path):
    "The book's contents would not be a tree, and `./kit site` refuses it."
    texts = [source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown"]
    plain = re.sub(r"^```.*?^```", "", "\n".join(texts), flags=re.M | re.S)
    levels = [0, *(len(mark) for mark in re.findall(r"^(#+) ", plain, re.M))]
    assert all(level <= before + 1 for before, level in zip(levels, levels[1:])), levels


@each_notebook
def test_notebook_is_small_clean_and_shows_its_outputs(path):
    assert path.stat().st_size < 2_000_000
    notebook = load(path)
    assert set(notebook["metadata"]) <= {"kernelspec", "nbdev"}, "`./kit export` cleans it"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    outputs = [o for c in code_cells(notebook) for o in c["outputs"]]
    assert outputs, "it has to be saved with its outputs"
    assert not [o for o in outputs if o["output_type"] == "error"]
    # GitHub cannot show saved widgets
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not [c for c in code_cells(notebook) if c["execution_count"] is not None or c["metadata"].keys() - {"nbdev"}]


@each_notebook
def test_cells_that_end_in_a_value_show_it(path):
    silent = re.compile(r"^#\|\s*(hide|export|eval:?\s*false|notest|slow|gpu)|;\s*\Z", re.M)
    for cell in code_cells(load(path)):
        text = source(cell)
        if not cell["outputs"] and not silent.search(text):
            end = (ast.parse(re.sub(r"^[%!].*$", "", text, flags=re.M)).body or [None])[-1]
            value = isinstance(end, ast.Expr) and isinstance(end.value, (ast.Name, ast.Attribute, ast.Subscript))
            assert not value, f"run it again: this cell ends in a value and shows none:\n{text}"


@each_notebook
def test_notebook_opens_with_title_and_summary(path):
    opening = "\n".join(source(c) for c in load(path)["cells"][:3] if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n\n> \S", opening)


# modules


@cache
def ranks():
    "The ground comes first, then the lessons in order, then the library."
    order = [kit_notebooks.module_name(p) for p in NOTEBOOKS]
    ground = [m for m, p in zip(order, NOTEBOOKS) if m and "." not in m and p.parent.name == "library"]
    return {m: i for i, m in enumerate(dict.fromkeys([*ground, *filter(None, order)]))}


def syntax(path):
    return list(ast.walk(ast.parse(text_of(path))))


def imported(path):
    "Whole names of what a module imports, wherever it does so: modules of the kit, and names of all others."
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in syntax(path):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            kit = module.removeprefix("kiwi_edit.") in ranks()
            yield from [module] if kit else [f"{module}.{a.name}" for a in node.names]


@each_module
def test_module_imports_only_what_stands_above_it(path):
    rank, name = ranks(), ".".join(path.relative_to(ROOT / "kiwi_edit").with_suffix("").parts)
    assert name in rank, "every module comes out of a notebook"
    found = {m.removeprefix("kiwi_edit.") for m in imported(path) if m.startswith("kiwi_edit.")} - {"__version__"}
    assert found <= rank.keys()
    assert not {m for m in found if rank[m] >= rank[name]}
    assert "." in name or not {m for m in found if "." in m}, "a lesson imports ground and lessons only"


@each_module
def test_module_has_no_print_and_no_torchvision(path):
    assert not [n for n in syntax(path) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    assert not [name for name in imported(path) if name.split(".")[0] == "torchvision"]


# the whole tree


def watched_files():
    for folder, folders, files in os.walk(ROOT):
        kept = [f for f in folders if f not in UNWATCHED and not f.endswith(".egg-info")]
        folders[:] = [f for f in kept if Path(folder, f) not in LOCAL]
        yield from (Path(folder) / f for f in files if Path(f).suffix in TEXT and f not in UNWATCHED)


def shown_text(notebook):
    "Cells of a notebook and what they print."
    for cell in notebook["cells"]:
        yield source(cell)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts = [output.get("text", ""), *(data.get(f"text/{kind}", "") for kind in ("plain", "html", "markdown"))]
            yield from map("".join, texts)


def test_no_paths_of_somebodys_machine():
    places = "|".join(["root", "home/[a-z]", "Users/[A-Za-z]", "work", "opt", "mnt", "tmp/[a-z]"])
    pattern = re.compile(rf"(?<![\w./:}}~-])/(?:{places})[\w.-]*/|[A-Z]:\\\\Users")
    found = []
    for path in watched_files():
        raw = path.read_text(encoding="utf-8", errors="replace")
        text = "\n".join(shown_text(json.loads(raw))) if path.suffix == ".ipynb" else raw
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in pattern.finditer(text) if m.group() != "/path/to/"]
    assert not found


# packaging


def project():
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib.loads(text_of("pyproject.toml"))["project"]


def test_bounds_and_constraints():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in text_of("constraints.txt").splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(Requirement(line).name): line for line in lines}
    assert pins["torch"] == "torch==2.13.0"
    assert "torchvision" not in pins
    assert not [line for line in lines if "+" in line or "://" in line or "==" not in line]
    extras = project()["optional-dependencies"]
    lists = [project()["dependencies"], *(extras[name] for name in ("notebooks", "demo", "dev", "site"))]
    wanted = [Requirement(r) for r in sum(lists, [])]
    assert not [r.name for r in wanted if canonicalize_name(r.name) not in pins]
    assert not [str(r) for r in wanted if {s.operator for s in r.specifier} != {">="}]


def test_wheel_carries_the_assets(tmp_path):
    tree = tmp_path / "tree"
    for name in ("kiwi_edit", "assets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, *"-m pip wheel -q --no-deps --no-build-isolation -w".split(), str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in (ROOT / "assets").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assets = {f"kiwi_edit/{p.relative_to(ROOT).as_posix()}" for p in files}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kiwi_edit").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == assets | modules
    needed = ("kiwi-edit-tiny/model_index.json", "samples/clip.mp4", "samples/reference.png")
    assert {f"kiwi_edit/assets/{name}" for name in needed} <= names
    assert wheel.stat().st_size < 100_000_000


# the kit


def kit_in(folder, python=None):
    "A checkout with nothing but the kit, and a PATH with no Python but the pretended one."
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for tool in ("sh", "cat", "dirname", "cksum", "rm", "date", "sleep"):
        (tools / tool).symlink_to(shutil.which(tool))
    if python:
        (tools / "python3").write_text(f"#!/bin/sh\n{python}\n")
        (tools / "python3").chmod(0o755)
    for name in ("kit", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return lambda *arguments: subprocess.run(
        ["sh", str(folder / "kit"), *arguments], env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60
    )


needs_sh = pytest.mark.skipif(os.name == "nt", reason="the kit is a POSIX shell script")


@needs_sh
def test_kit_explains_itself(tmp_path):
    kit = kit_in(tmp_path / "a folder")
    assert "./kit COMMAND" in kit("--help").stdout and kit("--help").returncode == 0
    assert kit().returncode == 2
    wrong = kit("tset")
    assert wrong.returncode == 2 and 'no command named "tset"' in wrong.stderr


@needs_sh
@pytest.mark.parametrize(
    "python, message",
    [
        (None, "no Python 3.11, 3.12 or 3.13 found"),
        ("echo 3.9", "python3 is 3.9"),
        ("echo 3.14", "python3 is 3.14"),
        ('case "$2" in *ensurepip*) exit 1 ;; esac; echo 3.12', "apt-get install python3.12-venv"),
    ],
    ids=["none", "too old", "too new", "no venv module"],
)
def test_kit_says_what_to_install(tmp_path, python, message):
    kit = kit_in(tmp_path / "a folder", python)
    result = kit("edit")
    assert result.returncode == 1 and message in result.stderr and "install" in result.stderr
    assert not (tmp_path / "a folder" / ".venv").exists() and not (tmp_path / "a folder" / ".venv.busy").exists()


@needs_sh
def test_kit_never_keeps_a_half_made_environment(tmp_path):
    # a Python whose venv comes out, and whose pip fails the first time
    made = tmp_path / "made"
    fake = f"""
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo made >> {made}; exit 0 ;;
    *"pip install"*) [ -e {tmp_path}/works ] || exit 7; exit 0 ;;
    *version_info*) echo 3.12 ;;
esac
exit 0"""
    kit = kit_in(tmp_path / "c", fake)
    for tool in ("mkdir", "cp"):
        (tmp_path / "c" / "bin" / tool).symlink_to(shutil.which(tool))
    failed = kit("setup")
    assert failed.returncode == 1 and "set-up failed" in failed.stderr
    assert not (tmp_path / "c" / ".venv" / ".kit-ready").exists()
    (tmp_path / "c" / ".venv.busy").write_text("")  # what an interrupted run leaves
    (tmp_path / "works").touch()
    again = kit("setup")
    assert again.returncode == 0 and "starting it anew" in again.stderr
    assert made.read_text().count("made") == 2
    quiet = kit("setup")
    assert quiet.returncode == 0 and quiet.stderr == "" and made.read_text().count("made") == 2
    with (tmp_path / "c" / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "installing" in kit("setup").stderr and made.read_text().count("made") == 2


@needs_sh
def test_entry_points_can_be_run():
    for path in (ROOT / "kit", ROOT / ".ci" / "run"):
        assert path.stat().st_mode & stat.S_IXUSR
        subprocess.run([path.read_text().split("\n")[0].removeprefix("#!").split()[-1], "-n", str(path)], check=True)
    assert "./kit test" in text_of(".ci", "run") and "./kit test" in README


def test_what_a_caller_can_mend_is_said_by_a_class():
    "A message that begins with the name of an argument is for people; its class has to say so."
    plain = "ValueError", "TypeError", "ImportError"
    for path in sorted((ROOT / "kiwi_edit").glob("*.py")):
        for node in syntax(path):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in plain and node.args:
                text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                assert not str(getattr(text, "value", "")).startswith("`"), f"{path.name}, line {node.lineno}"


def check(*command):
    "A Python script finds nothing to complain about."
    found = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", ["size.py", "lessons.py"])
def test_package_and_lessons_keep_to_their_limits(script):
    check(ROOT / ".ci" / script)


def test_notebooks_and_tests_are_formatted():
    check(*"-m ruff format --check .".split())
