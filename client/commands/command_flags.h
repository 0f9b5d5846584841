// Flags that the client commands share.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// --target, TLS files, --timeout, --connections, --wait and so on. The values are in `options` once
// the command line was parsed.
void AddConnectionFlags(CLI::App& app, PrefillClientOptions* options);

// A time like 90s or 2m, or a number of seconds; more than nothing.
CLI::Option* AddDurationFlag(CLI::App& app, const std::string& flag, absl::Duration* value,
                             const std::string& help);

// --gamma and the other single values; --preset too, unless the command has one of its own. They go
// to `request` as the command line is parsed. Without any of them it has no attention options: the
// server's default.
void AddAttentionFlags(CLI::App& app, bool with_preset, v1::PrefillRequest* request);

// --kv-dtype, to `request`.
void AddKvDtypeFlag(CLI::App& app, v1::PrefillRequest* request);

// "exact", "paper", "balanced", "fast".
std::string PresetName(v1::AttentionPreset preset);
// REQUIRES: one of these names.
v1::AttentionPreset PresetNamed(const std::string& name);

// Lets malloc keep what gRPC receives messages in. The C library would give it back to the kernel
// after every message and get it zeroed again for the next: a quarter of the CPU time of receiving.
// Called once, before anything is received; the library leaves a process's malloc alone.
void KeepReceiveMemory();

// Prints "PROGRAM: …" to standard error when the status is an error. The exit code of the
// process: 0, 2 wrong request, 75 try again later, 5 anything else.
int ReportStatus(const std::string& program, const absl::Status& status);

}  // namespace headstart
