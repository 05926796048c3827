"""Every error that the device agent raises on purpose.

SplitwardError
 └── EdgeError
      ├── CaptureError   the source of frames cannot be opened
      ├── BackendError   the runtime is missing, or refuses a graph or a frame
      ├── SpoolError     the spool cannot be opened or written
      ├── LinkError      the connection to the broker cannot be set up
      ├── SlotError      the boot partition does not say which slot starts
      ├── UpdateError    a system update cannot be fetched or installed
      └── InstallError   the agent cannot be installed on this system

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


class SpoolError(EdgeError):
    """The spool cannot be opened or written."""


class LinkError(EdgeError):
    """The connection to the broker cannot be set up."""


class SlotError(EdgeError):
    """The boot partition does not say which slot starts."""


class UpdateError(EdgeError):
    """A system update cannot be fetched or installed."""


class InstallError(EdgeError):
    """The agent cannot be installed on this system."""
