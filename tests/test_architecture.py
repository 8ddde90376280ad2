"""Layers, third-party placement, sizes and words: docs/architecture.md, held by reading the source."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "psmc"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEMPLATES = sorted(p for p in (ROOT / "templates").rglob("*") if p.is_file())

# Top-level module or package of psmc -> layer. Imports go down or sideways only.
LAYERS = {
    "source": 0, "diagnostics": 0, "assets": 0, "checker": 0,
    "ir": 1,
    "frontend": 2, "algebra": 2, "reference": 2,
    "structure": 3, "derive": 3,
    "plan": 4, "codegen": 4,
    "runtime": 5,
    "pipeline": 6, "confirm": 6, "remembered": 6, "api": 6, "duality": 6, "tuning": 6, "cli": 6, "lang": 6, "nn": 6,
    "__init__": 6, "__main__": 6,
}  # fmt: skip
# Third-party package -> where it may be imported.
PLACES = {
    "lark": {"frontend"},
    "sympy": {"algebra", "derive", "structure"},
    "z3": {"algebra", "derive", "structure"},
    "jinja2": {"codegen"},
    "torch": {"reference", "runtime", "duality", "tuning", "nn"},
    "triton": {"reference", "runtime", "duality", "tuning", "nn"},
    "click": {"cli"},
    "rich": {"cli"},
    "numpy": {"reference", "runtime", "nn"},
}
# What psmc does is read off the algebra, so its code has no use for the name of a model.
ARCHITECTURES = {
    "mamba", "mamba2", "mamba3", "gla", "deltanet", "retnet", "kda", "rwkv", "rwkv4", "rwkv6", "rwkv7", "mlstm",
    "xlstm", "slstm", "hgrn", "hgrn2", "mingru", "minlstm", "griffin", "hawk", "lru", "rglru", "s4", "s4d", "s5", "s6",
    "h3", "hyena", "comba", "ssd", "gsa", "viterbi",
}  # fmt: skip
# Not models: functools' cache, and files that a command's help takes as its example.
OTHERWISE = re.compile(r"\blru_cache\b|\b\w+\.(?:psm|py)\b")
MAX_MODULE, MAX_TEMPLATE = 400, 150


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def top(path: Path) -> str:
    """The name under which LAYERS knows a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also of those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            if node.module == "psmc":
                yield from ((node.lineno, f"psmc.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def test_every_module_has_a_layer() -> None:
    assert {top(p) for p in MODULES} <= LAYERS.keys()
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listing = text[text.index("    0  source") :].split("\n\n")[0]
    for name in LAYERS.keys() - {"__init__", "__main__"}:
        assert re.search(rf"\b{name}\b", listing), f"docs/architecture.md does not list {name}"


def test_imports_go_down() -> None:
    wrong = []
    for path in MODULES:
        here = LAYERS[top(path)]
        for line, module in imported(path):
            # `from psmc import load` takes a name of the package itself, which is at the top
            if module.startswith("psmc.") and LAYERS.get(module.split(".")[1], LAYERS["__init__"]) > here:
                wrong.append(f"{name_of(path)}:{line}: layer {here} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_packages_do_not_need_each_other() -> None:
    """Sideways imports make no circle between packages of one layer."""
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        edges.setdefault(top(path), set())
        for _, module in imported(path):
            if module.startswith("psmc.") and module.split(".")[1] in LAYERS:
                edges[top(path)].add(module.split(".")[1])
    below_top = {n: e - {n} for n, e in edges.items() if LAYERS[n] < LAYERS["__init__"]}
    while below_top:
        ready = [n for n, e in below_top.items() if not e & below_top.keys()]
        assert ready, f"packages that import each other in a circle: {sorted(below_top)}"
        for name in ready:
            del below_top[name]


def test_third_party_packages_stay_in_their_place() -> None:
    wrong = []
    for path in MODULES:
        for line, module in imported(path):
            root = module.split(".")[0]
            if root == "psmc" or root in sys.stdlib_module_names:
                continue
            places = sorted(PLACES.get(root, set()))
            if top(path) not in places:
                wrong.append(f"{name_of(path)}:{line}: {root} belongs in {', '.join(places) or 'no package'}")
    assert not wrong, "\n".join(wrong)


BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'numpy', 'sympy', 'z3'), None))\n"


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Python with torch, triton and whatever else psmc does not depend on made unimportable."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_check_needs_neither_torch_nor_triton() -> None:
    files = [f"examples/{n}.psm" for n in ("gla", "deltanet_recurrence", "mlstm", "transformer_psm")]
    done = run_blocked(f"from psmc.cli import main; main(['check', *{files!r}])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proved") >= 6
    wrong = run_blocked("from psmc.cli import main; main(['check', 'examples/wrong/leaky.psm'])")
    assert wrong.returncode == 1 and "PSM301" in wrong.stderr, wrong.stderr


def test_compile_needs_neither_torch_nor_triton(tmp_path: Path) -> None:
    done = run_blocked(f"from psmc.cli import main; main(['compile', 'examples/mingru.psm', '-o', {str(tmp_path)!r}])")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.py"))


def test_sizes() -> None:
    wrong = []
    for path in (*MODULES, *TEMPLATES):
        limit = MAX_MODULE if path.suffix == ".py" else MAX_TEMPLATE
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            wrong.append(f"{name_of(path)} has {lines} lines, {limit} are allowed: split it")
    assert not wrong, "\n".join(wrong)


def docstrings(path: Path) -> set[tuple[int, int]]:
    """Positions of the strings that stand as statements."""
    return {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def pieces(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", OTHERWISE.sub("", text).lower())


def words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, lower-case piece) of every name and string of code, docstrings and comments aside."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = re.sub(r"\{#.*?#\}|#[^\n]*|\"\"\".*?\"\"\"", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        yield from ((n, w) for n, line in enumerate(text.splitlines(), 1) for w in pieces(line))
        return
    skipped = docstrings(path)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start not in skipped:
            yield from ((token.start[0], w) for w in pieces(token.string))


def test_no_code_asks_for_an_architecture() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {word}"
        for path in (*MODULES, *TEMPLATES)
        if PACKAGE / "nn" not in path.parents
        for line, word in words(path)
        if word in ARCHITECTURES
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_open() -> None:
    left = re.compile(r"\b(NotImplementedError|TODO|FIXME|XXX)\b")
    wrong = [name_of(p) for p in (*MODULES, *TEMPLATES) if left.search(p.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


def shipped() -> list[Path]:
    """Every text file of a clean clone but this test."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:  # an unpacked archive
        folders = ("psmc", "grammar", "templates", "tests", "examples", "docs", "benchmarks", "generated", ".ci")
        paths = [p for f in folders for p in (ROOT / f).rglob("*")] + list(ROOT.glob("*"))
    suffixes = {".py", ".psm", ".md", ".toml", ".txt", ".j2", ".lark", ".json", ".yml", ".yaml", ".sh", ""}
    return sorted(p for p in paths if p.is_file() and p.suffix in suffixes and p != Path(__file__).resolve())


def test_no_machine_paths_and_no_registry_hosts() -> None:
    machine = re.compile(r"(?<![\w.~$}/])/(?:work|tmp|home|root|Users|mnt|opt|usr(?!/bin/env))/\w[\w./-]*")
    hosts = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|registry\.npmjs|anaconda\.org|index-url")
    wrong = []
    for path in shipped():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found = machine.findall(line) + hosts.findall(line)
            wrong += [f"{name_of(path)}:{number}: {text}" for text in found]
    assert not wrong, "\n".join(wrong)
