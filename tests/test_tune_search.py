"""`psmc tune` the whole way, in Triton's interpreter (in a process of its own: triton must be imported with it switched
on). Wrong candidates are made here: modules that misbehave at a certain tile."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import json
    import re
    import warnings

    import torch

    import psmc
    from psmc import pipeline
    from psmc.cli import app
    from psmc.plan.tiles import Candidate, Row
    from psmc.plan.tuned import read_files
    from psmc.tuning import Search, Target, parse

    SCALAR = """
    aggregator leak {
      input x, w in (0, 1)
      state s = 0
      recurrence { s = w * s + x }
      output y = s
      associative: yes
    }"""
    MATRIX = """
    aggregator fading {
      dim K, V
      input k[K], v[V], g in (0, 1)
      state S[K, V] = 0
      recurrence { S[i, j] = g * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] k[i] * S[i, j]
      associative: yes
    }"""

    def search(folder: Path, text: str, tiles: dict, edits: dict[str, str], shape: str, given: list[Candidate]):
        """What became of each candidate: those of the module with `tiles` for its own and some lines replaced."""
        (found,) = pipeline.read_text(text)
        spec, module = folder / "spec.psm", folder / f"module_{found.declared.name}.py"
        spec.write_text(text)
        code, count = re.subn(r"tiles=\{(\n.*?\n    \}|[^\n]*\}),\n", f"tiles={tiles!r},\n", found.text, flags=re.S)
        assert count == 1
        for old, new in edits.items():
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        module.write_text(code)
        target = Target(str(spec), found.declared.name, str(module), "fp32", "cpu", (parse(shape, found.declared),), True)
        result = Search(target, found.plan.name, 300, 2, choose=lambda *_: tuple(given)).run()
        return result, {c: t for c, t in zip(given, result.tried, strict=True)}

    def test_scalars(tmp_path: Path) -> None:
        """One that is right, one that writes nothing, one that kills its process, one that does so where it is timed."""
        own, back = (4, 4, 1, 2), (4, 4, 1, 2)
        right, lazy, dead, late = (8, 4, 1, 2), (4, 4, 2, 2), (4, 4, 8, 2), (4, 2, 1, 2)
        given = [Candidate("forward", (Row("forward", 4, 0, t),)) for t in (own, right, lazy, dead, late)]
        unpack = "        each_rows, width, warps, stages = self.table.tiles[direction][4 if wide else 2]\n"
        result, found = search(
            tmp_path, SCALAR, {"forward": {4: own, 2: own}, "backward": {4: back, 2: back}},
            {
                unpack: unpack + "        if warps == 8 or (width == 2 and length > 40):\n"
                "            os.abort()\n",
                "            plan.launch(*args, *outputs, *kept":
                    "            if self.table.tiles['forward'][4][2] == 2:\n                return outputs, finals, saved\n"
                    "            plan.launch(*args, *outputs, *kept",
            },
            "B1 T44 C2", given,
        )  # fmt: skip
        shipped, fine, wrong, killed, later = (found[c] for c in given)
        assert shipped.shipped and shipped.right and fine.right and fine.error < 1e-5 and fine.ms > 0 and fine.gain > 0
        assert wrong.fault.startswith("wrong: error ") and not wrong.chosen
        assert killed.fault == "died: SIGABRT" and later.fault == "died: SIGABRT"
        assert killed.error is None and later.error < 1e-5
        assert {t.chosen for t in (wrong, killed, later)} == {False} and shipped.chosen != fine.chosen
        (row,) = [r for r in result.rows if r.kernel == "forward"]
        assert row.numbers == (own if shipped.chosen else right) and {r.name for r in result.rows} == {"forward/4", "backward/4"}

    def test_matrices(tmp_path: Path) -> None:
        """Kernels that disagree about the tokens of a chunk give wrong gradients; that all change is right."""
        tile, other = (16, 16, 16, 1, 1), (32, 16, 16, 1, 1)
        kernels = ("forward", "states", "gradients", "values", "prepare")
        given = [
            Candidate("gradients", (Row("gradients", 4, 64, tile),)),
            Candidate("gradients", (Row("gradients", 4, 64, other),)),
            Candidate("", tuple(Row(k, 4, 64, other) for k in kernels)),
        ]
        tiles = {k: {2: ((64, tile),), 4: ((64, tile),)} for k in kernels}
        result, found = search(tmp_path, MATRIX, tiles, {}, "B1 T33 H1 K16 V16", given)
        shipped, mixed, whole = (found[c] for c in given)
        assert mixed.fault.startswith("wrong: error ") and not mixed.chosen and mixed.ms is None
        assert mixed.error > 1e-2 and mixed.where in ("dk", "dv", "dg", "dinitial S")
        assert shipped.right and whole.right and whole.ms > 0 and shipped.chosen != whole.chosen
        assert {r.numbers for r in result.rows} == ({tile} if shipped.chosen else {other})

    def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
        """From a spec to a file, from it to a module, and to what psmc.load runs: with the same results."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
        Path("leak.psm").write_text(SCALAR)
        assert app.run(["tune", "leak.psm", "--shape", "B1 T9 C1", "--seconds", "0.1", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["device"] == "interpreter" and {r["kernel"] for r in said["rows"]} == {"forward", "backward"}
        assert sum(r["verdict"].startswith("chosen, shipped") for r in said["rows"]) == 2
        assert all("out of time" in r["verdict"] for r in said["rows"] if "shipped" not in r["verdict"])
        file = Path("leak.tuned.json")
        (tuned,) = read_files([str(file)])
        assert tuned.text() == file.read_text() and tuned.device == "interpreter"
        assert not any(word in file.read_text() for word in (str(tmp_path), "202"))
        # another tile by hand, so that it shows which one ran
        changed = file.read_text().replace('"forward/4": {"lanes": 128', '"forward/4": {"lanes": 2')
        assert changed != file.read_text()
        file.write_text(changed)
        assert app.run(["compile", "leak.psm", "--tuned", "leak.tuned.json"]) == 0
        assert capsys.readouterr().err == ""
        shipped = psmc.load("leak.psm")
        monkeypatch.setenv("PSMC_TUNED", str(file))
        x, w = torch.randn(1, 9, 1), torch.rand(1, 9, 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*tuned")
            baked = psmc.load("leak.psm")
            assert baked.source == Path("leak.py").read_text()
            assert torch.allclose(baked(x, w), shipped(x, w))
        assert baked.module.KERNELS.table.tiles["forward"][4][1] == 2
        assert shipped.module.KERNELS.table.tiles["forward"][4][1] == 128
        again = psmc.load("leak.psm")
        assert again.module is baked.module
