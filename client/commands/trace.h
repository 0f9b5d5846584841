// Traces of real load, in the public format of Mooncake (FAST '25): a JSON object a line with
// `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one for each block of
// 512 tokens of the prompt, the last block may be a part. Equal ids stand for equal blocks behind
// equal starts, so the reuse of prefixes is in the trace though no text is.
// Source: github.com/kvcache-ai/Mooncake, FAST25-release/traces.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace headstart {

struct TracePrompt {
  absl::Duration due = absl::ZeroDuration();  // from the first prompt of the trace on
  int64_t num_tokens = 0;
  std::vector<uint64_t> hash_ids;
};

struct TraceOptions {
  int64_t block_tokens = 512;                          // that a hash id stands for
  double speed = 1;                                    // > 1: prompts come faster than they did
  int64_t max_prompts = 0;                             // 0: all
  absl::Duration duration = absl::InfiniteDuration();  // no prompt is due later
  int64_t max_tokens = 0;  // of a prompt, what the server takes; 0: anything
  bool skip_long = false;  // leave out longer ones, instead of cutting them
};

struct Trace {
  int64_t block_tokens = 512;
  std::vector<TracePrompt> prompts;  // in the order in which they are due; not empty
  int64_t num_cut = 0;               // prompts that were too long
  int64_t num_skipped = 0;
};

// INVALID_ARGUMENT names the line that is none, or says that no prompt is left. `hash_ids` may be
// missing or too short: tokens behind them belong to the prompt alone. Empty lines and unknown
// fields mean nothing.
absl::StatusOr<Trace> ParseTrace(std::istream& in, const TraceOptions& options);
// Of a file. NOT_FOUND when it can't be opened; errors name it.
absl::StatusOr<Trace> ReadTrace(const std::string& path, const TraceOptions& options);

// The tokens of a prompt: those of a block are a function of its hash id and the vocabulary alone,
// those without an id of `seed`.
std::vector<uint32_t> TraceTokens(const TracePrompt& prompt, int64_t block_tokens,
                                  uint32_t vocab_size, uint64_t seed);

// A name for every whole block of the prompt, that stands for all tokens up to its end.
std::vector<uint64_t> PrefixNames(const TracePrompt& prompt, int64_t block_tokens);

// What a decode node holds: prefixes by the names of their blocks. Thread-safe.
class HeldPrefixes {
 public:
  void Add(const std::vector<uint64_t>& names);
  // How many of the first names are held.
  int64_t CountHeld(const std::vector<uint64_t>& names) const;

 private:
  mutable absl::Mutex mutex_;
  absl::flat_hash_set<uint64_t> held_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
