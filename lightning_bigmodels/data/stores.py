"""Where prepared data lies: a folder, or a bucket of an object store that speaks S3."""

import logging
import os
import shutil
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from typing_extensions import override

from lightning_bigmodels.errors import InputError, RunError, require

T = TypeVar("T")

CONNECT_SECONDS = 10
READ_SECONDS = 30
MAX_PAUSE_SECONDS = 5.0
DOWNLOADS = 3  # of a file that arrives damaged
_PIECE = 1 << 20
_PARTIAL = ".partial"

_log = logging.getLogger(__name__)


class StoredFile(NamedTuple):
    """A file of a store and what its content must be.

    Attributes:
        name: Path below the store's address.
        size: Bytes.
        crc: CRC-32 of the content.
    """

    name: str
    size: int
    crc: int

    @staticmethod
    def of(path: Path, name: str) -> "StoredFile":
        """Describe a local file that will lie under `name`."""
        size, crc = _measure(path)
        return StoredFile(name, size, crc)


class Store(ABC):
    """Files by name under one address. What is written is there whole or not at all."""

    address: str

    def __str__(self) -> str:
        return self.address

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""

    @abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file."""

    @abstractmethod
    def fetch(self, file: StoredFile, target: IO[bytes]) -> None:
        """Write the content of a file to `target` and compare it with what it must be.

        Raises:
            InputError: there is no such file, or no right to read it.
            RunError: the file is damaged, or the store does not answer.
        """

    def _damaged(self, file: StoredFile, size: int, crc: int) -> RunError:
        found = f"{size} bytes" if size != file.size else f"CRC-32 {crc:08x}"
        wanted = f"{file.size} bytes" if size != file.size else f"CRC-32 {file.crc:08x}"
        return RunError(
            f"{self}/{file.name} is damaged: {found} where {wanted} were written; put it back from a copy, or prepare "
            "the data again"
        )


class Folder(Store):
    """A folder of this machine, or one that is mounted.

    Args:
        address: The folder; it is made when something is written.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.path = Path(address).expanduser()

    @override
    def read(self, name: str) -> bytes | None:
        path = self.path / name
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; mend its rights or its disk") from error

    @override
    def write(self, name: str, content: bytes) -> None:
        self._place(name, lambda target: target.write(content))

    @override
    def put(self, path: Path, name: str) -> None:
        with path.open("rb") as source:
            self._place(name, lambda target: shutil.copyfileobj(source, target, _PIECE))

    @override
    def names(self, prefix: str) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file() and path.suffix != _PARTIAL)
        found = (path.relative_to(self.path).as_posix() for path in files)
        return sorted(name for name in found if name.startswith(prefix))

    @override
    def delete(self, name: str) -> None:
        path = self.path / name
        path.unlink(missing_ok=True)
        if path.parent != self.path and not any(path.parent.iterdir()):
            path.parent.rmdir()

    @override
    def fetch(self, file: StoredFile, target: IO[bytes]) -> None:
        self.check(file)
        with (self.path / file.name).open("rb") as source:
            shutil.copyfileobj(source, target, _PIECE)

    def check(self, file: StoredFile) -> Path:
        """Return where a file lies, once its content has been read and found whole."""
        path = self.path / file.name
        try:
            size, crc = _measure(path)
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; put it back from a copy, or prepare the data again") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; mend its rights or its disk") from error
        if (size, crc) != (file.size, file.crc):
            raise self._damaged(file, size, crc)
        return path

    def _place(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.path / name
        partial = path.with_name(f".{path.name}{_PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as target:
                write(target)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise RunError(
                f"{path} cannot be written: {error.strerror}; make room or mend its rights, then start the same "
                "command again: it goes on"
            ) from error


class S3(Store):
    """A bucket of an object store, reached as every AWS program does: by its environment variables and its files.

    What the store refuses is an error at once. Where it does not answer, the request is repeated until `patience` is
    used up.

    Args:
        address: `s3://BUCKET/PREFIX`.
        patience: Seconds that one request may take with all its repetitions.
    """

    def __init__(self, address: str, patience: float) -> None:
        self.address = address.rstrip("/")
        self.patience = patience
        self.bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @override
    def read(self, name: str) -> bytes | None:
        def request() -> bytes | None:
            try:
                return self.client.get_object(Bucket=self.bucket, Key=self._prefix + name)["Body"].read()
            except self.client.exceptions.NoSuchKey:
                return None

        return self._ask(name, request)

    @override
    def write(self, name: str, content: bytes) -> None:
        self._ask(
            name, lambda: self.client.put_object(Bucket=self.bucket, Key=self._prefix + name, Body=content), writes=True
        )

    @override
    def put(self, path: Path, name: str) -> None:
        def request() -> None:
            with path.open("rb") as file:
                self.client.put_object(Bucket=self.bucket, Key=self._prefix + name, Body=file)

        self._ask(name, request, writes=True)

    @override
    def names(self, prefix: str) -> list[str]:
        def request() -> list[str]:
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix
            )
            return [item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", [])]

        return sorted(self._ask(prefix, request))

    @override
    def delete(self, name: str) -> None:
        self._ask(name, lambda: self.client.delete_object(Bucket=self.bucket, Key=self._prefix + name), writes=True)

    @override
    def fetch(self, file: StoredFile, target: IO[bytes]) -> None:
        for _ in range(DOWNLOADS):
            size, crc = self._ask(file.name, lambda: self._download(file, target))
            if (size, crc) == (file.size, file.crc):
                return
            _log.warning("%s/%s arrived damaged; fetching it again", self, file.name)
        raise self._damaged(file, size, crc)

    def _download(self, file: StoredFile, target: IO[bytes]) -> tuple[int, int]:
        size = crc = 0
        target.seek(0)  # what an earlier try has left is written over
        body = self.client.get_object(Bucket=self.bucket, Key=self._prefix + file.name)["Body"]
        for piece in body.iter_chunks(_PIECE):
            size += len(piece)
            if size > file.size:
                break
            crc = zlib.crc32(piece, crc)
            target.write(piece)
        return size, crc

    @property
    def client(self) -> Any:
        """The boto3 client of this process: a forked one must not use its parent's connections."""
        with self._lock:
            if self._client is None or self._process != os.getpid():
                boto3 = require("boto3", extra="streaming")
                from botocore.config import Config
                from botocore.exceptions import BotoCoreError

                config = Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"total_max_attempts": 1},  # `_ask` repeats, and knows when to stop
                    max_pool_connections=16,
                )
                try:
                    self._client = boto3.session.Session().client("s3", config=config)
                except (BotoCoreError, ValueError) as error:
                    raise InputError(f"{self}: {error}; mend the AWS settings in the environment") from error
                self._process = os.getpid()
            return self._client

    def _ask(self, name: str, request: Callable[[], T], writes: bool = False) -> T:
        client = self.client
        from botocore import exceptions

        silence = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
            exceptions.CredentialRetrievalError,
        )
        began, pause, tries = time.monotonic(), 0.1, 0
        while True:
            tries += 1
            try:
                return request()
            except exceptions.ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status < 500 and status not in (408, 429):
                    raise self._refused(name, error.response.get("Error", {}), writes) from error
                reason: Exception = error
            except silence as error:
                reason = error
            except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
                raise InputError(
                    f"no credentials for {self}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
                ) from error
            except exceptions.BotoCoreError as error:
                reason_line = " ".join(str(error).split())
                raise InputError(f"{self}: {reason_line}; mend the address or the AWS settings") from error
            waited = time.monotonic() - began
            if waited + pause > self.patience:
                go_on = "start the same command again: it goes on" if writes else "go on with --ckpt_path last"
                raise RunError(
                    f"{self}/{name} has not answered for {waited:.1f} s, in {tries} tries at "
                    f"{client.meta.endpoint_url} (the last: {reason}); when the store is back, {go_on}"
                ) from reason
            if tries == 1:
                _log.warning("%s does not answer; trying for up to %g s (%s)", self, self.patience, reason)
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _refused(self, name: str, error: dict[str, str], writes: bool) -> InputError:
        code = error.get("Code", "")
        if code == "NoSuchBucket":
            return InputError(f"{self}: there is no bucket {self.bucket}; check the address, or make the bucket")
        if code in ("NoSuchKey", "404"):
            return InputError(f"{self}/{name} is missing; put it back from a copy, or prepare the data again")
        right = "write" if writes else "read"
        return InputError(
            f"{self}/{name}: the store refuses ({code}: {error.get('Message', '')}); check the credentials and their "
            f"right to {right} there"
        )


def open_store(address: str, patience: float) -> Store:
    """Return the store of an address: `s3://BUCKET/PREFIX` or a folder.

    Args:
        address: Where it is.
        patience: Seconds that a request to an object store may take with all its repetitions.

    Raises:
        InputError: the address is of another kind.
    """
    if address.startswith("s3://"):
        if not address.removeprefix("s3://").strip("/"):
            raise InputError(f"{address} names no bucket; write s3://BUCKET/PREFIX")
        return S3(address, patience)
    if "://" in address:
        raise InputError(f"{address} is neither a folder nor s3://BUCKET/PREFIX; give one of these")
    return Folder(address)


def _measure(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return size, crc
