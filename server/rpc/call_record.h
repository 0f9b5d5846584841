// What became of a call that ships KV: the source of its line in the log and of its metrics.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/ship/kv_part.h"
#include "kernels/base/instant.h"
#include "server/ops/trace_context.h"

namespace headstart {

// What a stream has carried.
struct SendRecord {
  // Of these the client's connection has taken:
  int64_t chunks = 0;
  int64_t kv_bytes = 0;
  int64_t kv_bytes_before_computed = 0;
  Instant first_chunk_at = Instant::InfinitePast();
  Instant last_chunk_at = Instant::InfinitePast();
  std::shared_ptr<const PrefillResult>
      result;  // once computed to the end, and nothing else to send
};

// One Prefill call.
struct CallRecord {
  std::string peer;
  CallTrace trace;
  Instant came_at = Instant::InfinitePast();
  Instant ended_at = Instant::InfinitePast();
  std::string request_id;  // empty until one was found good
  bool unknown_model = false;
  bool accepted = false;
  bool detached = false;
  int64_t num_tokens = 0;
  bool below_dense_limit = false;  // ProxyAttn was asked for, the prompt is too short for it

  // From here on for what was accepted.
  Instant accepted_at = Instant::InfinitePast();
  std::optional<absl::Duration> queue;  // until compute began, if it did
  SendRecord sent;

  absl::Duration total() const { return ended_at - accepted_at; }
};

// One FetchKv call.
struct FetchRecord {
  std::string peer;
  CallTrace trace;
  Instant came_at = Instant::InfinitePast();
  Instant ended_at = Instant::InfinitePast();
  bool opened = false;  // the KV is there; from here on for what was opened
  Instant opened_at = Instant::InfinitePast();
  KvPart part;
  int64_t from_chunk = 0;
  SendRecord sent;
};

// Where the time of a computed prompt went; adds up to the time from accepted to the moment that is
// asked about.
struct TimeShares {
  absl::Duration queue;
  absl::Duration selection;
  absl::Duration attention;
  absl::Duration other_compute;
  absl::Duration gave_way;          // between begin and end of compute: others ran
  absl::Duration exposed_transfer;  // what is none of these

  absl::Duration compute() const { return selection + attention + other_compute; }
};

// Executed share of the causal attention blocks; 1 where there are none.
double DensityOf(const PrefillResult& result);

TimeShares ShareTime(const PrefillResult& result, Instant now);

// How long the stream's KV went on to leave when it was the only thing to wait for: from the end of
// compute, or from `opened_at` if that was later, to the last chunk.
absl::Duration ExposedTransfer(const SendRecord& sent, Instant opened_at);

// One line each, without prompt tokens.
void LogCall(const CallRecord& record, const absl::Status& status);
void LogFetch(const FetchRecord& record, const absl::Status& status);

}  // namespace headstart
