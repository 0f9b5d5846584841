#include "engine/schedule/rank.h"

#include <algorithm>

#include "kernels/base/instant.h"

namespace headstart {
namespace {

// A prompt is due after kStretch times what it takes alone, and some time that is small for anyone.
// At 0.9 of a machine's capacity long prompts often take 8 times as long as alone: were they due
// then, short ones would stand behind them for seconds, and long ones would not be done sooner.
constexpr int64_t kStretch = 32;
constexpr absl::Duration kGrace = absl::Milliseconds(250);

}  // namespace

Instant LatestStart(Instant accepted, absl::Duration cost, Instant deadline) {
  return std::min(deadline, accepted + kGrace + kStretch * cost) - cost;
}

int64_t LevelAt(int32_t priority, Instant waits_since, absl::Duration ageing, Instant now) {
  absl::Duration rest;
  const absl::Duration waited = std::max(now - waits_since, absl::ZeroDuration());
  return priority + absl::IDivDuration(waited, ageing, &rest);
}

}  // namespace headstart
