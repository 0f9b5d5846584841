// What became of one Prefill call: the source of its line in the log and of its metrics.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/prefill_job.h"

namespace headstart {

struct CallRecord {
  std::string peer;
  std::string trace_id;    // of traceparent; empty without one
  std::string request_id;  // empty until one was found good
  bool unknown_model = false;
  bool accepted = false;
  int64_t num_tokens = 0;
  bool below_dense_limit = false;  // ProxyAttn was asked for, the prompt is too short for it

  // From accepted on; absent for what never happened.
  std::optional<absl::Duration> queue;        // until compute began
  std::optional<absl::Duration> first_chunk;  // until the connection had taken it
  std::optional<PrefillResult> result;        // computed to the end
  absl::Duration total;                       // until ended
  int64_t chunks_sent = 0;
  int64_t kv_bytes_sent = 0;
};

// Where the time to first token of an OK call went; adds up to `total`.
struct TimeShares {
  absl::Duration queue;
  absl::Duration selection;
  absl::Duration attention;
  absl::Duration other_compute;
  absl::Duration exposed_transfer;

  absl::Duration compute() const { return selection + attention + other_compute; }
};

// `total`: from accepted to the moment that is asked about. What is neither queue nor compute is
// transfer.
TimeShares ShareTime(absl::Duration queue, const PrefillResult& result, absl::Duration total);

// One line, without prompt tokens.
void LogCall(const CallRecord& record, const absl::Status& status);

}  // namespace headstart
