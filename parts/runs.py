"""A run's layout on disk, and what every output records of how it was made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from parts.files import REPOSITORY

_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "sentence-transformers", "datasets", "huggingface_hub", "openai",
    "scikit-learn", "nltk", "numpy", "scipy",
)  # fmt: skip  # fmt: skip


def rollouts_path(checkpoint: str | Path) -> Path:
    """Where a checkpoint's AlpacaEval rollouts are; `<same>.meta.json` beside them records how they were made."""
    checkpoint = Path(os.path.abspath(checkpoint))
    return checkpoint / f"alpaca-eval-{checkpoint.name}.json"


def provenance(**facts: object) -> dict:
    """What every output records: commit, package versions and command line, plus the facts given (seed, dtype, model ...)."""
    return {"commit": _commit(), "packages": _package_versions(), "command": sys.argv, **facts}


def _commit() -> str:
    """The commit of this checkout, with `-dirty` where tracked files differ from it; "unknown" outside a git checkout."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def _package_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
