"""Every error that the device agent raises on purpose.

SplitwardError
 └── EdgeError
      ├── CaptureError       the source of frames cannot be opened
      ├── BackendError       the runtime is missing, or refuses a graph or a frame
      ├── ReleaserError      the releaser ended too often: its supervisor should start the agent anew
      ├── SpoolError         the spool cannot be opened or written
      │    └── DiskFull      ... for want of space: what was asked for can be asked for again
      ├── LinkError          the connection to the broker cannot be set up
      ├── FetchError         the cloud's HTTPS side did not answer as it should; `.reason` is a stable code
      ├── UpdateError        a bundle cannot be installed or rolled back; `.reason` is a stable code
      ├── SlotError          the boot partition does not say which slot starts
      ├── SystemUpdateError  a system update cannot be fetched or installed
      └── InstallError       the agent cannot be installed on this system

A bundle that is refused raises `splitward.errors.BundleError`, whose `.reason` is a stable code.
"""

from __future__ import annotations

from splitward.errors import SplitwardError


class EdgeError(SplitwardError):
    """Root of the device agent's errors."""


class CaptureError(EdgeError):
    """The source of frames cannot be opened."""


class BackendError(EdgeError):
    """The runtime is missing, or refuses a graph or a frame."""


class ReleaserError(EdgeError):
    """The releaser ended too often: its supervisor should start the agent anew."""


class SpoolError(EdgeError):
    """The spool cannot be opened or written."""


class DiskFull(SpoolError):  # noqa: N818  # a state, named as the operator would
    """The spool cannot be written for want of space. Nothing is lost: the same commit can be tried again."""


class LinkError(EdgeError):
    """The connection to the broker cannot be set up."""


class _CodedError(EdgeError):
    """An error with a stable code in snake_case as `.reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FetchError(_CodedError):
    """The cloud's HTTPS side did not answer as it should."""


class UpdateError(_CodedError):
    """A bundle cannot be installed or rolled back."""


class SlotError(EdgeError):
    """The boot partition does not say which slot starts."""


class SystemUpdateError(EdgeError):
    """A system update cannot be fetched or installed."""


class InstallError(EdgeError):
    """The agent cannot be installed on this system."""
