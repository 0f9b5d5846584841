#include "engine/schedule/rank.h"

#include <algorithm>

namespace headstart {
namespace {

// A prompt is due after kStretch times what it takes alone, and some time that is small for anyone.
constexpr int64_t kStretch = 8;
constexpr absl::Duration kGrace = absl::Milliseconds(250);

}  // namespace

absl::Time LatestStart(absl::Time accepted, absl::Duration cost, absl::Time deadline) {
  return std::min(deadline, accepted + kGrace + kStretch * cost) - cost;
}

int64_t LevelAt(int32_t priority, absl::Time accepted, absl::Duration ageing, absl::Time now) {
  absl::Duration rest;
  return priority + absl::IDivDuration(now - accepted, ageing, &rest);
}

}  // namespace headstart
