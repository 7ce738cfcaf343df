"""Features on disk: computed once by whoever comes first, shared by the runs of a grid, within a budget of bytes.

An entry is one tensor in a safetensors file, called by the sha256 of all that it was made of: weights, precision, and
what the model was shown, pixel by pixel. So nothing has to be declared stale, and folders may be removed at any time.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perdure.storage.files import place

_NAME, _KEY, _CONTENT, _ENDING, _DRAFT = "features", "key", "sha256", ".safetensors", ".draft"
_ABANDONED = 3600.0  # seconds after which a draft is of a process that was killed
_SPARED = 0.9  # of the budget is left full when entries must go, so that it is not done for each new one


def key_of(*parts: str | Tensor) -> str:
    """The name of what is made of `parts`: texts, and tensors with their dtypes, shapes and values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)}:{part}".encode())
            continue
        values = part.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


class FeatureStore:
    """A folder of tensors by key, which any number of processes read and write at the same time.

    Args:
        folder: is made where it is not there.
        most: bytes that its entries may take; the ones not read for longest go first.
        facts: on which numbers depend besides weights and images: device, precision, attention, threads.

    Raises:
        ValueError: when it is no folder, or nothing can be written to it.
    """

    def __init__(self, folder: Path, most: int, facts: str = "") -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache {folder}: {error.strerror or error}: give a folder, or leave it out") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--cache {folder} cannot be written to: give another folder, or leave it out")
        self.folder, self.most, self.facts = folder, most, facts
        self.used = False
        """Whether anything was found or kept."""
        self._taken: int | None = None
        self._sound: set[str] = set()  # keys of which the values were held against their digest, once a process

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says of what the system refuses that it is about the cache, and may go."""
        try:
            yield
        except (FileExistsError, IsADirectoryError, PermissionError) as error:
            raise ValueError(
                f"--cache {self.folder}: {error.filename}: {error.strerror}: remove it, or give another folder"
            ) from error
        except OSError as error:
            raise ValueError(
                f"--cache {self.folder}: {error.strerror or error}: make room there, give a lower --cache-bytes, or "
                "leave it out"
            ) from error

    def get(self, key: str, rows: int | None = None) -> Tensor | None:
        """The tensor of that key, mapped from its file; None where there is none.

        An entry that is not what was written (cut, changed, of another key, not of `rows` rows) is removed.
        """
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                known = facts.get(_KEY) == key and list(file.keys()) == [_NAME]
                found: Tensor | None = file.get_tensor(_NAME) if known else None
            if found is not None and key not in self._sound:
                if key_of(found) == facts.get(_CONTENT):
                    self._sound.add(key)
                else:
                    found = None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            found = None
        if found is None or (rows is not None and (not found.dim() or len(found) != rows)):
            with self._told():
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another process may have made room
            os.utime(path)
        self.used = True
        return found

    def put(self, key: str, value: Tensor) -> None:
        """Keep `value` under `key`, unless it alone is more than the budget; what was not read for longest may go."""
        if value.nbytes > self.most:
            return
        path = self._path(key)
        # Called by nobody else: two cells of a grid may come to the same images at the same time.
        draft = path.with_name(f"{key}-{uuid.uuid4().hex}{_DRAFT}")
        kept = value.detach().cpu().contiguous()
        content = save({_NAME: kept}, {_KEY: key, _CONTENT: key_of(kept)})
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            place(path, content, draft)
        self.used = True
        self._taken = (sum(size for _, size, _ in self._entries()) if self._taken is None else self._taken) + len(
            content
        )
        if self._taken > self.most:
            self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_ENDING}"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """When each was read last, its bytes, and its file; drafts that nobody will finish are removed."""
        found, now = [], time.time()
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            if path.suffix == _ENDING:
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == _DRAFT and now - status.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        return found

    def _make_room(self) -> None:
        # What others added is counted now; a file that is mapped stays readable for who has it.
        with filelock.FileLock(self.folder / ".lock"):
            entries = sorted(self._entries())
            taken = sum(size for _, size, _ in entries)
            if taken > self.most:
                for _, size, path in entries:
                    if taken <= _SPARED * self.most:
                        break
                    path.unlink(missing_ok=True)
                    taken -= size
            self._taken = taken
