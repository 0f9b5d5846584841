// Who comes before whom.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "kernels/base/instant.h"

namespace headstart {

// Of a request at one moment. A higher level goes first, then the earlier latest_start, then who
// came first.
struct Rank {
  int64_t level = 0;  // priority, and one more for every ageing interval since it last ran
  // When it must begin to be done in time; see LatestStart. Never changes, so whoever waits is
  // overtaken by fewer and fewer of those that come later.
  Instant latest_start = Instant::InfiniteFuture();
  uint64_t key = 0;

  bool Before(const Rank& other) const {
    if (level != other.level) return level > other.level;
    if (latest_start != other.latest_start) return latest_start < other.latest_start;
    return key < other.key;
  }
};

// The moment at which a prompt that takes `cost` must begin. It is due at its deadline, and anyhow
// after so many times what it takes that short ones go before long ones, which in turn are due
// some time.
Instant LatestStart(Instant accepted, absl::Duration cost, Instant deadline);

// The level at `now`. Every `ageing` of waiting counts as much as one step of priority. What was
// gained so is spent with one piece: were it kept, a few long prompts that waited would hold up all
// short ones until they are whole.
int64_t LevelAt(int32_t priority, Instant waits_since, absl::Duration ageing, Instant now);

}  // namespace headstart
