// How much longer prompts take than what was ahead of them says.
#pragma once

#include <array>
#include <cstdint>

#include "absl/time/time.h"

namespace headstart {

// Requests that come later may go first, the more of them the longer a prompt and the higher the
// load. That can't be foreseen one by one, but as a mean of what happened lately to prompts of like
// size.
class Interruptions {
 public:
  // `foreseen`: from accepted to computed, by those who were ahead and its own work.
  void Learn(int64_t num_tokens, absl::Duration foreseen, absl::Duration actual);
  // Actual over foreseen time, expected; 1 where nothing is known.
  double Factor(int64_t num_tokens) const;

 private:
  // Logarithm of the ratio, a decayed mean, by powers of two of the prompt's length.
  std::array<double, 32> log_ratios_{};
};

}  // namespace headstart
