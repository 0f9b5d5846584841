#include "engine/schedule/density_curve.h"

#include <algorithm>
#include <cmath>

namespace headstart {
namespace {

constexpr double kWeightOfNew = 0.2;

double LogTokens(int64_t num_tokens) {
  return std::log2(static_cast<double>(std::max<int64_t>(num_tokens, 1)));
}

}  // namespace

void DensityCurve::Learn(int64_t num_tokens, double density) {
  const double log_tokens = LogTokens(num_tokens);
  const size_t octave = std::min(static_cast<size_t>(log_tokens), points_.size() - 1);
  Point& point = points_[octave];
  const double weight = point.known ? kWeightOfNew : 1;
  point.log_tokens += weight * (log_tokens - point.log_tokens);
  point.density += weight * (std::clamp(density, 0.0, 1.0) - point.density);
  point.known = true;
}

std::optional<double> DensityCurve::At(int64_t num_tokens) const {
  const double log_tokens = LogTokens(num_tokens);
  const Point* before = nullptr;
  for (const Point& point : points_) {
    if (!point.known) continue;
    if (point.log_tokens >= log_tokens) {
      if (before == nullptr) return point.density;
      const double share =
          (log_tokens - before->log_tokens) / (point.log_tokens - before->log_tokens);
      return before->density + share * (point.density - before->density);
    }
    before = &point;
  }
  if (before == nullptr) return std::nullopt;
  return before->density;
}

}  // namespace headstart
