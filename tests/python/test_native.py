"""The native receiver in a Python process: beside grpcio, protobuf and torch, switched off, broken."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from headstart import PrefillClient

from fake_server import TOKENS

pytestmark = pytest.mark.skipif("HEADSTART_RECEIVER_LIBRARY" not in os.environ, reason="no library given")

CALL_WITH_BOTH = """
import numpy as np
from fake_server import TOKENS, FakeKeeper, make_kv
from headstart import HeadstartError, KvLocation, PrefillClient, TorchMemory

with FakeKeeper().running() as target:
    for turn in range(3):
        for use_native in (True, False):
            with PrefillClient(target, connections=2, use_native=use_native) as client:
                memory = TorchMemory()
                client.prefill(TOKENS, into=memory)
                np.testing.assert_array_equal(memory.numpy(), make_kv())
                try:
                    client.fetch(KvLocation(b"x" * 16))
                    raise SystemExit("an unknown id was found")
                except HeadstartError as error:
                    assert error.reason == "UNKNOWN_FETCH_ID"
"""
LOAD_NATIVE = "from headstart import native; assert native.available()"
USE_TORCH = "import torch; assert float(torch.ones(64, 64).matmul(torch.ones(64, 64))[0, 0]) == 64"
MAKE_GLOBAL = "import os, sys; sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)"
# Whose symbols come first, also where others made theirs global.
ORDERS = {
    "native first": [LOAD_NATIVE, "import grpc", USE_TORCH, CALL_WITH_BOTH],
    "native last": [USE_TORCH, "import grpc", "import google.protobuf.message", LOAD_NATIVE, CALL_WITH_BOTH],
    "all global": [MAKE_GLOBAL, "import grpc", USE_TORCH, LOAD_NATIVE, CALL_WITH_BOTH],
}


def run_python(code, **environment):
    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_calls_in_one_process_with_grpcio_protobuf_and_torch(order):
    done = run_python("\n".join(order))
    assert done.returncode == 0, done.stderr


def test_exports_its_own_functions_only():
    library = os.environ["HEADSTART_RECEIVER_LIBRARY"]
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert "headstart_prefill" in names
    assert all(name.startswith("headstart_") for name in names), names


def test_is_taken_when_it_is_there_and_can_be_switched_off():
    code = "from headstart import PrefillClient as C; print(type(C('127.0.0.1:1')._receiver).__name__)"
    assert run_python(code).stdout.strip() == "NativeReceiver"
    assert run_python(code, HEADSTART_NATIVE="0").stdout.strip() == "GrpcReceiver"


@pytest.mark.skipif("HEADSTART_WHEEL_DIR" not in os.environ, reason="no wheel given")
def test_the_wheel_brings_its_library(tmp_path):
    (wheel,) = pathlib.Path(os.environ["HEADSTART_WHEEL_DIR"]).glob("*.whl")
    assert wheel.name.startswith("headstart_client-") and "-py3-none-linux_" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path)
    here = str(pathlib.Path(__file__).parent)
    code = f"""
import headstart, os
del os.environ["HEADSTART_RECEIVER_LIBRARY"]
assert headstart.__file__.startswith({str(tmp_path)!r})
{LOAD_NATIVE}
{CALL_WITH_BOTH}"""
    done = run_python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), here]))
    assert done.returncode == 0, done.stderr


def test_a_library_that_was_named_but_is_broken_is_an_error(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    done = run_python("from headstart import PrefillClient; PrefillClient('127.0.0.1:1')",
                      HEADSTART_RECEIVER_LIBRARY=str(tmp_path / "broken.so"))  # fmt: skip
    assert done.returncode != 0
    assert "OSError" in done.stderr and "broken.so" in done.stderr


def test_a_closed_client_says_so():
    client = PrefillClient("127.0.0.1:1", use_native=True)
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.prefill(TOKENS)
