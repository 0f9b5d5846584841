// What the samples of a load add up to.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/commands/load.h"

namespace headstart {

// Nearest rank: the least value that at least `share` of the values don't exceed. 0 when there are
// none.
double Percentile(std::vector<double> values, double share);

struct Percentiles {
  int64_t count = 0;
  double p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;  // 0 when there are no values
};
Percentiles PercentilesOf(std::vector<double> values);

// Prompts of a range of lengths.
struct LengthClass {
  const char* name;
  int64_t most_tokens;
};
// In order; the last one takes all that are longer than the others.
const std::vector<LengthClass>& LengthClasses();
// Index of the class of a length.
size_t ClassOf(int64_t prompt_tokens);

struct ClassSummary {
  int64_t prompts = 0;
  int64_t accepted = 0;
  int64_t ok = 0;
  int64_t within_slo = 0;  // TTFT; of those that went well
  Percentiles ttft;        // seconds, from when a prompt was planned
  Percentiles all_kv;      // the same, until all KV was there
};

// Prompts that ended with the same error.
struct ErrorSummary {
  int64_t count = 0;
  int64_t refused = 0;  // by the server, before it accepted
  std::string example;  // message of the first
  Percentiles time;     // seconds, from when a prompt was planned
};

// Sends later than this are counted.
inline constexpr absl::Duration kLate = absl::Milliseconds(1);

struct LoadSummary {
  ClassSummary all;
  std::vector<ClassSummary> classes;           // as LengthClasses
  std::map<std::string, ErrorSummary> errors;  // by kind
  int64_t refused = 0;
  int64_t failed = 0;        // ended badly otherwise
  Percentiles refusal_time;  // seconds, from when a prompt was planned
  int64_t late = 0;
  double max_lateness = 0;  // seconds

  // Of what went well.
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t skipped_tokens = 0;
  double tokens_per_second = 0;
  double requests_per_second = 0;
  double kv_gigabytes_per_second = 0;
  double kv_bytes_per_prompt = 0;   // mean, as sent
  double density = 0;               // mean
  double exposed_transfer_p50 = 0;  // seconds
  int connections = 0;              // most of a request

  // |predicted - seen| / seen of the TTFT that the server predicted, from when it accepted on;
  // count: how many it predicted.
  Percentiles prediction_error;

  double prefix_hit_rate() const {
    return prompt_tokens == 0
               ? 0.0
               : static_cast<double>(cached_tokens) / static_cast<double>(prompt_tokens);
  }
};

// InfiniteDuration: every TTFT is within.
LoadSummary Summarize(const LoadResult& result, absl::Duration slo_ttft = absl::InfiniteDuration());

}  // namespace headstart
