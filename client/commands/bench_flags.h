// The flags of `headstart bench`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/time/time.h"
#include "client/commands/load.h"
#include "client/commands/prompt_sender.h"
#include "client/commands/trace.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

inline constexpr int64_t kMaxBenchTokens = 1 << 24;  // of a prompt

struct BenchOptions {
  SenderOptions sender;
  v1::PrefillRequest request;                   // with the attention and the KV type asked for
  std::optional<v1::PrefixReuse> prefix_reuse;  // default: the same attention's, of text none
  std::vector<std::string> lengths = {"1024"};
  std::vector<std::string> presets = {"default"};
  std::vector<std::string> priorities = {"0"};
  std::string tokens_file;
  std::string trace_file;
  TraceOptions trace;
  bool replay_times = true;  // of the trace; else a closed loop
  bool client_keeps_kv = false;
  LoadOptions load;
  int64_t warmup = 1;
  absl::Duration slo_ttft = absl::InfiniteDuration();
  bool json = false;
  std::string records_file;
  std::string plot_file;
};

// The values are in `options` once the command line was parsed.
void AddBenchFlags(CLI::App& command, BenchOptions* options);

}  // namespace headstart
