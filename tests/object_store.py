"""An S3 server, a proxy before it that fails as told, and prepared text in it."""

import os
import socket
import subprocess
import sys
import threading
import time

import boto3
import pytest

from lightning_bigmodels.data import Text, streaming
from lightning_bigmodels.data.shards import Preparation
from lightning_bigmodels.data.stores import open_store

SHARD_BYTES = 1200  # 594 tokens
ADDRESS = "s3://bucket/some/prefix"


class Proxy:
    """Stands between a client and the object store: refuses connections, or harms what it hands on."""

    def __init__(self, target):
        self.target, self.port, self.harm = target, None, None
        self.requests = []
        self._listener = None
        self.accept()

    def accept(self):
        self._listener = socket.create_server(("127.0.0.1", self.port or 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def refuse(self):
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _serve(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hand_on, args=(client, listener), daemon=True).start()

    def _hand_on(self, client, listener):
        """Serve one request and close: so an outage meets the next one, whatever connections clients keep."""
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            request = client.recv(1 << 16)
            self.requests.append(request.split(b" ")[1].decode())
            server.sendall(
                request.replace(b"Connection: Keep-Alive", b"").replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            )
            reply = b""
            while part := server.recv(1 << 16):
                reply += part
            if self.harm and b"/shards/" in request:
                harm, self.harm = self.harm, None
                status, code = {"busy": (503, "SlowDown"), "forbid": (403, "AccessDenied")}.get(harm, (0, ""))
                if status:
                    body = f"<Error><Code>{code}</Code><Message>No.</Message></Error>"
                    reply = f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
                else:
                    reply = reply[:-1] + (bytes([reply[-1] ^ 1]) if harm == "flip" else b"")
            client.sendall(reply)


class Process(Text):
    """One of several processes, without starting any."""

    process = (1, 0)

    def shard(self):
        return self.process


@pytest.fixture(scope="session")
def server():
    """Port and process of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not _listens(port):
        time.sleep(0.05)
    yield port, process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def folder(text_file, tmp_path_factory, server):
    """A folder with the same shards as the store has at `ADDRESS`."""
    path = tmp_path_factory.mktemp("prepared") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        _introduce(patch, server[0])
        boto3.client("s3").create_bucket(Bucket="bucket")
        for output in (str(path), ADDRESS):
            text = Text(str(text_file), vocab_size=300, cache_dir=str(path.parent), test_fraction=0.1)
            text.write_shards(output, SHARD_BYTES, 0)
    return path


@pytest.fixture
def proxy(server, folder, monkeypatch):
    """The way to the store, which takes note of what is asked for."""
    proxy = Proxy(server[0])
    _introduce(monkeypatch, proxy.port)
    yield proxy
    proxy.refuse()


@pytest.fixture
def make(proxy, folder, tmp_path, monkeypatch):
    """Return a function that opens the shards, in the folder unless told otherwise, with few lanes for they are few."""
    monkeypatch.setattr(streaming, "NUM_LANES", 8)

    def text(shards=None, process=(1, 0), stage="fit", **options):
        values = {"vocab_size": 300, "block_size": 8, "batch_size": 8, "cache_dir": str(tmp_path / "cache")}
        text = Process(shards=str(shards or folder), **{**values, **options})
        text.process = process
        if shards == ADDRESS:
            # the same preparation: its small files need not be asked for each time
            Preparation(open_store(str(folder), 1.0), text.cache_dir)
        if stage:
            text.prepare_data()
            text.setup(stage)
        return text

    return text


def shards_in(path):
    """Return the files of shards in the caches below a folder."""
    return list(path.glob("cache*/shards-*/shards/*.bin*"))


def _introduce(patch, port):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


def _listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
