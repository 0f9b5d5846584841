// Where a request would stand among those that wait, and what that means for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "engine/schedule/rank.h"
#include "kernels/base/instant.h"

namespace headstart {

// Of a request that is not computed yet, pieces of one rank.
struct QueuedWork {
  Rank rank;
  int64_t num_tokens = 0;  // of the whole prompt; 0: it has other pieces before these
  absl::Duration cost;     // without the step that runs
  Instant deadline = Instant::InfiniteFuture();
  bool is_short = false;  // runs between two layers of a step
};

struct Forecast {
  absl::Duration queue;    // until it has the machine
  absl::Duration compute;  // its own
  int64_t requests_ahead = 0;
  int64_t tokens_ahead = 0;
  // Another one, that can meet its deadline, might not behind this one.
  bool displaces = false;

  absl::Duration ttft() const { return queue + compute; }
};

// `busy`: until the machine is free for it, whoever comes next; `urgent`: that is between two
// layers of a step, where only short ones run before it. Times behind the newcomer are stretched by
// `margin` where they are held against the deadline of another one.
Forecast MakeForecast(const QueuedWork& newcomer, std::vector<QueuedWork> others,
                      absl::Duration busy, bool urgent, double margin, Instant now);

}  // namespace headstart
