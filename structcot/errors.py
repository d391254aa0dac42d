"""Everything that structcot raises on purpose.

Each message says where, what, what was found and what to do, and is shown to the user as it is. `exit_status` is what the command line
ends with: 2 where the user can mend the input, 1 where a run failed, 75 where a signal stopped a run that the same command resumes.
Errors travel between processes, so each one keeps its text in `args`.
"""

from __future__ import annotations


class StructcotError(Exception):
    """Root of all errors that are shown without a traceback."""

    exit_status = 1


class ConfigError(StructcotError):
    """A config, an override or an argument is wrong: an unknown key, a value out of range, an output directory that cannot be written."""

    exit_status = 2


class DataError(StructcotError):
    """Demonstrations cannot be used as they are: a broken line, a missing field, a sample longer than allowed."""

    exit_status = 2


class ModelError(StructcotError):
    """A model or tokenizer cannot be used: an unknown architecture, a pickled weight file, a template that does not fit."""

    exit_status = 2


class MismatchError(StructcotError):
    """What lies in the output directory belongs to another run: a checkpoint of another model, other data, other settings."""

    exit_status = 2


class FetchError(StructcotError):
    """A model or data set cannot be put on disk: no network, a wrong checksum, an archive that leaves its directory."""


class ServerError(StructcotError):
    """A model behind a server gives no answer: it refuses the request, cannot be reached, or sends what cannot be read."""


class CheckpointError(StructcotError):
    """A checkpoint cannot be written or read: a full disk, a damaged file."""


class ExportError(StructcotError):
    """An adapter or merged model does not reload as what was trained."""


class TrainingDiverged(StructcotError):
    """A loss or gradient is not finite. Raised before the weights change; names the step and its records."""


class Interrupted(StructcotError):
    """A signal asked the run to stop before there was anything to resume."""


class StoppedWithCheckpoint(StructcotError):
    """A signal stopped the run after a complete checkpoint; the same command resumes it."""

    exit_status = 75


class RankLost(StructcotError):
    """Another process of the run ended or no longer answers."""


class ToldElsewhere(StructcotError):
    """The same failure as on the first rank, whose message says it: this rank ends with the same status and says nothing."""

    def __init__(self, exit_status: int):
        super().__init__(exit_status)
        self.exit_status = exit_status
