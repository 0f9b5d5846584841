#include "engine/schedule/interruptions.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace headstart {
namespace {

constexpr double kRatioDecay = 0.9;
constexpr double kLeastRatio = 0.7, kMostRatio = 3;  // of one ratio that is believed

size_t SizeClass(int64_t num_tokens) {
  return std::min<size_t>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_tokens, 1))),
                          31);
}

}  // namespace

void Interruptions::Learn(int64_t num_tokens, absl::Duration foreseen, absl::Duration actual) {
  if (foreseen <= absl::ZeroDuration()) return;
  const double ratio = std::clamp(absl::FDivDuration(actual, foreseen), kLeastRatio, kMostRatio);
  double& mean = log_ratios_[SizeClass(num_tokens)];
  mean = kRatioDecay * mean + (1 - kRatioDecay) * std::log(ratio);
}

double Interruptions::Factor(int64_t num_tokens) const {
  return std::exp(log_ratios_[SizeClass(num_tokens)]);
}

}  // namespace headstart
