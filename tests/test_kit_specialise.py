"""Generated modules hold what their spec needs of the runtime: nothing unused, nothing missing."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

from psmc.codegen.paste import KIT, paste
from psmc.codegen.specialise import answered
from psmc.pipeline import pick, read, read_text

EXAMPLES = Path(__file__).parent.parent / "examples"
TAPPED = """
aggregator tapped {
  input x, w in (-1, 1)
  state a = 1, s = 0
  lift { a = w; s = 0.5 * x + 0.25 * x{-1} }
  combine (l, r) { a = l.a * r.a; s = r.a * l.s + r.s }
  output y = s + prev.s
  associative: yes
}"""
EXAMPLE = ["cumsum", "viterbi", "gla", "elman", "pr_lstm", "transformer_psm", "attention_combine"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    found = {name: pick(read(EXAMPLES / f"{name}.psm", 20.0), None, name).text for name in EXAMPLE}
    return {**found, "tapped": read_text(TAPPED)[0].text}


def top_level(tree: ast.Module) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id: node for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def unused(text: str) -> set[str]:
    """Top-level names, imports and private methods that nothing else in a module mentions."""
    tree = ast.parse(text)
    defined = top_level(tree)
    public = ast.literal_eval(defined["__all__"].value)  # type: ignore[attr-defined]
    read: dict[str, set[int]] = {}
    for at, node in enumerate(tree.body):
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store):
                read.setdefault(n.id, set()).add(at)
    places = {name: tree.body.index(node) for name, node in defined.items()}
    gone = {name for name, at in places.items() if not read.get(name, set()) - {at}} - {*public, "__all__"}
    imported = {(a.asname or a.name).split(".")[0] for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)
                for a in n.names} - {"annotations"}  # fmt: skip
    attributes = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    methods = {m.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for m in c.body
               if isinstance(m, ast.FunctionDef)}  # fmt: skip
    private = {m for m in methods if m.startswith("_") and not m.startswith("__")}
    return gone | (imported - read.keys()) | (private - set(attributes))


def missing(text: str) -> set[str]:
    """Names and private attributes that are read and nowhere bound."""
    tree = ast.parse(text)
    bound = set(dir(builtins)) | {"triton"}
    attributes: dict[bool, set[str]] = {False: set(), True: set()}
    for n in ast.walk(tree):
        match n:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
                attributes[True].add(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                bound.add(name)
                attributes[True].add(name)
            case ast.Import() | ast.ImportFrom():
                bound |= {(a.asname or a.name).split(".")[0] for a in n.names}
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.Attribute(attr=name, ctx=ctx) if name.startswith("_") and not name.startswith("__"):
                attributes[isinstance(ctx, ast.Store)].add(name)
            case ast.Tuple(elts=[*elements]) if all(isinstance(e, ast.Constant) for e in elements):
                attributes[True] |= {str(e.value) for e in elements}  # __slots__
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    torch_own = {a for a in attributes[False] if a.startswith(("_C", "_dispatch", "_are_functorch", "_replace", "_fields"))}
    return (read - bound) | (attributes[False] - attributes[True] - torch_own)


@pytest.mark.parametrize("name", [*EXAMPLE, "tapped"])
def test_nothing_is_unused_and_nothing_is_missing(texts, name: str) -> None:
    if name != "transformer_psm":  # the face of a rule from Python is a function
        assert f'__all__ = ["{name}"]' in texts[name]
    assert not unused(texts[name])
    assert not missing(texts[name])


def test_the_checks_see_what_they_should() -> None:
    text = '__all__ = ["a"]\nimport os\ndef a(): return b._c + d\nclass b:\n    def _e(self): ...\ndef f(): return f()\n'
    assert unused(text) == {"os", "_e", "f"}
    assert missing(text) == {"d", "_c"}


@pytest.mark.parametrize("name, words", [
    ("cumsum", ("counter_push", "tree_tokens", "lagged", "chunk_scan")),
    ("gla", ("counter_push", "tree_tokens", "lagged", "PointwiseKernels")),
    ("pr_lstm", ("lagged", "chunk_scan")),
    ("tapped", ("counter_push", "tree_tokens")),
])  # fmt: skip
def test_what_a_plan_does_not_run_is_not_there(texts, name: str, words: tuple[str, ...]) -> None:
    defined = top_level(ast.parse(texts[name])).keys()
    assert not defined & set(words)
    assert ("lagged" in defined) == (name == "tapped") and ("counter_push" in defined) == (name == "pr_lstm")


@pytest.mark.parametrize("name", EXAMPLE)
def test_the_sections_are_where_the_docstring_says(texts, name: str) -> None:
    lines = texts[name].splitlines()
    head = lines[: lines.index("from __future__ import annotations")]
    listed = [(int(m[1]), m[2]) for line in head if (m := re.fullmatch(r" +(\d+)  (\S.*)", line))]
    assert len(listed) > 8
    for number, title in listed:
        assert lines[number - 1].startswith(f"# --- {title.removesuffix(' ...')}"), (number, title)
    assert len(listed) == sum(line.startswith("# --- ") for line in lines)


PROGRAM = '''
def f(a, b):
    if no:
        return "gone"
    if a:
        b += 1
    elif no:
        b += 100
    else:
        b += 2
    if no:
        b = -1
    elif b > 3:
        b += 10
    else:
        b += 20
    if no or never(1):
        b = -2
    else:
        b = b * 3
    for _ in range(2):
        if no and a:
            continue
        b += 5 if no else 1
    c = [x if not no else -x for x in range(b)]
    if not no:
        b += sum(c)
        return b
    b = 10**6
    return b
'''


def test_answers_do_not_change_what_runs() -> None:
    short = answered(PROGRAM, frozenset({"no", "never(1)"}))
    whole, less = {"no": False, "never": lambda x: False}, {}
    exec(PROGRAM, whole)
    exec(short, less)
    for a in (0, 1):
        for b in range(5):
            assert less["f"](a, b) == whole["f"](a, b)
    assert "no" not in {n.id for n in ast.walk(ast.parse(short)) if isinstance(n, ast.Name)}
    assert "10**6" not in short and "gone" not in short
    assert answered(short, frozenset({"no", "never(1)"})) == short


def test_a_whole_kit_is_the_kit() -> None:
    """Without roots and conditions nothing is left out."""
    assert {"tree_tokens", "tap_tokens", "Aggregator", "run_push"} <= paste(KIT).defined
    assert "counter_push" not in paste(KIT, frozenset({"blocked_scan"})).defined
