"""Imports go down the floors of the house."""

import ast
from pathlib import Path

import hf_linear

ROOT = Path(hf_linear.__file__).parent
FLOORS = {
    "kernels": 0,
    "ops": 1,
    "modules": 2,
    "cache": 3,
    "inputs": 3,
    "mixers": 3,
    "config": 4,
    "decoder": 4,
    "checkpoints": 4,
    "native": 4,
    "models": 5,
}


def imports(path: Path) -> set[str]:
    """The parts of hf_linear that a file imports, at whatever depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            found.add(node.module)
    return {name.split(".")[1] for name in found if name.startswith("hf_linear.")}


def test_imports_go_down_the_floors():
    seen = 0
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in FLOORS:
            assert part in ("__init__", "version"), f"{path}: on no floor"
            continue
        for other in imports(path):
            seen += 1
            assert FLOORS[other] <= FLOORS[part], f"{path}: floor {FLOORS[part]} imports {other}, floor {FLOORS[other]}"
    assert seen > 20
