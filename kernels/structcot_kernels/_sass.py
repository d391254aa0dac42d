"""What a compiled kernel takes of a multiprocessor, and what its machine code (SASS) does, as CUDA's `cuobjdump` shows it.

Triton's wheel brings that tool along. Shown are the registers and the memory for spilled ones; of the instructions, those that multiply
matrices (HMMA: mma.sync, HGMMA: Hopper's wgmma, UTCHMMA: Blackwell's tcgen05.mma) and how wide those are that load global memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)

GLOBAL_LOADS = ("LDG", "LDGSTS")
BULK_LOADS = ("UTMALDG", "UBLKCP")
SPILLS = ("LDL", "STL")
WIDTHS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
PLAIN_WIDTH_BYTES = 4
WIDEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Resources:
    """One compiled kernel: registers and spilled bytes of a thread, matrix instructions by name, global loads by width in bytes."""

    registers: int
    spilled_bytes: int
    matrix_instructions: dict[str, int]
    global_loads: dict[int, int]


def resources_of(cubin: bytes) -> Resources:
    """Take a compiled kernel apart.

    Raises:
        RuntimeError: if the tool fails or shows something that this module does not understand.
    """
    shown = disassembled(cubin)
    usage, mnemonics = USAGE.search(shown), INSTRUCTION.findall(shown)
    if usage is None or not mnemonics:
        raise RuntimeError(f"cuobjdump: shows no registers or no instructions of a kernel; it begins {shown[:200]!r}")
    registers, stack_bytes, local_bytes = map(int, usage.groups())
    spilled_bytes = stack_bytes + local_bytes
    heads = [mnemonic.split(".")[0] for mnemonic in mnemonics]
    if spilled_bytes == 0 and any(head in SPILLS for head in heads):
        raise RuntimeError("cuobjdump: shows spilling instructions but no memory that they spill to")
    matrix = Counter(head for head in heads if head.endswith("MMA"))
    loads = Counter(width_bytes for width_bytes in map(load_bytes, mnemonics) if width_bytes)
    return Resources(registers, spilled_bytes, dict(sorted(matrix.items())), dict(sorted(loads.items(), reverse=True)))


def load_bytes(mnemonic: str) -> int:
    """Bytes that a thread loads from global memory by one instruction such as `LDG.E.128`; 0 if it is no global load."""
    head, *modifiers = mnemonic.split(".")
    if head in BULK_LOADS:
        return WIDEST_BYTES
    if head not in GLOBAL_LOADS:
        return 0
    return next((WIDTHS_BYTES[modifier] for modifier in modifiers if modifier in WIDTHS_BYTES), PLAIN_WIDTH_BYTES)


def disassembled(cubin: bytes) -> str:
    """Resource usage and instructions of a compiled kernel, as text."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        ran = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"cuobjdump: ended with status {ran.returncode}: {ran.stderr.strip()}")
    return ran.stdout
