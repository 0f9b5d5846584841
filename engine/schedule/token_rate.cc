#include "engine/schedule/token_rate.h"

#include <algorithm>

namespace headstart {

void TokenRate::Add(int64_t tokens, absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  recent_[num_runs_ % recent_.size()] =
      static_cast<double>(tokens) / absl::ToDoubleSeconds(compute);
  ++num_runs_;
}

std::optional<double> TokenRate::Best() const {
  if (num_runs_ < kMinRuns) return std::nullopt;
  return *std::max_element(recent_.begin(), recent_.end());
}

}  // namespace headstart
