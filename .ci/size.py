"""How large the package is, module by module, against the limits that CI holds.

python .ci/size.py          the table, and a line for each limit that is broken; their number is the exit status
python .ci/size.py --long   also the longest functions, the wide lines and the names that nobody uses
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"code lines": 14_640, "public names": 350, "longest function": 60, "wide lines": 0, "unused names": 0}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstring(
    node: ast.AST,  # a module, class or function
) -> set[int]:  # the lines of its docstring
    "Where the docstring of a definition stands."
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return set(range(first.lineno, first.end_lineno + 1))
    return set()


def code_lines(
    text: str,  # a module
    tree: ast.Module,
) -> set[int]:
    "Lines with code: neither blank nor comment, docstring or the list `__all__`."
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DEFINITIONS)):
            lines -= docstring(node)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def defined(tree: ast.Module) -> list[str]:
    "Names that a module defines at its top, public or not."
    names = []
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            marks = {word.id for mark in node.decorator_list for word in ast.walk(mark) if isinstance(word, ast.Name)}
            names += [] if marks & {"patch", "patch_to"} else [node.name]  # a method of a class elsewhere
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [name for name in dict.fromkeys(names) if not re.fullmatch(r"__\w+__", name)]


def measure(
    root: Path = ROOT,  # a checkout
) -> tuple[list[dict], dict]:  # a row for each module; lists of what is long, wide and unused
    "Count every module of the package."
    paths = sorted(p for p in (root / "kiwi_edit").rglob("*.py") if p.stem not in ("_modidx", "__init__"))
    texts = {p.relative_to(root / "kiwi_edit").as_posix(): p.read_text(encoding="utf-8") for p in paths}
    rest = [*(root / "nbs").rglob("*.ipynb"), *(root / "tests").glob("*.py"), root / "kit", root / "pyproject.toml"]
    elsewhere = "\n".join(p.read_text(encoding="utf-8") for p in rest if p.exists())
    # a name in a notebook's own export counts once there, so a use by a notebook or a test is a second mention
    counts = Counter(re.findall(r"\w+", elsewhere))
    rows, found = [], {"functions": [], "wide": [], "unused": []}
    words = {
        name: re.findall(r"\w+", re.sub(r"__all__ = \[.*?\]", "", text, flags=re.S)) for name, text in texts.items()
    }
    for name, text in texts.items():
        tree = ast.parse(text)
        names = defined(tree)
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        lines = code_lines(text, tree)
        for f in functions:
            size = len(lines & set(range(f.body[0].lineno, f.end_lineno + 1)))
            found["functions"].append((size, f"{name}: {f.name}"))
        wide = {i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120}
        found["wide"] += [f"{name}:{i}" for i in sorted(wide & lines | wide & docstring(tree))]
        decorated = {n.name for n in tree.body if isinstance(n, DEFINITIONS) and n.decorator_list}  # a registry's
        for public in set(names) - decorated:
            at_home = words[name].count(public)
            abroad = sum(w.count(public) for other, w in words.items() if other != name)
            if at_home < 2 and not abroad and counts.get(public, 0) < 2:
                found["unused"].append(f"{name}: {public}")
        rows.append({"module": name, "code lines": len(lines), "public names": sum(n[0] != "_" for n in names)})
    found["functions"].sort(reverse=True)
    return rows, found


def main() -> int:
    "Print the table; the exit status says how many limits are broken."
    rows, found = measure()
    totals = {
        "code lines": sum(r["code lines"] for r in rows),
        "public names": sum(r["public names"] for r in rows),
        "longest function": found["functions"][0][0],
        "wide lines": len(found["wide"]),
        "unused names": len(found["unused"]),
    }
    print(f"{'module':32}{'code lines':>12}{'public names':>14}")
    for row in rows:
        print(f"{row['module']:32}{row['code lines']:12,}{row['public names']:14}")
    print("\n" + "\n".join(f"{name:20}{value:8,}  of at most {LIMITS[name]:,}" for name, value in totals.items()))
    if "--long" in sys.argv:
        print(
            "\nfunctions above 60 lines\n" + "\n".join(f"  {n:4} {where}" for n, where in found["functions"] if n > 60)
        )
        print("\nlines above 120 columns\n  " + ", ".join(found["wide"]))
        print("\nused by nobody\n  " + ", ".join(found["unused"]))
    broken = [name for name, value in totals.items() if value > LIMITS[name]]
    for name in broken:
        print(f"size: {name} is {totals[name]:,} and may be {LIMITS[name]:,}", file=sys.stderr)
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
