from __future__ import annotations

import ast
import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megatron.config.sections import all_flags

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flag_reference", ROOT / "tools/generate_flag_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docs/flags.md", "tests/config/flag_surface.txt"])
def test_generated_file_is_current(name: str) -> None:
    tool = generator()
    checked_in, current = (ROOT / name).read_text(encoding="utf-8"), tool.generated_files()[ROOT / name]
    changes = "\n".join(difflib.unified_diff(checked_in.splitlines(), current.splitlines(), lineterm="", n=0))
    assert not changes, f"the flags have changed; if that is meant, run `{tool.COMMAND}`:\n{changes}"


def attributes_read(root: Path) -> set[str]:
    """Names of all attributes that are read outside the config package, calls of methods aside."""
    names = set()
    for file in root.rglob("*.py"):
        if "config" in file.relative_to(root).parts:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
        }
    return names


def families_read(root: Path) -> set[str]:
    """Fields that a family reads by a computed name: getattr(x, f"lr_decay_{unit}") reads every lr_decay_*."""
    prefixes = set()
    for file in root.rglob("*.py"):
        if "config" in file.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"):
                continue
            name = node.args[1]
            if isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                prefixes.add(str(name.values[0].value))
    return {name for name in all_flags() for prefix in prefixes if len(prefix) > 3 and name.startswith(prefix)}


def test_scan_sees_an_attribute_but_not_a_method(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("config.seed\ntext.split(',')\nstate.lr = 1\ngetattr(o, f'lr_wsd_decay_{u}')\n")
    assert attributes_read(tmp_path) == {"seed"}
    assert "lr_wsd_decay_iters" in families_read(tmp_path)
    assert "lr_decay_iters" not in families_read(tmp_path)


def test_every_flag_is_read_by_someone() -> None:
    root = ROOT / "megatron"
    unread = set(all_flags()) - attributes_read(root) - families_read(root)
    assert sorted(unread) == []
