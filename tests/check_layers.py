#!/usr/bin/env python3
"""Fails when a source file includes what its layer must not know, or looks at the wall clock. usage: check_layers.py REPO_ROOT

The first table below is the one in .github/CONTRIBUTING.md. The most specific entry for a file decides.
"""
import pathlib
import re
import sys

PROJECT = ("kernels/", "engine/", "server/", "client/", "tests/", "proto/", "headstart/", "google/rpc/", "opentelemetry/")
GENERATED = ("headstart/v1/", "google/rpc/")
GRPC_TIME = ("proto/grpc_time.h",)
BASE = ("kernels/base/",)
SEAM = ("kernels/backend.h", "kernels/tensor.h", "kernels/attention_params.h")

# Folder or file: the headers of this project that may be included there.
MAY_INCLUDE = {
    "kernels/base/": BASE,
    "kernels/": (*BASE, "kernels/backend.h", "kernels/tensor.h", "kernels/attention_params.h", "kernels/op_args.h", "kernels/make_backend.h",
                 "kernels/cpu/cpu_backend.h", "kernels/cuda/cuda_backend.h", "kernels/cuda/cuda_plan.h"),
    "kernels/cpu/": (*BASE, "kernels/backend.h", "kernels/tensor.h", "kernels/attention_params.h", "kernels/op_args.h", "kernels/cpu/"),
    "kernels/cuda/": (*BASE, "kernels/backend.h", "kernels/tensor.h", "kernels/attention_params.h", "kernels/op_args.h", "kernels/cuda/"),
    "engine/": (*BASE, "engine/", *SEAM),
    "engine/model/": (*BASE, "engine/model/", *SEAM),
    "engine/ship/": (*BASE, "engine/ship/", "engine/request.h", "engine/error.h", *SEAM),
    "engine/schedule/": (*BASE, "engine/schedule/", "engine/ship/", "engine/request.h", "engine/error.h", "kernels/attention_params.h"),
    "engine/run/": (*BASE, "engine/run/", "engine/model/", "engine/ship/", "engine/schedule/step.h", "engine/stopwatch.h", *SEAM),
    "server/net/": (*BASE, *GRPC_TIME, "server/net/", "server/options.h"),
    "server/ops/": (*BASE, *GRPC_TIME, "opentelemetry/", "server/ops/", "server/net/socket.h", "server/net/listener.h", "server/net/http_server.h", "server/rpc/call_record.h", "server/options.h", "server/version.h", "engine/"),
    "server/rpc/": (*BASE, *GENERATED, *GRPC_TIME, "server/rpc/", "server/ops/", "server/net/connection_ledger.h", "server/lifecycle.h", "server/options.h", "server/version.h", "engine/", *SEAM),
    "server/": (*BASE, *GENERATED, *GRPC_TIME, "server/", "engine/", *SEAM),
    "proto/": BASE,
    "server/program/main.cc": (*BASE, "server/", "client/"),  # the program: every subcommand
    "client/": (*BASE, *GENERATED, *GRPC_TIME, "client/"),
    "client/decode/": (*BASE, *GENERATED, "client/", "engine/", "kernels/backend.h", "kernels/attention_params.h"),
}

# Third-party header: the folders whose files may include it. Others than these (Abseil, system headers) are free.
ONLY_FOR = {
    "grpcpp/": ("server/", "client/", "proto/"),
    "grpc/": ("server/", "client/", "proto/"),
    "google/protobuf/": ("server/", "client/"),
    "prometheus/": ("server/ops/",),
    "boost/": ("server/net/",),
    "spdlog/": ("server/ops/",),
    "CLI/": ("server/program/", "client/commands/", "client/decode/"),
    "nlohmann/": ("engine/", "server/", "client/"),
    "oneapi/": ("kernels/cpu/",),
    "dnnl": ("kernels/cpu/",),
    "omp.h": ("kernels/cpu/",),
    "immintrin.h": ("kernels/cpu/",),
    "cublas": ("kernels/cuda/",),
    "cuda": ("kernels/cuda/",),
}

# Timers, waits and deadlines are Instants (kernels/base/instant.h): the wall clock may be set. What looks at it, a wait of
# Abseil included:
WALL_CLOCK = re.compile(
    r"absl::(Now|Time|CurrentTimeZone)\b|With(Timeout|Deadline)\(|system_clock|CLOCK_REALTIME|\b(gettimeofday|time|ctime)\((nullptr|NULL|0|&)"
)
# Who may, as people or other programs are told of it.
KNOWS_WALL_CLOCK = {
    "kernels/base/instant.h": "names it, to say what it is not",
    "server/server.cc": "the end of a drain as a metric is Unix time",
    "server/net/tls.h": "certificates have dates",
    "server/net/tls.cc": "certificates have dates",
    "server/ops/call_spans.h": "OTLP has Unix time",
    "server/ops/call_spans.cc": "OTLP has Unix time",
    "server/ops/tracer.cc": "OTLP has Unix time",
}

SOURCES = {".h", ".cc", ".cuh", ".cu"}
DEVICE_SOURCES = {".cuh", ".cu"}
INCLUDE = re.compile(r'\s*#\s*include\s*["<]([^">]+)[">]')
CUDA_SWITCH = re.compile(r"\s*#\s*(?:el)?if.*HEADSTART_ENABLE_CUDA")
CUDA_SWITCH_FILE = "kernels/make_backend.cc"


def folder_of(path):
    """The most specific folder of MAY_INCLUDE that holds the file."""
    return max((folder for folder in MAY_INCLUDE if path.startswith(folder)), key=len)


def objection(path, header):
    """Why the file must not include the header, or None."""
    folder = folder_of(path)
    if header.startswith(PROJECT):
        return None if header.startswith(MAY_INCLUDE[folder]) else f"{folder} must not include {header}"
    for prefix, owners in ONLY_FOR.items():
        if header.startswith(prefix) and not path.startswith(owners):
            return f"{header} is only for {', '.join(owners)}"
    if pathlib.PurePath(path).suffix in DEVICE_SOURCES and header.startswith("absl/"):
        return f"device code must not include {header}"
    return None


def check_file(path, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        problem = objection(path, match[1]) if match else None
        if CUDA_SWITCH.match(line) and path != CUDA_SWITCH_FILE:
            problem = f"HEADSTART_ENABLE_CUDA is read in {CUDA_SWITCH_FILE} only"
        if WALL_CLOCK.search(line) and path not in KNOWS_WALL_CLOCK:
            problem = "the wall clock may be set: Instant (kernels/base/instant.h)"
        if problem:
            yield f"{path}:{number}: {problem}"


def main():
    root = pathlib.Path(sys.argv[1])
    layers = sorted({folder.split("/")[0] for folder in MAY_INCLUDE})
    files = [path for layer in layers for path in sorted((root / layer).rglob("*")) if path.suffix in SOURCES]
    problems = [p for path in files for p in check_file(path.relative_to(root).as_posix(), path.read_text())]
    print(*problems, f"{len(files)} files, {len(problems)} problems", sep="\n")
    sys.exit(bool(problems) or not files)


if __name__ == "__main__":
    main()
