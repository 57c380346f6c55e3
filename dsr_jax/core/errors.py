"""Errors that a user can act on: each has a problem and a remedy.

Entry points print a `DsrError` without a traceback and exit with its status (`core.cli`); any other
exception is a bug and keeps its traceback.
"""


class DsrError(Exception):
    """Base class of errors whose cause is outside the code and which a user can fix.

    Args:
      problem: What is wrong and why, with the key, shape or file.
      remedy: What to do about it; printed on a line of its own.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


class ConfigError(DsrError):
    """A config key, value or combination is invalid."""


class MeshError(DsrError):
    """Devices, mesh axes, logical axes or batch size do not fit each other."""


class ClusterError(DsrError):
    """A process of a distributed job cannot find or join the others."""


class DataError(DsrError):
    """A data set, image file or batch cannot be read as configured."""


class UnreadableRecord(DataError):
    """The content of a record cannot be decoded; reading it again does not help."""


class PromptError(DataError):
    """A prompt or caption cannot be encoded."""


class DamagedFileError(DsrError, ValueError):
    """A file that this project wrote is damaged."""


class StorageError(DsrError, OSError):
    """A file cannot be written: the disk is full, or the folder is not writable."""


class CheckpointError(DsrError):
    """A checkpoint or run folder is missing, damaged or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint cannot be read, or their checksums are wrong.

    Args:
      step: Step of the checkpoint.
      problem: See `DsrError`.
      remedy: See `DsrError`.
    """

    def __init__(self, step: int, problem: str, remedy: str = "") -> None:
        self.step = step
        super().__init__(problem, remedy)


class StuckSaveError(CheckpointError):
    """A save hangs; the program must exit without waiting for its threads."""


class ProcessError(DsrError):
    """A process of the run is lost, hangs, or differs from the others.

    A restart continues from the last checkpoint, hence the exit status EX_TEMPFAIL of sysexits.h,
    with which launchers restart the run.
    """

    exit_status = 75


class DeviceMemoryError(DsrError):
    """A program that needs more memory than a device has."""


class LockError(DsrError):
    """Another running command writes to a folder, or the folder cannot hold a lock."""


class ConversionError(DsrError):
    """A foreign state dict does not map one to one onto the model."""


class EvaluationError(DsrError):
    """Samples or references cannot be scored."""


class NumericsError(DsrError):
    """A loss or gradient is not finite, or numbers differ that must agree."""
