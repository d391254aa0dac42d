"""Metadata lives in pyproject.toml; this file is here for build commands, which TOML cannot say."""

import os
import subprocess
import sys
from typing import ClassVar

from setuptools import Command, setup


class CompileKernels(Command):
    """`python setup.py compile_kernels [--arch=80,90,100]`: compile every Triton kernel without a GPU and check what it takes."""

    description = "compile every Triton kernel without a GPU; fail on spills, too much shared memory or slow instructions"
    user_options: ClassVar[list[tuple[str, None, str]]] = [
        ("arch=", None, "compute capabilities, separated by commas"),
        ("operation=", None, "compile only this operation's kernels"),
        ("json=", None, "write the rows to this file too"),
    ]

    def initialize_options(self):
        """What is not given, the tool decides."""
        self.arch = self.operation = self.json = None

    def finalize_options(self):
        """The tool checks what it is given."""

    def run(self):
        """Start the tool and end as it ends."""
        given = {"--arch": self.arch, "--operation": self.operation, "--json": self.json}
        options = [word for name, value in given.items() if value is not None for word in (name, value)]
        path = os.pathsep.join(filter(None, ["kernels", os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "structcot_kernels.aot", *options]
        status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
        if status:
            sys.exit(status)


setup(cmdclass={"compile_kernels": CompileKernels})
