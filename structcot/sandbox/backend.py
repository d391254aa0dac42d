"""What keeps a generated program in: which of the ways that are known works on this machine, found by trying.

"bubblewrap": namespaces made by the program `bwrap`, in which there are no other processes, no network and no files but the interpreter
and its libraries. "landlock": no namespaces; the kernel's Landlock closes all files but those. Under both a filter refuses the system
calls that a computation does not need, see structcot.sandbox.syscalls. "none": limits on time and memory alone, for those who run all of
it in a container or virtual machine of their own.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from structcot.errors import ConfigError
from structcot.sandbox.syscalls import MACHINES, filter_program

KINDS = ("bubblewrap", "landlock", "none")
CHOICES = ("auto", *KINDS)
# All that a program finds in its environment. Hashes are not random, so that sets have one order in every run.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES_READ = ("/dev/urandom", "/dev/random", "/dev/zero")
_DEVICES_WRITTEN = ("/dev/null",)
_INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})
_BUBBLEWRAP = ("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A way to run a program: `prefix` is the command that starts the interpreter, `readable` what Landlock leaves ((): not used)."""

    kind: str
    prefix: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    filter: bytes = b""

    @property
    def writable(self) -> tuple[str, ...]:
        """Devices that may also be written to; no file may."""
        return _DEVICES_WRITTEN

    @property
    def is_nested(self) -> bool:
        """Whether another process stands between this one and the program."""
        return bool(self.prefix)


def choose_backend(wanted: str = "auto") -> Backend:
    """Choose how programs are run: the strongest way that holds here, or the one that is `wanted`, one of `CHOICES`.

    A way is tried once per process, by a program that attempts what is forbidden.

    Raises:
        ConfigError: if `wanted` is unknown or does not hold here, nothing holds, or this is no Linux.
    """
    if wanted not in CHOICES:
        raise ConfigError(f'code.sandbox: got "{wanted}"; use one of {", ".join(CHOICES)}')
    if not _can_wait_for_processes():
        raise ConfigError("code.sandbox: generated programs run on Linux 5.3 or newer alone; grade on another machine")
    if wanted == "none":
        return Backend(kind="none")
    reasons: list[str] = []
    for kind in KINDS[:-1] if wanted == "auto" else (wanted,):
        backend, reason = _try(kind)
        if backend:
            return backend
        reasons.append(f"{kind}: {reason}")
    raise ConfigError(
        f"code.sandbox: generated programs cannot be kept in on this machine ({'; '.join(reasons)}); install bubblewrap or use a kernel "
        'with Landlock (5.13 or newer), or set code.sandbox = "none" to run them unprotected, in a container that may be lost'
    )


@functools.cache
def _try(kind: str) -> tuple[Backend | None, str]:
    """Make a backend and see whether it holds, or say why not."""
    from structcot.sandbox.probe import find_hole

    machine = platform.machine()
    if machine not in MACHINES:
        return None, f"no filter of system calls is known for {machine}"
    bwrap = shutil.which("bwrap")
    if kind == "bubblewrap" and not bwrap:
        return None, "the program bwrap is not installed"
    if kind == "bubblewrap" and not _children_are_listed():
        return None, "this kernel does not list the children of a process"
    prefix = _bubblewrap(bwrap) if bwrap and kind == "bubblewrap" else ()
    backend = Backend(kind=kind, prefix=prefix, readable=() if prefix else _landlocked_paths(), filter=filter_program(machine))
    hole = find_hole(backend)
    return (None, hole) if hole else (backend, "")


def _can_wait_for_processes() -> bool:
    """Whether the kernel has descriptors of processes."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _children_are_listed() -> bool:
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def interpreter() -> str:
    """The interpreter that runs programs: the one of this process, without its virtual environment and its packages."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def _library_folders() -> list[str]:
    """The folders of the standard library, which in a virtual environment lie outside it."""
    places = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    return sorted({os.path.realpath(sysconfig.get_path(name, vars=places)) for name in ("stdlib", "platstdlib")})


def _shared_libraries() -> list[str]:
    """The libraries that come with the interpreter, such as libpython: some lie beside the standard library."""
    return sorted(str(path) for path in Path(sys.base_exec_prefix, "lib").glob("lib*.so*"))


def _landlocked_paths() -> tuple[str, ...]:
    """What a program may read: Landlock can only add paths, so the packages beside the standard library are left out by naming the rest."""
    standard = [entry.path for folder in _library_folders() for entry in os.scandir(folder) if entry.name not in _INSTALLED_PACKAGES]
    paths = [interpreter(), *_LIBRARIES, *_DEVICES_READ, *_shared_libraries(), *standard]
    return tuple(path for path in paths if os.path.exists(path))


def _bubblewrap(bwrap: str) -> tuple[str, ...]:
    """The command that makes the namespaces, with files at the places that they have outside."""
    command = [bwrap, *_BUBBLEWRAP]
    for path in _LIBRARIES:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    for path in (interpreter(), *_library_folders(), *_shared_libraries()):
        if not path.startswith(tuple(f"{library}/" for library in _LIBRARIES)):
            command += ["--ro-bind", path, path]
    for folder in _library_folders():
        for name in _INSTALLED_PACKAGES:
            if os.path.isdir(os.path.join(folder, name)):
                command += ["--tmpfs", os.path.join(folder, name), "--remount-ro", os.path.join(folder, name)]
    for device in (*_DEVICES_READ, *_DEVICES_WRITTEN):
        command += ["--dev-bind", device, device]
    return (*command, "--remount-ro", "/", "--chdir", "/")
