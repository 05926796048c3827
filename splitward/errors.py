"""Every error that the shared package raises on purpose.

SplitwardError
 ├── ConfigError        a configuration file or value cannot be used
 ├── DataError          a data file or folder cannot be read
 ├── WireError          bytes from outside are not what they should be
 │    ├── MessageError  a binary message was refused; `.reason` is a stable code
 │    └── BundleError   a bundle was refused; `.reason` is a stable code
 ├── TrainingError      training cannot start or go on
 │    └── HijackError   the server's gradients do not serve the task
 ├── ExportError        a trained run cannot become a bundle
 ├── AuditError         an audit cannot start, go on, or be trusted
 └── ImageError         an edge image cannot be built or read

Each message says what went wrong, where, and what to do about it.
"""

from __future__ import annotations


class SplitwardError(Exception):
    """Root of the tree. The command line prints its text and exits with 2, without a traceback."""


class ConfigError(SplitwardError):
    """A configuration file or value cannot be used."""


class DataError(SplitwardError):
    """A data file or folder cannot be read."""


class WireError(SplitwardError):
    """Bytes from outside are not what they should be.

    Parameters
    ----------
    reason : str
        Stable code in snake_case, fit for a metric label or a reply (`bad_crc`, `unsigned`, ...).
    message : str
        What is wrong, for a person.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MessageError(WireError):
    """A binary message was refused."""


class BundleError(WireError):
    """A bundle was refused."""


class TrainingError(SplitwardError):
    """Training cannot start or go on."""


class HijackError(TrainingError):
    """The server's gradients do not serve the task: the client has to stop."""


class ExportError(SplitwardError):
    """A trained run cannot become a bundle."""


class AuditError(SplitwardError):
    """An audit cannot start, go on, or be trusted."""


class ImageError(SplitwardError):
    """An edge image cannot be built or read."""
