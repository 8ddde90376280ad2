"""The command line: commands, exit codes, hostile input, what it needs installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from psmc import __version__, pipeline
from psmc.cli import app
from psmc.frontend.pretty import format_source
from psmc.frontend.psm import read

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GLA = EXAMPLES / "gla.psm"
LEAKY = EXAMPLES / "wrong" / "leaky.psm"


class Ran:
    """What one command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def psmc(capsys: pytest.CaptureFixture[str]):
    def run(*argv: object) -> Ran:
        code = app.run([str(a) for a in argv])
        seen = capsys.readouterr()
        assert "Traceback" not in seen.out + seen.err
        assert "\x1b" not in seen.out + seen.err, "no colours where there is no terminal"
        return Ran(code, seen.out, seen.err)

    return run


def process(*argv: object, **env: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-m", "psmc", *map(str, argv)], capture_output=True, text=True, env=merged, timeout=120
    )


# --- the whole ------------------------------------------------------------------------------------


def test_version_and_help(psmc) -> None:
    assert psmc("--version").out == f"psmc {__version__}\n"
    shown = psmc("--help")
    assert shown.code == 0 and all(f"\n  {name} " in shown.out for name in app.COMMANDS)


@pytest.mark.parametrize("name", app.COMMANDS)
def test_each_help_has_an_example(psmc, name: str) -> None:
    shown = psmc(name, "--help")
    assert shown.code == 0 and f"  psmc {name} " in shown.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chek"], "did you mean 'check'?"),
        (["expalin", "x.psm"], "did you mean 'explain'?"),
        (["zzz"], "the commands are check, compile"),
        (["gla.psm"], "did you mean 'psmc check gla.psm'?"),
        (["check"], "FILE"),
        (["check", "x.psm", "--jsn"], "--json"),
        (["check", "x.psm", "--budget", "-1"], "--budget"),
        (["compile", "x.psm", "--budget", "nan"], "'nan' is no number of seconds"),
        (["test", GLA, "--dtype", "fp8"], "fp64, fp32, bf16, fp16"),
        (["test", GLA, "-T", "many"], "1,64,1000"),
        (["test", GLA, "--dim", "Q=3"], "the open dims are K, V"),
        (["new", "x", "--kind", "rule"], "recurrence"),
    ],
)
def test_a_wrong_command_line_is_2(psmc, argv: list[object], said: str) -> None:
    ran = psmc(*argv)
    assert ran.code == 2 and said in ran.err and ran.out == ""


def test_a_bug_is_70(psmc, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("here")

    monkeypatch.setattr("psmc.pipeline.read", broken)
    ran = psmc("check", GLA)
    assert ran.code == 70 and "PSM900" in ran.err and "ZeroDivisionError" in ran.err and "report" in ran.err


def test_a_bug_shows_its_traceback_if_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psmc.pipeline.read", lambda *a: 1 / 0)
    monkeypatch.setenv("PSMC_DEBUG", "1")
    assert app.run(["check", str(GLA)]) == 70
    assert "Traceback" in capsys.readouterr().err


# --- check ----------------------------------------------------------------------------------------


def test_check_prints_a_row_an_aggregator(psmc) -> None:
    ran = psmc("check", GLA, EXAMPLES / "elman.psm")
    head, first, second, summary = ran.out.splitlines()
    assert head.split() == ["file", "aggregator", "claim", "associativity", "identity", "seconds"]
    assert first.split()[1:5] == ["gla", "yes", "proved", "proved"]
    assert second.split()[1:5] == ["elman", "no", "order:", "left"]
    assert summary == "1 claim holds, 1 with a fixed order." and ran.code == 0 and ran.err == ""


def test_check_explains_what_fails(psmc) -> None:
    ran = psmc("check", LEAKY, GLA)
    assert ran.code == 1 and "1 of 2 failed." in ran.out and re.search(r"leaky +yes +refuted", ran.out)
    assert "error[PSM301]" in ran.err and "(a∘b)∘c gives s=" in ran.err


def test_check_takes_a_directory(psmc) -> None:
    ran = psmc("check", EXAMPLES / "wrong", "--json")
    found = {r["aggregator"]: r for r in json.loads(ran.out)["results"]}
    assert ran.code == 1 and found.keys() == {p.stem for p in (EXAMPLES / "wrong").glob("*.psm")}
    assert found["bad_identity"]["identity"] == "refuted" and found["bad_identity"]["associativity"] == "proved"
    assert found["nonlinear"]["associativity"] == "unknown" and "lifted" in found["nonlinear"]["residual"]


def test_check_json(psmc) -> None:
    ran = psmc("check", GLA, LEAKY, EXAMPLES / "elman.psm", "--json")
    gla, leaky, elman = json.loads(ran.out)["results"]
    keys = [
        "file",
        "aggregator",
        "claim",
        "associativity",
        "identity",
        "counterexample",
        "residual",
        "repair",
        "float_breaks",
        "seconds",
    ]
    assert list(gla) == list(leaky) == keys
    assert (gla["associativity"], gla["identity"], gla["counterexample"]) == ("proved", "proved", None)
    assert (leaky["claim"], leaky["associativity"]) == ("yes", "refuted")
    point = leaky["counterexample"]
    assert point["left"] != point["right"] and point["law"] == "associativity"
    assert {k: set(v) for k, v in point["elements"].items()} == {x: {"s", "d"} for x in "abc"}
    assert leaky["repair"] == "d = l.d * r.d" and gla["repair"] is None
    assert (elman["claim"], elman["associativity"], elman["identity"]) == ("no", None, None)


def test_what_floats_break_is_said(psmc) -> None:
    """Where it holds, and only there: in a line of the table, in JSON, on top of the module."""
    average = EXAMPLES / "softmax_average.psm"
    (found, gla) = json.loads(psmc("check", average, GLA, "--json").out)["results"]
    assert found["float_breaks"] == ["u", "w"] and gla["float_breaks"] == []
    assert "would make NaN of softmax_average (u, w); compiled code never" in psmc("check", average, GLA).out
    unscaled = EXAMPLES / "wrong" / "softmax_unscaled.psm"  # refused: nothing is compiled
    assert "NaN" not in psmc("check", GLA, unscaled).out
    said = "In floats the identity element makes NaN of u, w"
    assert said in pipeline.read(average)[0].text and "In floats" not in pipeline.read(GLA)[0].text


def test_check_json_names_the_files_that_do_not_parse(psmc, tmp_path: Path) -> None:
    bad = tmp_path / "bad.psm"
    bad.write_text("aggregator a {\n  input x[\n")
    ran = psmc("check", bad, GLA, "--json")
    data = json.loads(ran.out)
    assert ran.code == 1 and [r["aggregator"] for r in data["results"]] == ["gla"]
    assert data["errors"][0]["file"] == str(bad) and data["errors"][0]["code"] == "PSM101"


def test_check_does_not_wait_longer_than_its_budget(psmc) -> None:
    begun = time.perf_counter()
    ran = psmc("check", EXAMPLES / "mlstm.psm", "--budget", "0.001")
    assert ran.code == 1 and "PSM303" in ran.err and time.perf_counter() - begun < 30


def test_check_of_a_file_with_several(psmc, tmp_path: Path) -> None:
    both = tmp_path / "both.psm"
    both.write_text(GLA.read_text() + LEAKY.read_text())
    ran = psmc("check", both)
    assert ran.code == 1 and [line.split()[1] for line in ran.out.splitlines()[1:3]] == ["gla", "leaky"]


BLOCKED = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "triton", "numpy"):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Block())
    from psmc.cli import app
    sys.exit(app.run(sys.argv[1:]))
"""


def test_all_but_test_needs_neither_torch_nor_triton(tmp_path: Path) -> None:
    for argv, said in (
        (["check", GLA, EXAMPLES / "mlstm.psm", EXAMPLES / "viterbi_recurrence.psm"], "3 claims hold."),
        (["explain", EXAMPLES / "deltanet.psm"], "transition of rank 1"),
        (["fmt", "--check", GLA], ""),
        (["compile", GLA, "-o", tmp_path], "wrote "),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(BLOCKED), *map(str, argv)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout


def test_check_loads_no_more_than_it_needs() -> None:
    code = "import sys\nfrom psmc.cli import app\napp.run(sys.argv[1:])\n"
    code += "print(*(m for m in ('torch', 'jinja2', 'rich', 'numpy', 'z3') if m in sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code, "check", str(GLA)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == ""


def test_output_without_unicode() -> None:
    ran = process("check", LEAKY, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert ran.returncode == 1 and "PSM301" in ran.stderr and "Traceback" not in ran.stderr


# --- hostile input --------------------------------------------------------------------------------


def hostile(tmp_path: Path) -> dict[str, Path]:
    files = {
        "binary": bytes(range(256)) * 64,
        "nul": b"aggregator a {\n  input x\0\n}\n",
        "huge": b"# comment\n" * 1_100_000,
        "empty": b"",
        "deep": b"aggregator a { input x state s = 0 lift { s = " + b"(" * 10_000 + b"x" + b")" * 10_000 + b" } }",
        "chain": b"aggregator a { input x state s = 0 lift { s = x" + b" + x" * 10_000 + b" } }",
        "utf16": "aggregator a { }".encode("utf-16"),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.psm").write_bytes(data)
    (tmp_path / "folder.psm").mkdir()
    return {name: tmp_path / f"{name}.psm" for name in (*files, "folder", "missing")}


@pytest.mark.parametrize("name", ["binary", "nul", "huge", "deep", "chain", "utf16", "missing", "folder", "empty"])
@pytest.mark.parametrize("command", ["check", "compile", "explain", "test", "fmt"])
def test_hostile_input(psmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    path = hostile(tmp_path)[name]
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    content = path.read_bytes() if path.is_file() else b""
    ran = psmc(command, path)
    if name == "empty" and command != "compile":
        assert ran.code == 0
    else:
        assert ran.code == 1 and len(re.findall(r"error\[PSM\d+\]", ran.err)) == 1
        assert max(map(len, ran.err.splitlines())) < 500
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"
    assert not path.is_file() or path.read_bytes() == content


@pytest.mark.parametrize("command", ["check", "compile", "explain", "test", "fmt"])
def test_what_is_no_file(psmc, tmp_path: Path, command: str) -> None:
    """Links that lead nowhere, pipes that nobody writes to, names that no file can have."""
    loop, nowhere, pipe = (tmp_path / f"{name}.psm" for name in ("loop", "nowhere", "pipe"))
    loop.symlink_to(loop)
    nowhere.symlink_to("moved.psm")
    os.mkfifo(pipe)
    said = {
        loop: "too many levels of symbolic links", nowhere: "is a link to moved.psm, where there is no file",
        pipe: "is a pipe or a device, not a file", tmp_path / ("a" * 300 + ".psm"): "name too long|no such file",
        Path("/dev/zero"): "is a pipe or a device, not a file",
    }  # fmt: skip
    for path, why in said.items():
        ran = psmc(command, path)
        assert ran.code == 1 and re.search(rf"error\[PSM102\].*({why})", ran.err), ran.err
    ran = psmc(command, "")
    assert ran.code == 1 and "the name of a file is empty" in ran.err
    for other in (["verify", pipe], ["compile", GLA, "-o", tmp_path, "--tuned", pipe]):
        ran = psmc(*other)
        assert ran.code == 1 and "is a pipe or a device, not a file" in ran.err


def test_a_lone_cr_ends_a_line(psmc, tmp_path: Path) -> None:
    """And the comment on it: no aggregator is lost in one."""
    spec = tmp_path / "old.psm"
    spec.write_bytes(LEAKY.read_bytes().replace(b"\n", b"\r"))
    ran = psmc("check", spec)
    assert ran.code == 1 and "old.psm:12:5: error[PSM301]" in ran.err, ran.err


def test_a_used_file_that_cannot_be_read(psmc, tmp_path: Path) -> None:
    """The message shows where it is asked for."""
    (tmp_path / "lib.psm").write_bytes(b"const c = 1 # \xe9\n")
    (tmp_path / "main.psm").write_text('use "lib.psm"\n' + GLA.read_text())
    ran = psmc("check", tmp_path / "main.psm")
    assert ran.code == 1 and "main.psm:1:1: error[PSM102]" in ran.err and "is not UTF-8 text" in ran.err


def test_a_file_without_aggregators(psmc, tmp_path: Path) -> None:
    (tmp_path / "lib.psm").write_text("const c = 1\n")
    ran = psmc("check", tmp_path / "lib.psm")
    assert (ran.code, ran.out) == (0, "There is no aggregator here: nothing to check.\n")


def test_close_names_are_offered(psmc, tmp_path: Path) -> None:
    (tmp_path / "gated_scan.psm").write_text(GLA.read_text())
    for given in ("gated_scn.psm", "gated_scan", "gatedscan.psm"):
        ran = psmc("check", tmp_path / given)
        assert ran.code == 1 and f"did you mean {tmp_path / 'gated_scan.psm'}?" in ran.err
    python = tmp_path / "model.py"
    python.write_text("x = 1\n")
    assert "@psmc.aggregator" in psmc("check", python).err


# --- compile --------------------------------------------------------------------------------------


def test_compile_writes_one_module_an_aggregator(psmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = tmp_path / "both.psm"
    both.write_text((EXAMPLES / "cumsum.psm").read_text() + (EXAMPLES / "ema.psm").read_text())
    assert psmc("compile", both).code == 0
    assert sorted(p.name for p in tmp_path.glob("*.py")) == ["cumsum.py", "ema.py"]
    assert psmc("compile", both, "--name", "ema", "-o", "sub/dir/model.py").out == "wrote sub/dir/model.py\n"
    assert psmc("compile", both, "-o", "sub/both.py").code == 1
    ran = psmc("compile", both, "--name", "cumsun")
    assert ran.code == 1 and "did you mean 'cumsum'?" in ran.err
    assert (tmp_path / "sub/dir/model.py").read_text() == (tmp_path / "ema.py").read_text()


def test_compiled_module_runs_alone(psmc, tmp_path: Path) -> None:
    assert psmc("compile", EXAMPLES / "cumsum.psm", "-o", tmp_path).code == 0
    code = (
        "import sys, torch\nfrom cumsum import cumsum\nprint(cumsum(torch.ones(1, 4)).tolist(), 'psmc' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env | {"PYTHONPATH": "."}
    )
    assert ran.stdout == "[[1.0, 2.0, 3.0, 4.0]] False\n", ran.stderr


def test_compile_check(psmc, tmp_path: Path) -> None:
    argv = ("compile", EXAMPLES / "ema.psm", "-o", tmp_path, "--check")
    ran = psmc(*argv)
    assert ran.code == 1 and "missing" in ran.out and not list(tmp_path.iterdir())
    assert psmc(*argv[:-1]).code == 0 and psmc(*argv).code == 0
    module = tmp_path / "ema.py"
    module.write_text(module.read_text().replace("def lift", "def life", 1))
    changed = module.read_text()
    ran = psmc(*argv)
    assert ran.code == 1 and "differs (+1 -1)" in ran.out and "+def lift" in ran.out and "-def life" in ran.out
    assert module.read_text() == changed


def test_compile_takes_several_files(psmc, tmp_path: Path) -> None:
    argv = ("compile", EXAMPLES / "ema.psm", EXAMPLES / "cumsum.psm", "-o", tmp_path)
    assert psmc(*argv).code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["cumsum.py", "ema.py"]
    ran = psmc("compile", EXAMPLES / "ema.psm", EXAMPLES / "ema.psm", "-o", tmp_path / "other")
    assert ran.code == 1 and "more than one aggregator 'ema'" in ran.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["leaky", "bad_identity", "nonlinear", "vouched"])
def test_compile_refuses_what_does_not_hold(psmc, tmp_path: Path, name: str) -> None:
    both = tmp_path / "both.psm"
    both.write_text(GLA.read_text() + (EXAMPLES / "wrong" / f"{name}.psm").read_text())
    ran = psmc("compile", both, "-o", tmp_path / "out")
    assert ran.code == 1 and "error[PSM" in ran.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Aggregator", "Tensor", "State", "run_scan", "SPEC", "print", "isinstance", "Any"])
def test_compile_refuses_names_that_the_module_needs(psmc, tmp_path: Path, name: str) -> None:
    spec = tmp_path / "spec.psm"
    spec.write_text((EXAMPLES / "ema.psm").read_text().replace("aggregator ema", f"aggregator {name}"))
    ran = psmc("compile", spec, "-o", tmp_path / "out")
    assert ran.code == 1 and "PSM104" in ran.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x", "n", "l", "p", "spec", "rules", "K_1"])
def test_compile_takes_every_other_name(psmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import torch

    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
    spec = tmp_path / "spec.psm"
    spec.write_text((EXAMPLES / "cumsum.psm").read_text().replace("aggregator cumsum", f"aggregator {name}"))
    assert psmc("compile", spec, "-o", tmp_path).code == 0
    found = runpy.run_path(str(tmp_path / f"{name}.py"))[name]
    assert found(torch.ones(1, 3)).tolist() == [[1, 2, 3]]


def test_compile_to_a_place_that_cannot_be(psmc, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x.py", tmp_path / "file" / "below"):
        ran = psmc("compile", EXAMPLES / "ema.psm", "-o", place)
        assert ran.code == 1 and "PSM294" in ran.err


def test_compile_leaves_what_it_did_not_write(psmc, tmp_path: Path) -> None:
    own = tmp_path / "ema.py"
    own.write_text("# a person's own\n")
    ran = psmc("compile", EXAMPLES / "ema.psm", EXAMPLES / "cumsum.psm", "-o", tmp_path)
    assert ran.code == 1 and "PSM295" in ran.err and "did not write it" in ran.err
    assert own.read_text() == "# a person's own\n" and list(tmp_path.iterdir()) == [own]
    own.write_text("")
    for _ in range(2):
        assert psmc("compile", EXAMPLES / "ema.psm", "-o", tmp_path).code == 0


def test_no_spec_is_overwritten(psmc, tmp_path: Path) -> None:
    spec, link = tmp_path / "gla.psm", tmp_path / "link.json"
    spec.write_bytes(GLA.read_bytes())
    link.symlink_to(spec)
    for place in (spec, link, tmp_path / "other.psm"):
        ran = psmc("check", spec, "--certificate", place)
        assert ran.code == 1 and "PSM294" in ran.err, place
    assert "PSM294" in psmc("tune", spec, "--out", link).err
    assert spec.read_bytes() == GLA.read_bytes() and not (tmp_path / "other.psm").exists()
    out = tmp_path / "c.json"
    out.write_text("an older one")
    ran = psmc("check", spec, tmp_path / "none.psm", "--certificate", out)
    assert ran.code == 1 and f"{out} is not written" in ran.err and out.read_text() == "an older one"


# --- explain --------------------------------------------------------------------------------------


def test_explain(psmc) -> None:
    ran = psmc("explain", EXAMPLES / "mlstm.psm")
    assert ran.code == 0 and "live state: m, C, n" in ran.out and "reads m" in ran.out and "plan: " in ran.out
    ran = psmc("explain", EXAMPLES / "delta_product.psm")
    assert "transition of rank 2" in ran.out


@pytest.mark.parametrize("name", ["gla", "elman", "elman_recurrence", "pr_lstm", "transformer_psm", "s5_word"])
def test_explain_json(psmc, name: str) -> None:
    (data,) = json.loads(psmc("explain", EXAMPLES / f"{name}.psm", "--json").out)
    assert data["aggregator"] == name
    for layer in data["layers"]:
        assert layer["components"] and layer["class"] in ("pointwise", "affine", "dense", "opaque") and layer["plan"]


def test_explain_a_code(psmc) -> None:
    ran = psmc("explain", "psm301")
    assert ran.code == 0 and ran.out.startswith("PSM301: claim refuted\n")
    ran = psmc("explain", "PSM399")
    assert ran.code == 2 and "PSM301" in ran.err


# --- fmt, new -------------------------------------------------------------------------------------


def test_fmt(psmc, tmp_path: Path) -> None:
    ugly = tmp_path / "ugly.psm"
    text = (
        "# top\naggregator a {input x;state s=0 # the sum\n  lift{s=(x)}\n combine(l,r){s=l.s+r.s}\nassociative:yes}\n"
    )
    ugly.write_text(text)
    ran = psmc("fmt", "--check", ugly)
    assert ran.code == 1 and "would be reformatted" in ran.out and ugly.read_text() == text
    assert psmc("fmt", tmp_path).out == f"formatted {ugly}\n"
    assert ugly.read_text() == format_source(read(ugly)) and "# the sum" in ugly.read_text()
    assert psmc("fmt", "--check", ugly).code == 0 and psmc("fmt", ugly).out == ""
    broken = tmp_path / "broken.psm"
    broken.write_text("aggregator {")
    ugly.write_text(text)
    ran = psmc("fmt", broken, ugly)
    assert ran.code == 1 and broken.read_text() == "aggregator {" and ugly.read_text() != text


def test_fmt_as_a_filter() -> None:
    argv = [sys.executable, "-m", "psmc", "fmt", "-"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(argv, input=b"const a=1 # one\n", capture_output=True, env=env)
    assert ran.stdout == b"const a = 1  # one\n" and ran.returncode == 0


@pytest.mark.parametrize("kind", ["combine", "recurrence"])
def test_new_specs_check(psmc, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "first_model.psm"
    assert psmc("new", tmp_path / "first_model", "--kind", kind).code == 0
    assert psmc("check", path).code == 0 and psmc("fmt", "--check", path).code == 0
    path.write_text("mine")
    ran = psmc("new", path, "--kind", kind)
    assert ran.code == 1 and "--force" in ran.err and path.read_text() == "mine"
    assert psmc("new", path, "--kind", kind, "--force").code == 0 and path.read_text() != "mine"


def test_new_decorator_runs(psmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
    assert psmc("new", tmp_path / "first_model", "--kind", "decorator").code == 0
    agg = runpy.run_path(str(tmp_path / "first_model.py"))["FirstModel"]
    x = torch.randn(2, 5, 3)
    assert agg(x, torch.zeros_like(x)).abs().max() == 0  # a gate of log 1 keeps the state at 0


@pytest.mark.parametrize("name", ["if", "2x", "a b", "", "lift", "exp", "été", "x" * 65, "K"])
@pytest.mark.parametrize("kind", ["combine", "recurrence", "decorator"])
def test_new_with_an_unusable_name(psmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    ran = psmc("new", name, "--kind", kind)
    if ran.code == 0:  # what it wrote is right
        (written,) = tmp_path.iterdir()
        assert written.suffix == ".py" or psmc("check", written).code == 0
    else:
        assert ran.code == 1 and "error[PSM" in ran.err and not list(tmp_path.iterdir())


# --- as a process ---------------------------------------------------------------------------------


def test_the_process_exits_as_it_should() -> None:
    assert process("--version").stdout.startswith("psmc ")
    assert process("check", LEAKY).returncode == 1
    assert process("chek").returncode == 2


def test_check_is_quick() -> None:
    """3 s is what is promised on an idle machine; the slowest example, with a margin for a busy one."""
    process("--version")
    begun = time.perf_counter()
    assert process("check", EXAMPLES / "welford.psm").returncode == 0
    assert time.perf_counter() - begun < 10


def test_a_closed_pipe_is_no_error() -> None:
    command = f"'{sys.executable}' -m psmc check '{EXAMPLES / 'wrong'}' --json 2>&1 | head -1"
    ran = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ran.stdout == "{\n" and ran.stderr == ""


def on_a_terminal(*argv: object, **env: str) -> str:
    """What is shown on a pseudo-terminal."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", **env}
    merged = {k: v for k, v in merged.items() if v}
    child = subprocess.Popen(
        [sys.executable, "-m", "psmc", *map(str, argv)], stdin=follower, stdout=follower, stderr=follower, env=merged
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    child.wait(timeout=60)
    return shown.decode()


def test_colours_on_a_terminal_and_not_with_no_color() -> None:
    coloured = on_a_terminal("check", LEAKY, GLA, NO_COLOR="")
    assert "\x1b[31m" in coloured and "\x1b[32m" in coloured and "PSM301" in coloured and "2/2" not in coloured[-200:]
    plain = on_a_terminal("check", LEAKY, GLA, NO_COLOR="1")
    assert not re.search(r"\x1b\[[39]\d", plain) and "refuted" in plain and "PSM301" in plain
    assert "\x1b" not in on_a_terminal("check", LEAKY, GLA, TERM="dumb")
