// What requests are doing, for whoever looks.
#include "engine/schedule/scheduler.h"

namespace headstart {

std::vector<RequestView> Scheduler::Requests(size_t limit) const {
  const auto state_of = [](const Entry& entry) {
    if (entry.queued) return RequestState::kWaiting;
    if (entry.in_step) return RequestState::kComputing;
    if (!entry.computed) return RequestState::kPaused;
    return entry.detached() ? RequestState::kKept : RequestState::kShipping;
  };
  std::vector<RequestView> views;
  for (const auto& [key, entry] : entries_) {
    if (views.size() == limit) break;
    if (entry->ended) continue;
    views.push_back({.request_id = entry->request.request_id,
                     .num_tokens = entry->request.num_tokens(),
                     .priority = entry->request.priority,
                     .position = PositionBehindStep(*entry),
                     .accepted_at = entry->result.accepted_at,
                     .state = state_of(*entry)});
  }
  return views;
}

}  // namespace headstart
