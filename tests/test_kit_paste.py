"""The kit files are pasted one after another: they import torch and the standard library, and no name twice."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch

from psmc.runtime import kit_scan

KIT = ("kit_scan", "kit_layer", "kit_tree", "kit_forest")
FOLDER = Path(kit_scan.__file__).parent


def test_one_namespace():
    seen: dict[str, str] = {}
    body: list[ast.stmt] = []
    for name in KIT:
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("psmc."):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = (module or "").split(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names, f"{name} imports {module}"
                if module == "__future__":
                    continue
            defined = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign):
                defined = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            for word in filter(None, defined):
                assert word not in seen, f"{word} is in {seen[word]} and in {name}"
                seen[word] = name
            body.append(node)
    future = ast.parse("from __future__ import annotations").body
    space: dict[str, object] = {"__name__": "pasted"}
    exec(compile(ast.Module([*future, *body], []), "pasted", "exec"), space)

    def add(l, r):  # noqa: E741
        return {"s": l["s"] + r["s"]}

    x = {"s": torch.ones(1, 10)}
    empty, cu = {"s": torch.zeros(())}, torch.tensor([0, 4, 10])
    outputs, final = space["scan_tokens"](lambda x: x, add, add, lambda s, _, x: s, x, empty, cu_seqlens=cu)
    prefix, _, counter = space["tree_tokens"](add, x, empty, cu_seqlens=cu)
    assert outputs["s"].tolist() == prefix["s"].tolist() == [[1, 2, 3, 4, 1, 2, 3, 4, 5, 6]]
    assert final["s"].tolist() == counter["position"].tolist() == [4, 6]
