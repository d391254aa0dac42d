"""A study as an array job of SLURM: one task a cell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from structcot.study.cells import Cell


def slurm_script(cells: Sequence[Cell], arguments: Sequence[str], name: str) -> str:
    """Write the script of an array job; `arguments` are the study file and its overrides, `name` is that of the job.

    Its first comment says how it is submitted: what others start from first, the rest after it, and the report last. A task that its time
    limit stops keeps all that is finished, so the same script is submitted again.
    """
    needed = {cell.needs for cell in cells if cell.needs}
    first = [number for number, cell in enumerate(cells) if cell.name in needed]
    study = shlex.join([sys.executable, "-m", "structcot.study", *arguments])
    last = f"#   sbatch --dependency=afterany:$cells --job-name={shlex.quote(name)}-report --wrap {shlex.quote(study)}"
    submit = ["#   cells=$(sbatch --parsable FILE)", last]
    if first:
        numbers, rest = f"{first[0]}-{first[-1]}", f"{first[-1] + 1}-{len(cells) - 1}"
        submit = [
            f"#   base=$(sbatch --parsable --array={numbers} FILE)",
            f"#   cells=$(sbatch --parsable --dependency=afterok:$base --array={rest} FILE)",
            last,
        ]
    return "\n".join(
        [
            "#!/bin/bash",
            "# One task a cell. Add what your cluster asks for (--partition, --gres, --time) here, or to these commands; submit them",
            "# in the directory that the paths of the study start from, FILE being this script:",
            *submit,
            "# A task that its time limit stopped ends with 75. Submit all again: what is done is skipped, what is begun goes on.",
            f"#SBATCH --job-name={shlex.quote(name)}",
            f"#SBATCH --array=0-{len(cells) - 1}",
            "#SBATCH --signal=B:TERM@120",
            *(f"# {number:4d} {cell.name}" for number, cell in enumerate(cells)),
            f'exec {study} --cell "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )
