// Load on a server: closed loop (a fixed number of requests under way) or open loop (arrivals that
// wait for nobody). Knows no gRPC.
//
// An open loop is honest about its own slowness: whatever counts, counts from when a request was
// planned, not from when it could be sent (no coordinated omission).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "kernels/base/instant.h"

namespace headstart {

struct LoadOptions {
  int concurrency = 1;         // closed loop: requests under way
  double rate_per_second = 0;  // > 0: open loop, Poisson
  // Open loop, when requests are due, counted from the start, in order. Empty: Poisson.
  std::vector<absl::Duration> arrivals = {};
  // Open loop: beyond it arrivals wait, and their waiting counts as theirs.
  int max_outstanding = 1024;
  int64_t num_requests = 0;                            // 0: as many as the duration holds
  absl::Duration duration = absl::InfiniteDuration();  // no request starts later
  uint64_t seed = 0;                                   // of Poisson arrivals

  bool open_loop() const { return rate_per_second > 0 || !arrivals.empty(); }
};

// One request, as it was seen. Times that did not come are InfinitePast.
struct LoadSample {
  Instant planned = Instant::InfinitePast();  // closed loop: as sent
  Instant sent = Instant::InfinitePast();
  Instant accepted = Instant::InfinitePast();
  Instant began = Instant::InfinitePast();  // computing, as the client saw it
  Instant first_token = Instant::InfinitePast();
  Instant all_kv = Instant::InfinitePast();  // and the first token
  Instant ended = Instant::InfinitePast();   // well or not

  std::string error;     // its kind; empty: all went well
  std::string message;   // of the error
  bool refused = false;  // the error is the server's word, before it accepted

  int32_t priority = 0;
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;   // that the server had
  int64_t skipped_tokens = 0;  // that the client had
  int64_t kv_bytes = 0;
  std::optional<absl::Duration> predicted_ttft;  // from `accepted` on
  absl::Duration exposed_transfer;               // what shipping added to the time
  int connections = 1;                           // that the KV came on
  double density = 0;

  bool ok() const { return error.empty(); }
  bool was_accepted() const { return accepted != Instant::InfinitePast(); }
  absl::Duration ttft() const { return first_token - planned; }
  absl::Duration time_to_all_kv() const { return all_kv - planned; }
  absl::Duration lateness() const { return sent - planned; }
};

struct LoadResult {
  std::vector<LoadSample> samples;  // in order of start
  Instant start;
  absl::Duration wall;
};

// Sends a request that is ready, waits for its end, and fills the sample, whose `planned` and
// `sent` are set.
using SendRequest = std::function<void(LoadSample*)>;
// Makes request `index` ready, before it is due. No two calls at a time, nor what they returned,
// have the same `worker`, counted from 0.
using PrepareRequest = std::function<SendRequest(int64_t index, int worker)>;

// REQUIRES: num_requests, arrivals or duration is bounded. Returns when the last answer is there.
LoadResult RunLoad(const LoadOptions& options, const PrepareRequest& prepare);

// When the requests of an open loop are due, counted from the start: `arrivals`, or exponential
// gaps of mean 1 / rate.
std::vector<absl::Duration> ArrivalTimes(const LoadOptions& options);

}  // namespace headstart
