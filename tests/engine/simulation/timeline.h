// Simulated time: events in the order of their times, those of one time in the order in which they
// were made. One thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/time/time.h"
#include "kernels/base/instant.h"

namespace headstart::simulation {

class Timeline {
 public:
  using Event = std::function<void()>;

  // `after_event` is called after every event.
  explicit Timeline(Event after_event) : after_event_(std::move(after_event)) {}

  Instant now() const { return now_; }

  void At(Instant time, Event event) {
    events_.emplace(std::pair(std::max(time, now_), ++last_), std::move(event));
  }
  void After(absl::Duration delay, Event event) { At(now_ + delay, std::move(event)); }

  // False when nothing is left to happen.
  bool RunNext() {
    if (events_.empty()) return false;
    auto first = events_.extract(events_.begin());
    now_ = first.key().first;
    first.mapped()();
    after_event_();
    return true;
  }

  // Lets everything happen that comes before `time`; then it is `time`.
  void RunUntil(Instant time) {
    while (!events_.empty() && events_.begin()->first.first < time) RunNext();
    now_ = time;
  }

  // Nothing happens any more.
  void Stop() { events_.clear(); }

 private:
  const Event after_event_;
  Instant now_ = Instant();
  uint64_t last_ = 0;
  std::map<std::pair<Instant, uint64_t>, Event> events_;
};

}  // namespace headstart::simulation
