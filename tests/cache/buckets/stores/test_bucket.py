"""Requests to a store whose connections break."""

import socket
import struct
import threading
from contextlib import contextmanager

import pytest

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.errors import OutputError
from lightopd.schemas.stores.buckets import BucketConfig

TAKEN = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'


@contextmanager
def store(resets, retry_s):
    """A store that resets its first connections once it has read the request, as a server that dies does."""
    listener, seen = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            request = b""
            while not request.endswith(b"content") and (data := connection.recv(65536)):
                request += data
            seen.append(request)
            if len(seen) <= resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.sendall(TAKEN)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    keys = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    place = {"endpoint": f"http://127.0.0.1:{listener.getsockname()[1]}", **keys}
    try:
        yield seen, Bucket("s3://bucket/x", BucketConfig(retry_s=retry_s, store=place))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("do", ["put", "put_if_absent"])
def test_a_connection_that_is_reset_is_no_reason_to_give_up(do):
    with store(2, 20.0) as (seen, bucket):
        getattr(bucket, do)("name", b"content")
        assert len(seen) == 3


def test_one_that_is_always_reset_ends_in_time_with_what_to_look_at():
    told = pytest.raises(OutputError, match=r"does not answer \(tried again for 0.5 s\)")
    with store(10**6, 0.5) as (_, bucket), told:
        bucket.put("name", b"content")
