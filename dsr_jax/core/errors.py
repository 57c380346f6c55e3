"""Errors that a user can act on: each names the offender and the remedy.

Entry points print a `DsrError` without a traceback and exit with its status (`core.cli`); any other
exception is a bug and keeps its traceback.
"""


class DsrError(Exception):
    """Base class: something outside the code is wrong and the user can mend it.

    Args:
      problem: What is wrong, naming the offending key, shape or file.
      remedy: What to do about it; printed on its own line.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


class ConfigError(DsrError):
    """A config key, value or combination that cannot work."""


class MeshError(DsrError):
    """Devices, mesh axes, logical axes or batch that do not fit each other."""


class ClusterError(DsrError):
    """A process that belongs to a job of several and cannot find or join the others."""


class DataError(DsrError):
    """A data set, image file or batch that cannot be read as asked."""


class UnreadableRecord(DataError):
    """A record whose content cannot be decoded, however often it is read."""


class DamagedFileError(DsrError, ValueError):
    """A file of ours whose content is not what was written."""


class CheckpointError(DsrError):
    """A checkpoint or run folder that is missing, damaged or of another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files cannot be read, or whose checksums do not agree.

    Args:
      step: Its step.
      problem: As in `DsrError`.
      remedy: As in `DsrError`.
    """

    def __init__(self, step: int, problem: str, remedy: str = "") -> None:
        self.step = step
        super().__init__(problem, remedy)


class StuckSaveError(CheckpointError):
    """A save that does not end; the program must end without waiting for its threads."""


class ProcessError(DsrError):
    """A process of the run that is lost, hangs, or differs from the others.

    Starting again continues from the last checkpoint, hence the status that sysexits.h calls a
    temporary failure: launchers start such a run again.
    """

    exit_status = 75


class DeviceMemoryError(DsrError):
    """A program that needs more memory than a device has."""


class LockError(DsrError):
    """A folder that another living command writes, or that cannot be written."""


class ConversionError(DsrError):
    """A foreign state dict that does not map onto the model one to one."""


class EvaluationError(DsrError):
    """Samples or references that cannot be scored."""


class NumericsError(DsrError):
    """A loss or gradient that is no longer a number."""
