"""Packages are found: the folders of each part that hold Python files, and the pins for CPUs.

The parts stand at the top of the repository and are imported as `sluice.<part>`
(`[tool.setuptools.package-dir]`), a mapping that pyproject's own package discovery cannot express.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PARTS = ("server", "models", "kernels", "loadtest")

setup(
    packages=[
        "sluice.requirements",
        *sorted(
            {
                ".".join(("sluice", *file.parent.relative_to(ROOT).parts))
                for part in PARTS
                for file in (ROOT / part).rglob("*.py")
            }
        ),
    ]
)
