// Load on a server: closed loop (a fixed number of requests under way) or open loop (Poisson
// arrivals that wait for nobody), and what the samples add up to. Knows no gRPC.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace headstart {

struct LoadOptions {
  int concurrency = 1;         // closed loop: requests under way
  double rate_per_second = 0;  // > 0: open loop
  int max_outstanding =
      1024;  // open loop: beyond it arrivals wait, and their waiting counts as theirs
  int64_t num_requests = 0;                            // 0: as many as the duration holds
  absl::Duration duration = absl::InfiniteDuration();  // no request starts later
  uint64_t seed = 0;                                   // of the arrivals
};

struct LoadSample {
  std::string error;    // its kind; empty: all went well
  std::string message;  // of the error
  absl::Duration ttft;  // from when the request was due
  int64_t prompt_tokens = 0;
  int64_t kv_bytes = 0;
  absl::Duration exposed_transfer;  // what shipping added to the time
  int connections = 1;              // that the KV came on
  double density = 0;
};

struct LoadResult {
  std::vector<LoadSample> samples;  // in order of start
  absl::Duration wall;
};

// Sends request `index` and waits for its answer. No two calls at a time have the same `worker`,
// counted from 0. Fills everything but the waiting time before the call, which RunLoad adds to
// ttft.
using SendRequest = std::function<LoadSample(int64_t index, int worker)>;

// REQUIRES: num_requests or duration is bounded. Returns when the last answer is there.
LoadResult RunLoad(const LoadOptions& options, const SendRequest& send);

// When the requests of an open loop are due, counted from the start: exponential gaps of mean 1 /
// rate.
std::vector<absl::Duration> ArrivalTimes(const LoadOptions& options);

struct LoadSummary {
  struct Errors {
    int64_t count = 0;
    std::string example;  // message of the first
  };
  int64_t ok = 0;
  std::map<std::string, Errors> errors;  // by kind
  double tokens_per_second = 0;
  double kv_gigabytes_per_second = 0;
  double density = 0;                               // mean
  double exposed_transfer_p50 = 0;                  // seconds
  int connections = 0;                              // most of a request
  double ttft_p50 = 0, ttft_p90 = 0, ttft_p99 = 0;  // seconds
};
LoadSummary Summarize(const LoadResult& result);

// Nearest rank: the least value that at least `share` of the values don't exceed. 0 when there are
// none.
double Percentile(std::vector<double> values, double share);

}  // namespace headstart
