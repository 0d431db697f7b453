"""Everything is declared in pyproject.toml; what is here compiles the CUDA kernels ahead of time, when asked.

    python setup.py build_kernels

puts them beside the package, for an installation or an image whose machines have no compiler. It needs nvcc and no GPU.
"""

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))


class BuildKernels(Command):
    """Compile every kernel for every GPU that the compiler knows, into the package."""

    description = "compile the CUDA kernels into megatron/kernels/prebuilt"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """Take no options."""

    def finalize_options(self) -> None:
        """Take no options."""

    def run(self) -> None:
        """Compile them."""
        from megatron.kernels.build import PREBUILT, main

        main(["--folder", str(PREBUILT)])


setup(cmdclass={"build_kernels": BuildKernels})
