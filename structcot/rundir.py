"""The output directory of a run: one process at a time writes to it, and its manifest says what made it."""

from __future__ import annotations

import fcntl
import logging
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from structcot import __version__
from structcot.config import Config
from structcot.errors import ConfigError
from structcot.files import write_json, write_text

LOCK = ".lock"

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "numpy",
    "flash-attn",
    "liger-kernel",
    "torchao",
)


def hold(directory: Path) -> IO[str] | None:
    """Make a directory and hold it until the file that comes back is closed, here and in the commands it is passed to.

    So what a killed process has left running keeps what it writes to. None where another process holds it.

    Raises:
        OSError: if it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:  # some network file systems know no locks
        log.warning("%s: cannot be locked (%s); make sure that no other run writes there", directory, error.strerror)
    return file


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Make the directory and hold it for this process; the lock goes with the process, however it ends.

    Half-written files of a process that was killed are cleared away.

    Raises:
        ConfigError: if the directory cannot be written, or another process holds it.
    """
    try:
        file = hold(output_dir)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written: {error.strerror}; name a directory that can") from error
    if file is None:
        raise ConfigError(f"output_dir: {output_dir} is in use by another run; wait for it, or name another directory")
    with file:
        for leftover in output_dir.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def need_shared(config: Config) -> None:
    """Make sure that this rank sees the directory that the first one writes to.

    Raises:
        ConfigError: if it does not.
    """
    path = Path(config.output_dir) / "config.toml"
    if not path.is_file() or path.read_text(encoding="utf-8") != config.to_toml():
        raise ConfigError(
            f"output_dir: {config.output_dir} on {platform.node()} is not the directory that the first rank writes to;"
            " name one on a file system that all machines share"
        )


def write_config(config: Config, output_dir: Path) -> None:
    """Write the resolved config, loadable as it is."""
    write_text(output_dir / "config.toml", config.to_toml())


def write_manifest(output_dir: Path, hashes: dict[str, str], device: dict[str, Any]) -> None:
    """Write manifest.json: `hashes` are the sha256 of everything that went in, by name."""
    manifest = {
        "structcot": __version__,
        "sha256": hashes,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "devices": device,
    }
    write_json(output_dir / "manifest.json", manifest)


def git_commit() -> str:
    """The commit this package runs from, with `+changed` where files differ from it; empty outside a checkout."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return ""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+changed" if changed else commit


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
