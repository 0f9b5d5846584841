// The service level that a server promises: how soon a prompt has its first token, by its length.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/rpc/call_record.h"

namespace headstart {

struct Objective {
  absl::Duration base = absl::Seconds(2);
  absl::Duration per_1k_tokens = absl::Milliseconds(100);  // of 1024

  // Accepted until the first token and all KV that the call ships have left.
  absl::Duration For(int64_t tokens) const;
};

enum class Judgement : uint8_t {
  kNotCounted,  // nobody could have served it, or its client took it back in time
  kMissed,
  kMet,
};

// How a call did. Refused, failed and late ones missed, and those whose client gave up when their
// time was over. Not counted: wrong requests, and those that their client took back before.
Judgement Judge(const CallRecord& record, const absl::Status& status, const Objective& objective);

}  // namespace headstart
