"""tests/check_layers.py finds what it is there to find."""

import pathlib
import subprocess
import sys

import pytest

CHECK = pathlib.Path(__file__).parents[1] / "check_layers.py"


def check(root, path, line):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"// A comment.\n{line}\n")
    return subprocess.run([sys.executable, CHECK, root], capture_output=True, text=True)


@pytest.mark.parametrize(
    "path, line",
    [
        ("kernels/base/check.h", '#include "kernels/tensor.h"'),
        ("kernels/cpu/gemm.cc", '#include "engine/engine.h"'),
        ("kernels/cpu/gemm.cc", '#include "kernels/cuda/launchers.h"'),
        ("kernels/cuda/op.cu", '#include "absl/status/status.h"'),
        ("kernels/make_backend.h", '#include "nlohmann/json.hpp"'),
        ("engine/engine.cc", '#include "kernels/cuda/launchers.h"'),
        ("engine/engine.cc", '#include "kernels/cpu/cpu_backend.h"'),
        ("engine/engine.cc", '#include "headstart/v1/prefill.pb.h"'),
        ("engine/engine.cc", "#include <grpcpp/grpcpp.h>"),
        ("engine/engine.cc", "  #  include <prometheus/counter.h>"),
        ("server/program/main.cc", "#include <cuda_runtime.h>"),
        ("server/options.cc", '#include "client/prefill_client.h"'),
        ("server/options.cc", '#include "tests/testing/tiny_model.h"'),
        ("engine/schedule/scheduler.cc", '#include "engine/run/local_runner.h"'),
        ("engine/ship/shipment.cc", '#include "engine/schedule/scheduler.h"'),
        ("server/net/listener.cc", '#include "engine/engine.h"'),
        ("server/rpc/convert.cc", '#include "CLI/CLI.hpp"'),
        ("client/kv_receiver.cc", '#include "server/options.h"'),
        ("client/kv_receiver.cc", '#include "engine/engine.h"'),
        ("engine/engine.cc", "#if HEADSTART_ENABLE_CUDA"),
        ("kernels/base/mutex.h", '#include "proto/grpc_time.h"'),
        ("engine/engine.cc", "const auto now = absl::Now();"),
        ("server/rpc/timer.h", "absl::Time when;"),
        ("server/net/self_check.cc", "std::chrono::system_clock::now()"),
        ("client/cancel_token.cc", "mutex_.AwaitWithTimeout(cancelled, pause);"),
        ("client/retry.cc", "srand(time(nullptr));"),
    ],
)
def test_names_file_line_and_header(tmp_path, path, line):
    done = check(tmp_path, path, line)
    assert done.returncode == 1
    assert f"{path}:2: " in done.stdout
    assert "1 problems" in done.stdout


@pytest.mark.parametrize(
    "path, line",
    [
        ("kernels/cuda/backend.cc", '#include "absl/status/status.h"'),
        ("kernels/cuda/op.cu", "#include <cuda_runtime.h>"),
        ("kernels/make_backend.cc", "#if HEADSTART_ENABLE_CUDA"),
        ("engine/engine.cc", '#include "kernels/backend.h"'),
        ("server/rpc/convert.h", '#include "headstart/v1/prefill.pb.h"'),
        ("server/program/main.cc", '#include "client/commands/bench_command.h"'),
        ("client/prefill_client.cc", '#include "google/rpc/status.pb.h"'),
        ("engine/engine.cc", '// #include "server/options.h"'),
        ("client/unary_call.h", '#include "proto/grpc_time.h"'),
        ("client/retry.cc", "absl::Duration pause = absl::Seconds(1);"),
        ("client/retry.cc", "const Instant next = Instant::Now() + pause;"),
        ("server/ops/tracer.cc", "const absl::Time now = absl::Now();"),
    ],
)
def test_lets_pass_what_is_allowed(tmp_path, path, line):
    assert check(tmp_path, path, line).returncode == 0


def test_an_empty_tree_is_an_error(tmp_path):
    assert subprocess.run([sys.executable, CHECK, tmp_path]).returncode == 1
