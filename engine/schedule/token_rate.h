// How fast the machine is, from what ran.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "absl/time/time.h"

namespace headstart {

// How fast prompts have been computed lately.
class TokenRate {
 public:
  void Add(int64_t tokens, absl::Duration compute);
  // Tokens per second of the fastest of the last runs; none before kMinRuns have ended.
  std::optional<double> Best() const;

  static constexpr int64_t kMinRuns = 3;

 private:
  std::array<double, 16> recent_{};
  int64_t num_runs_ = 0;
};

}  // namespace headstart
