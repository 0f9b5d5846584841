// The same numbers from the same seed, whatever the standard library.
#pragma once

#include <cstdint>
#include <random>

#include "absl/time/time.h"

namespace headstart::simulation {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // From [low, high].
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  absl::Duration Between(absl::Duration low, absl::Duration high) {
    return absl::Microseconds(
        Between(absl::ToInt64Microseconds(low), absl::ToInt64Microseconds(high)));
  }
  bool Percent(int64_t percent) { return Between(1, 100) <= percent; }

 private:
  std::mt19937_64 engine_;
};

}  // namespace headstart::simulation
