"""Every error that the cloud service raises on purpose.

SplitwardError
 └── CloudError
      ├── EngineError     the server half cannot answer now
      ├── StoreError      the store cannot be read or written now
      └── TransportError  the broker cannot be reached now

All three pass: what they interrupt stays unacknowledged and is tried again.
"""

from __future__ import annotations

from splitward.errors import SplitwardError


class CloudError(SplitwardError):
    """Something that the service depends on does not work at the moment."""


class EngineError(CloudError):
    """The server half cannot answer now."""


class StoreError(CloudError):
    """The store cannot be read or written now."""


class TransportError(CloudError):
    """The broker cannot be reached now."""
