"""The tool that crosses all features, as a module: tools/ is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load() -> ModuleType:
    """Import tools/generate_layout_table.py."""
    name = "generate_layout_table"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module
