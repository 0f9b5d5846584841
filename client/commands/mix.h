// Values with weights: what a load draws lengths and priorities from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace headstart {

// Spreads two numbers over 64 bits, the same with every library: seeds of streams that have nothing
// to do with each other. The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t MixSeeds(uint64_t a, uint64_t b);

class Mix {
 public:
  struct Part {
    int64_t value = 0;
    double weight = 1;
  };

  // One word for each value: "512", or "512:4" with a weight. INVALID_ARGUMENT: no word, a value
  // outside [least, most], a weight that is not a positive number.
  static absl::StatusOr<Mix> Parse(const std::vector<std::string>& words, int64_t least,
                                   int64_t most);
  static Mix Of(int64_t value) { return Mix({{.value = value}}, /*weighted=*/false); }

  // Some word had a weight.
  bool weighted() const { return weighted_; }
  const std::vector<Part>& parts() const { return parts_; }
  int64_t largest() const;

  // The value for a number that was evenly drawn from all of 64 bits.
  int64_t Draw(uint64_t random) const;

 private:
  Mix(std::vector<Part> parts, bool weighted) : parts_(std::move(parts)), weighted_(weighted) {}

  std::vector<Part> parts_;  // not empty
  bool weighted_;
};

}  // namespace headstart
