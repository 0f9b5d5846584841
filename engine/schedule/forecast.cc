#include "engine/schedule/forecast.h"

#include <algorithm>

#include "kernels/base/instant.h"

namespace headstart {

Forecast MakeForecast(const QueuedWork& newcomer, std::vector<QueuedWork> others,
                      absl::Duration busy, bool urgent, double margin, Instant now) {
  std::sort(others.begin(), others.end(),
            [](const QueuedWork& a, const QueuedWork& b) { return a.rank.Before(b.rank); });
  Forecast forecast{.queue = busy, .compute = newcomer.cost};
  absl::Duration done = busy;
  for (const QueuedWork& other : others) {
    done += other.cost;
    if (other.rank.Before(newcomer.rank)) {
      if (!urgent || other.is_short) forecast.queue += other.cost;
      if (other.num_tokens > 0) ++forecast.requests_ahead;
      forecast.tokens_ahead += other.num_tokens;
      continue;
    }
    const bool in_time = now + done <= other.deadline;
    const bool still_in_time = now + (done + newcomer.cost) * margin <= other.deadline;
    if (in_time && !still_in_time) forecast.displaces = true;
  }
  return forecast;
}

}  // namespace headstart
