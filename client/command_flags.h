// Flags that the client commands share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// --target, TLS files, --timeout, --wait. The values are in `options` once the command line was
// parsed.
void AddConnectionFlags(CLI::App& app, PrefillClientOptions* options);

// A time like 90s or 2m, or a number of seconds; more than nothing.
CLI::Option* AddDurationFlag(CLI::App& app, const std::string& flag, absl::Duration* value,
                             const std::string& help);

struct AttentionFlags {
  std::string preset;  // empty: the server's default
  std::string budget;
  std::optional<uint32_t> num_proxies;
  std::optional<uint32_t> stride;
  std::optional<float> gamma;
  std::optional<uint32_t> floor_tokens;
  std::optional<uint32_t> sink_blocks;
  std::optional<uint32_t> local_blocks;
  std::optional<uint32_t> dense_tail_blocks;
  std::optional<uint32_t> dense_below_tokens;
};

// --gamma and the other single values; --preset too, unless the command has one of its own.
void AddAttentionFlags(CLI::App& app, bool with_preset, AttentionFlags* flags);

// Nothing where no flag was given: the server's default.
std::optional<v1::AttentionOptions> ToAttentionOptions(const AttentionFlags& flags);

// "exact", "paper", "balanced", "fast".
std::string PresetName(v1::AttentionPreset preset);

// Prints "PROGRAM: …" to standard error when the status is an error. The exit code of the
// process: 0, 2 wrong request, 75 try again later, 5 anything else.
int ReportStatus(const std::string& program, const absl::Status& status);

}  // namespace headstart
