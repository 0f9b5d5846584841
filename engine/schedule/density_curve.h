// Which share of the causal blocks prompts executed, by length.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace headstart {

class DensityCurve {
 public:
  // density: executed / causal blocks, in (0, 1]; of a prompt of num_tokens >= 1.
  void Learn(int64_t num_tokens, double density);
  // Between the lengths that were learned in a straight line over the logarithm; beyond them as at
  // the nearest. None when nothing was learned.
  std::optional<double> At(int64_t num_tokens) const;

 private:
  // A point for each power of two, at the lengths that were seen around it lately.
  struct Point {
    bool known = false;
    double log_tokens = 0;
    double density = 0;
  };
  std::array<Point, 32> points_{};
};

}  // namespace headstart
