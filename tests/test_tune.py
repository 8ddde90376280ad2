"""Tiles as data, tuned files and their refusals, modules with tuned tiles, and the command line of `psmc tune` where no
kernel can run. The search itself: test_tune_search.py.

Malformed files are tests/bad_tuned/*.json, their texts beside them; PSMC_PIN=1 writes these anew.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from psmc import pipeline
from psmc.api import realise
from psmc.cli import app
from psmc.diagnostics import PsmcError
from psmc.plan import tiles, tuned
from psmc.plan.chunked_kernels import KERNELS
from psmc.plan.chunked_kernels import tiles as chunk_tiles
from psmc.plan.tiles import FIELDS, Row
from psmc.plan.tuned import Tuned
from psmc.runtime.kit_tuned import TunedTiles
from psmc.tuning.shape import parse, usual

EXAMPLES = Path(__file__).parent.parent / "examples"
BAD = Path(__file__).parent / "bad_tuned"
FILES = sorted(BAD.glob("*.json"))
# plan -> an example, a row of its table, another tile for it
SAMPLES = {
    "chunked": ("gla", "forward/2/128", (64, 128, 128, 8, 2)),
    "pointwise": ("mingru", "backward/4", (8, 64, 2, 3)),
    "tree": ("pr_lstm", "forward/4", (64,)),
    "attention": ("attention_combine", "query/bf16/64", (64, 32, 8, 2)),
}


def compilation(name: str, *files: Tuned) -> pipeline.Compilation:
    (found,) = pipeline.read(EXAMPLES / f"{name}.psm")
    found.tuned = files
    return found


@pytest.fixture(scope="module", params=sorted(SAMPLES))
def sample(request: pytest.FixtureRequest) -> tuple[pipeline.Compilation, Tuned]:
    """A compilation and a tuned file for it."""
    name, row, numbers = SAMPLES[request.param]
    found = compilation(name)
    return found, Tuned("some.json", name, "NVIDIA H200", found.digest, request.param, ((row, numbers),),
                        (("torch", "2.11.0"), ("triton", "3.6.0")))  # fmt: skip


@pytest.fixture
def psmc(capsys: pytest.CaptureFixture[str]):
    def run(*argv: object) -> SimpleNamespace:
        code = app.run([str(a) for a in argv])
        seen = capsys.readouterr()
        assert "Traceback" not in seen.out + seen.err
        return SimpleNamespace(code=code, out=seen.out, err=seen.err)

    return run


# --- tiles ----------------------------------------------------------------------------------------


def table_of(text: str) -> tuple[Row, ...]:
    """The shipped rows of a module's text."""
    (start,) = re.findall(r"(?:tiles=|ATTENTION_TILES = )(?=\{)", text)
    literal = text[text.index(start + "{") + len(start) :]
    depth = 0
    for at, letter in enumerate(literal):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return tiles.rows(eval(literal[: at + 1]))
    raise AssertionError


@pytest.mark.parametrize("plan", sorted(SAMPLES))
def test_candidates_are_few_valid_and_begin_with_the_shipped_tile(plan: str) -> None:
    shipped = table_of(compilation(SAMPLES[plan][0]).text)
    assert tiles.rows(tiles.table(shipped)) == shipped
    for row in shipped:
        found = [c for c in tiles.candidates(plan, shipped, {row.name}) if c.kernel]
        assert found[0].rows == (row,) and {c.kernel for c in found} == {row.kernel}
        assert 2 <= len(found) <= 12 and len({c.rows for c in found}) == len(found)
        for c in found:
            (own,) = c.rows
            assert own.name == row.name and tiles.fault(plan, dict(zip(FIELDS[plan], own.numbers, strict=True))) is None


def test_what_is_common_to_all_kernels_changes_for_all_of_them() -> None:
    shipped = chunk_tiles(True).data
    assert tiles.disagreement("chunked", shipped) is None
    whole = [c for c in tiles.candidates("chunked", shipped, {"forward/2/128"}) if not c.kernel]
    assert [{r.numbers[0] for r in c.rows} for c in whole] == [{32}, {128}]
    for c in whole:
        assert [r.name for r in c.rows] == [f"{k}/2/128" for k in KERNELS]
        assert tiles.disagreement("chunked", tiles.changed(shipped, c.rows)) is None
        assert "tokens" in tiles.disagreement("chunked", tiles.changed(shipped, c.rows[:1]))


def test_a_new_kernel_of_a_known_plan_has_candidates() -> None:
    assert len(tiles.others("chunked", Row("new", 2, 128, (64, 64, 64, 4, 2)))) >= 4


# --- shapes ---------------------------------------------------------------------------------------


def test_shapes() -> None:
    gla, mingru = (compilation(name).declared for name in ("gla", "mingru"))
    found = parse("B8  T4096 H16 K128 V96", gla)
    assert (found.batch, found.tokens, found.lanes, dict(found.sizes)) == (8, 4096, (16,), {"K": 128, "V": 96})
    assert found.text == "B8 T4096 H16 K128 V96"
    assert parse("K=64 B1 T7 V=3", gla).lanes == () and parse("B1 T7 X3 Y4", mingru).lanes == (3, 4)
    for agg, plan in ((gla, "chunked"), (mingru, "pointwise")):
        for tiny in (False, True):
            made = usual(agg, plan, tiny)
            assert parse(made.text, agg) == made and (made.tokens < 100) == tiny


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B8 T16 K8", "the size of V is missing: such as B8 T4096 H16 K128 V128"),
        ("T16 K8 V8", "the size of B is missing"),
        ("B8 T16 K8 V8 K9", "'K' is given twice"),
        ("B8 T0 K8 V8", "'T0' is not a name and a size, such as B8 or K128"),
        ("B8 T16 K8 V8 Q=3", "'Q' is no open dim; those are K, V"),
    ],
)
def test_wrong_shapes(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text, compilation("gla").declared)
    assert said in str(caught.value)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_reads_back(sample: tuple[pipeline.Compilation, Tuned]) -> None:
    _, file = sample
    assert tuned.read(file.text(), file.file) == file
    data = json.loads(file.text())
    assert list(data) == sorted(data) == ["aggregator", "device", "digest", "plan", "tiles", "versions"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_malformed_files(path: Path, psmc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    spec = EXAMPLES / "mingru.psm"
    text = path.read_text(encoding="utf-8").replace("DIGEST", compilation("mingru").digest)
    with pytest.raises(PsmcError) as caught:
        compiled = compilation("mingru", tuned.read(text, path.name))
        assert compiled.text
    assert [d.code for d in caught.value.diagnostics] == ["PSM622"]
    pinned = path.with_suffix(".txt")
    if os.environ.get("PSMC_PIN"):
        pinned.write_text(f"{caught.value}\n", encoding="utf-8")
    assert f"{caught.value}\n" == pinned.read_text(encoding="utf-8")
    if "DIGEST" not in path.read_text(encoding="utf-8"):
        ran = psmc("compile", spec, "--tuned", path.name, "-o", "nowhere")
        assert ran.code == 1 and ran.err == pinned.read_text(encoding="utf-8") and not Path("nowhere").exists()


def test_no_pinned_text_without_its_file() -> None:
    assert {p.stem for p in BAD.glob("*.txt")} == {p.stem for p in FILES} != set()


def test_a_file_that_is_not_there(psmc) -> None:
    ran = psmc("compile", EXAMPLES / "mingru.psm", "--tuned", "none.json")
    assert ran.code == 1 and ran.err.startswith("error[PSM622]: none.json: no such file or directory.\n")


# --- modules --------------------------------------------------------------------------------------


def test_a_module_with_tuned_tiles(sample: tuple[pipeline.Compilation, Tuned], tmp_path: Path, monkeypatch) -> None:
    """It has both tables, says where the tuned one is from, and differs in nothing else; with the same text each time."""
    shipped, file = sample
    baked = compilation(shipped.declared.name, file)
    assert baked.digest == shipped.digest != file.device and baked.text == compilation(shipped.declared.name, file).text
    assert "\nTiles: tuned on NVIDIA H200, triton 3.6.0.\n" in baked.text and " --tuned some.json\n" in baked.text
    pytest.importorskip("triton")
    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
    agg = realise(baked)
    found = getattr(agg.module, "ATTENTION_TILES", None)
    if found is None:
        found = (getattr(agg.module, "CHUNK_KERNELS", None) or agg.module.KERNELS.table).tiles
    assert type(found).__name__ == "TunedTiles" and found.place == ("NVIDIA H200", "3.6.0") and not found
    (name, numbers), = file.tiles
    own = table_of(shipped.text)
    assert tiles.rows(found.shipped) == own
    assert tiles.rows(found.tuned) == tuple(replace(r, numbers=numbers) if r.name == name else r for r in own)
    assert agg.spec.digest != shipped.digest


def test_where_tuned_tiles_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """On their device with their triton; elsewhere the shipped ones, with one warning."""
    here = ["NVIDIA H200", "3.6.0"]
    monkeypatch.setattr("psmc.runtime.kit_tuned.tuning_place", lambda: tuple(here))

    def made() -> TunedTiles:
        return TunedTiles("gated", "NVIDIA H200", "3.6.0", {"forward": 1}, {"forward": 2})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made()["forward"] == 1
    for at, other in enumerate(("NVIDIA B200", "3.7.0")):
        before, here[at] = here[at], other
        table = made()
        with pytest.warns(UserWarning) as told:
            assert table["forward"] == 2 and table["forward"] == 2
        here[at] = before
        assert len(told) == 1 and "tuned on NVIDIA H200 with triton 3.6.0" in str(told[0].message)
    with pytest.raises(KeyError):
        made()["backward"]


def test_files_for_something_else_are_ignored_with_a_warning(psmc, tmp_path: Path) -> None:
    file = Tuned("", "mingru", "NVIDIA H200", "0" * 16, "pointwise", (), (("triton", "3.6.0"),))
    stale, other = tmp_path / "stale.json", tmp_path / "other.json"
    stale.write_text(file.text())
    other.write_text(replace(file, aggregator="gla").text())
    target = tmp_path / "mingru.py"
    ran = psmc("compile", EXAMPLES / "mingru.psm", "--tuned", stale, "--tuned", other, "-o", target)
    assert ran.code == 0 and target.read_text() == compilation("mingru").text
    digest = compilation("mingru").digest
    assert ran.err == (
        "warning[PSM623]: stale.json is for another module of 'mingru': it is ignored.\n"
        f"  Note: it was made for {'0' * 16}, and this is {digest}: the spec or the compiler has changed.\n"
        "  Help: run psmc tune again.\n\n"
        "warning[PSM623]: other.json is for 'gla', which is not compiled here: it is ignored.\n"
    )


def test_the_environment_names_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For psmc.load: files of other aggregators are passed over, stale ones warned of."""
    torch = pytest.importorskip("torch")
    import psmc

    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
    found = compilation("mingru")
    file = Tuned("own.json", "mingru", "NVIDIA H200", found.digest, "pointwise", (SAMPLES["pointwise"][1:],),
                 (("triton", "3.6.0"),))  # fmt: skip
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    own.write_text(file.text())
    other.write_text(replace(file, aggregator="gla").text())
    monkeypatch.setenv("PSMC_TUNED", os.pathsep.join(map(str, (other, own))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agg = psmc.load(EXAMPLES / "mingru.psm")
    assert agg.source == compilation("mingru", file).text
    z, x = torch.randn(2, 1, 5, 3)
    assert torch.equal(agg(z, x), realise(found)(z, x))
    own.write_text(replace(file, digest="0" * 16).text())
    for _ in range(2):  # nothing of it is remembered
        with pytest.warns(UserWarning, match=r"PSM623.*own\.json is for another module"):
            assert psmc.load(EXAMPLES / "mingru.psm").source == found.text
    own.write_text("{")
    with pytest.raises(PsmcError, match="PSM622"):
        psmc.load(EXAMPLES / "mingru.psm")


# --- the command ----------------------------------------------------------------------------------


def test_without_a_gpu_it_says_what_it_needs(psmc, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("psmc.duality.available", lambda device: False)
    ran = psmc("tune", EXAMPLES / "mingru.psm")
    assert ran.code == 1 and ran.out == ""
    assert ran.err == (
        "error[PSM620]: psmc tune times kernels on a GPU, and this machine has none that torch can use.\n"
        "  Help: run it on the machine that the tiles are for, and take the file along.\n"
        "  Help: --interpret goes the whole way on the CPU: it checks every tile, but its times mean nothing.\n"
    )


def test_without_triton_it_says_so(psmc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psmc.cli.tune.find_spec", lambda name: None if name == "triton" else name)
    ran = psmc("tune", EXAMPLES / "mingru.psm")
    assert ran.code == 1 and "error[PSM620]: psmc tune runs kernels, and triton is not installed." in ran.err


@pytest.mark.parametrize("name", ["elman", "deltanet"])
def test_what_runs_in_pytorch_has_nothing_to_tune(psmc, name: str) -> None:
    ran = psmc("tune", EXAMPLES / f"{name}.psm")
    assert ran.code == 1 and f"error[PSM621]: '{name}' has nothing to tune: plan " in ran.err
    assert "Triton kernels have tiles, PyTorch has none" in ran.err


def test_a_refuted_spec_is_not_tuned(psmc) -> None:
    ran = psmc("tune", EXAMPLES / "wrong" / "leaky.psm")
    assert ran.code == 1 and "PSM301" in ran.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "B8"], "the size of T is missing"),
        (["--dtype", "bf16"], "Triton's interpreter has no bf16"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_a_wrong_command_line_is_2(psmc, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = psmc("tune", EXAMPLES / "mingru.psm", *argv)
    assert ran.code == 2 and said in ran.err and ran.out == ""
