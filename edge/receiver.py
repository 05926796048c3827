"""A DICOM receiver: it takes C-STORE requests (PS3.4, annex B) into a folder, which is then read as any other.

What it has answered with success lies whole on the disk. It refuses what would leave too little space
(A700, out of resources), so that the sender keeps it and tries again. An object is known by its UID and its bytes:
senders repeat what they had no answer to, and the same bytes are one frame.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge.capture import Capture, Frame
from edge.errors import CaptureError
from edge.folder import INCOMING, dicom_folder
from splitward.disk import move_whole
from splitward.imaging import dicom

SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
MAX_OBJECT_BYTES = 1 << 30
LAST_BYTES = 64 << 20
"""Where less is left on the disk, the rest of an object is not waited for."""
KEEP_FAILED_S = 7 * 86400.0
_UID = re.compile(r"[0-9.]{1,64}")
_NAMED = re.compile(_UID.pattern + r"-[0-9a-f]{32}\.dcm")
log = logging.getLogger(__name__)


class ReceiverSource:
    """Listens at `capture.config.listen`, and gives the frames of what it has received."""

    def __init__(self, path: Path, capture: Capture) -> None:
        self._path = path
        self._capture = capture
        self._storing = threading.Lock()
        incoming = path / INCOMING
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            for left in incoming.iterdir():  # was never answered with success
                left.unlink()
        except OSError as error:
            raise CaptureError(
                f"{incoming}: {error.strerror}. Set `capture.path` to a folder that this user may write to."
            ) from error
        tempfile.tempdir = str(incoming)  # where pynetdicom puts what it receives
        self._server = self._listen()

    def __iter__(self) -> Iterator[Frame]:
        own = self._capture.config
        config = msgspec.structs.replace(
            own,
            watch=True,
            sort=True,
            keep_done_s=0.0 if own.keep_done_s is None else own.keep_done_s,
            keep_failed_s=KEEP_FAILED_S if own.keep_failed_s is None else own.keep_failed_s,
        )
        capture = Capture(**{**self._capture.__dict__, "config": config})
        try:
            yield from dicom_folder(self._path, capture, _NAMED)
        finally:
            self._server.shutdown()

    def _listen(self) -> Any:
        config = self._capture.config
        try:
            from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
            from pynetdicom.sop_class import Verification
        except ImportError as error:
            raise CaptureError(f"pynetdicom: {error}. Install `splitward[dicom]`.") from error
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it writes attributes, which name patients
        _config.STORE_RECV_CHUNKED_DATASET = True  # to the disk as it comes: memory has no room for an object
        entity = AE(ae_title=config.ae_title)
        readable = dicom.readable_syntaxes()
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(context.abstract_syntax, readable)
        entity.add_supported_context(Verification)
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.callers)
        entity.maximum_associations = 4
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_PDU_RECV, self._bound),
            (evt.EVT_CONN_CLOSE, self._forget),
        ]
        host, _, port = config.listen.rpartition(":")
        try:
            return entity.start_server((host, int(port)), block=False, evt_handlers=handlers)
        except (OSError, ValueError, OverflowError) as error:
            raise CaptureError(
                f"capture.listen = {config.listen!r}: {error}. Give `HOST:PORT` of a free port."
            ) from error

    def _has_room(self, free_bytes: int) -> bool:
        disk = os.statvfs(self._path)
        return disk.f_bavail * disk.f_frsize >= min(free_bytes, self._capture.config.min_free_bytes)

    def _bound(self, event: Any) -> None:
        """End an association in the middle of an object that is too large, or that the disk has no room for."""
        path = _partial_of(event)
        if path is not None and (path.stat().st_size > MAX_OBJECT_BYTES or not self._has_room(LAST_BYTES)):
            log.error("a DICOM object is refused as it comes: it is too large, or the disk is nearly full")
            event.assoc.abort()

    def _forget(self, event: Any) -> None:
        """Remove what has come of an object whose association broke."""
        path = _partial_of(event)
        if path is not None:
            event.assoc.dimse.message._data_set_file.close()
            path.unlink(missing_ok=True)

    def _store(self, event: Any) -> int:
        """Answer one C-STORE request; the status of PS3.4, table B.2-1."""
        uid, received = str(event.request.AffectedSOPInstanceUID), Path(event.dataset_path)
        partial = self._path / INCOMING / received.name
        try:
            if not _UID.fullmatch(uid) or received.stat().st_size > MAX_OBJECT_BYTES:
                return CANNOT_UNDERSTAND
            if not self._has_room(sys.maxsize):
                log.error("a DICOM object is refused: the disk is nearly full")
                self._capture.lose("refused_no_space", None, "")
                return OUT_OF_RESOURCES
            shutil.move(received, partial)  # where another receiver's folder is the temporary one
            with partial.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.blake2b(digest_size=16)
                while piece := file.read(1 << 20):
                    digest.update(piece)
            target = self._path / f"{uid}-{digest.hexdigest()}.dcm"
            with self._storing:
                if not target.exists():  # else it waits for its turn, and is not to be younger than it was
                    move_whole(partial, target)
        except OSError as error:
            log.error("a DICOM object is refused: %s", error.strerror)
            return OUT_OF_RESOURCES
        finally:
            for left in (received, partial):
                with contextlib.suppress(OSError):
                    left.unlink()
        return SUCCESS


def _partial_of(event: Any) -> Path | None:
    """File of the object that an association is in the middle of."""
    return getattr(event.assoc.dimse.message, "_data_set_path", None)
