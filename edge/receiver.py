"""A DICOM receiver: it takes C-STORE requests (PS3.4, annex B) into a folder, which is then read as any other.

What it has answered with success lies whole on the disk. It refuses what would leave too little space
(A700, out of resources), so that the sender keeps it and tries again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge.capture import Capture, Frame
from edge.errors import CaptureError
from edge.folder import dicom_folder
from splitward.disk import move_whole

SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
INCOMING = ".incoming"
MAX_OBJECT_BYTES = 1 << 30
_UID = re.compile(r"[0-9.]{1,64}")
log = logging.getLogger(__name__)


class ReceiverSource:
    """Listens at `capture.config.listen`, and gives the frames of what it has received."""

    def __init__(self, path: Path, capture: Capture) -> None:
        self._path = path
        self._capture = capture
        path.mkdir(parents=True, exist_ok=True)
        incoming = path / INCOMING
        incoming.mkdir(exist_ok=True)
        for left in incoming.iterdir():  # was never answered with success
            left.unlink()
        self._server = self._listen()

    def __iter__(self) -> Iterator[Frame]:
        config = msgspec.structs.replace(self._capture.config, watch=True, sort=True)
        capture = Capture(**{**self._capture.__dict__, "config": config})
        try:
            yield from dicom_folder(self._path, capture)
        finally:
            self._server.shutdown()

    def _listen(self) -> Any:
        config = self._capture.config
        try:
            from pynetdicom import AE, AllStoragePresentationContexts, evt
            from pynetdicom.sop_class import Verification
        except ImportError as error:
            raise CaptureError(f"pynetdicom: {error}. Install `splitward[dicom]`.") from error
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it writes attributes, which name patients
        entity = AE(ae_title=config.ae_title)
        entity.supported_contexts = AllStoragePresentationContexts
        entity.add_supported_context(Verification)
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.callers)
        entity.maximum_associations = 4
        host, _, port = config.listen.rpartition(":")
        try:
            return entity.start_server(
                (host, int(port)), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
            )
        except (OSError, ValueError, OverflowError) as error:
            raise CaptureError(
                f"capture.listen = {config.listen!r}: {error}. Give `HOST:PORT` of a free port."
            ) from error

    def _store(self, event: Any) -> int:
        """Answer one C-STORE request; the status of PS3.4, table B.2-1."""
        uid = str(event.request.AffectedSOPInstanceUID)
        if not _UID.fullmatch(uid):
            return CANNOT_UNDERSTAND
        partial = (
            self._path / INCOMING / f"{uid}.{secrets.token_hex(8)}"
        )  # two may send the same object at once
        try:
            data = event.encoded_dataset()
            if len(data) > MAX_OBJECT_BYTES:
                return CANNOT_UNDERSTAND
            disk = os.statvfs(self._path)
            if disk.f_bavail * disk.f_frsize - len(data) < self._capture.config.min_free_bytes:
                log.error("a DICOM object is refused: the disk is nearly full")
                self._capture.lose("refused_no_space", None, "")
                return OUT_OF_RESOURCES
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move_whole(partial, self._path / f"{uid}.dcm")
        except OSError as error:
            log.error("a DICOM object is refused: %s", error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink()
            return OUT_OF_RESOURCES
        return SUCCESS
