#include "engine/schedule/cost_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace headstart {
namespace {

// What a step counts after the next one.
constexpr double kDecay = 0.99;
constexpr double kRecentDecay = 0.95;
constexpr double kErrorDecay = 0.95;
constexpr double kErrorsPerMargin = 3;
// A step that is further off than this factor is not what the model knows.
constexpr double kOutlier = 2;
// The machine's speed has changed when the mean of the last logarithms of actual / predicted is
// beyond kTrend; then this share of it is taken back with every step.
constexpr double kTrendDecay = 0.9;
constexpr double kTrend = 0.1;
constexpr double kTrendShare = 0.2;
// Coefficients in models of usual size on usual machines, in tokens: a step costs as much as 50
// tokens, and attention to 25 000 tokens as much as the rest of the model.
constexpr std::array<double, 4> kUsual = {50, 1, 1.0 / 25000, 1.0 / 500000};
// How strongly a coefficient stays where it was, in steps.
constexpr double kInertia = 0.01;
constexpr int kMaxSweeps = 100;
constexpr size_t kMaxOptions = 16;

double Dot(const std::array<double, 4>& a, const std::array<double, 4>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace

// ---- density

std::optional<double> CostModel::KnownDensity(const ProxyAttnOptions& attention,
                                              int64_t num_tokens) const {
  if (!attention.enabled || num_tokens <= attention.dense_below_tokens) return 1;
  for (const auto& [options, curve] : densities_) {
    if (options == attention) return curve.At(num_tokens);
  }
  return any_density_.At(num_tokens);
}

double CostModel::Density(const ProxyAttnOptions& attention, int64_t num_tokens) const {
  return KnownDensity(attention, num_tokens).value_or(1);
}

void CostModel::LearnDensity(const ProxyAttnOptions& attention, int64_t num_tokens,
                             double density) {
  if (!attention.enabled || num_tokens <= attention.dense_below_tokens) return;
  any_density_.Learn(num_tokens, density);
  auto known = std::find_if(densities_.begin(), densities_.end(),
                            [&](const auto& entry) { return entry.first == attention; });
  if (known == densities_.end()) {
    if (densities_.size() == kMaxOptions) densities_.erase(densities_.begin());
    known = densities_.emplace(densities_.end(), attention, DensityCurve());
  }
  known->second.Learn(num_tokens, density);
  std::rotate(known, known + 1, densities_.end());
}

// ---- time

CostModel::Features CostModel::FeaturesOf(absl::Span<const PieceShape> pieces) const {
  Features sum = {1, 0, 0, 0};
  for (const PieceShape& piece : pieces) {
    const auto tokens = static_cast<double>(piece.num_tokens);
    const double pairs = tokens * (static_cast<double>(piece.first_position) + tokens / 2);
    const int64_t end = piece.first_position + piece.num_tokens;
    const bool selects = piece.attention != nullptr && piece.attention->enabled &&
                         end > piece.attention->dense_below_tokens;
    sum[1] += tokens;
    sum[2] += pairs * (selects ? Density(*piece.attention, end) : 1);
    if (selects) sum[3] += pairs;
  }
  return sum;
}

bool CostModel::KnowsDensities(absl::Span<const PieceShape> pieces) const {
  return std::all_of(pieces.begin(), pieces.end(), [this](const PieceShape& piece) {
    return piece.attention == nullptr ||
           KnownDensity(*piece.attention, piece.first_position + piece.num_tokens).has_value();
  });
}

std::optional<absl::Duration> CostModel::Predict(absl::Span<const PieceShape> pieces,
                                                 double share) const {
  if (num_steps_ < kMinSteps) return std::nullopt;
  Features features = FeaturesOf(pieces);
  features[0] *= share;
  return absl::Seconds(Dot(coefficients_, features));
}

void CostModel::Learn(absl::Span<const PieceShape> pieces, absl::Duration took) {
  const Features features = FeaturesOf(pieces);
  double seconds = absl::ToDoubleSeconds(took);
  if (features[1] <= 0 || seconds <= 0 || !KnowsDensities(pieces)) return;
  recent_tokens_ = kRecentDecay * recent_tokens_ + features[1];
  recent_seconds_ = kRecentDecay * recent_seconds_ + seconds;
  recent_usual_ = kRecentDecay * recent_usual_ + Dot(kUsual, features);
  double weight_seconds = seconds;
  if (num_steps_ >= kMinSteps) {
    FollowSpeed(seconds / Dot(coefficients_, features));
    // Measured by the prediction errors have no bias; measured by the step's own time one that took
    // far too long counts little, unless nothing else is known about its shape.
    const double predicted = Dot(coefficients_, features);
    weight_seconds = seconds > kOutlier * predicted ? seconds : predicted;
    seconds = std::max(seconds, predicted / kOutlier);
  } else if (num_steps_ == 0) {
    for (int i = 0; i < kNumFeatures; ++i) {
      coefficients_[i] = kUsual[i] * seconds / recent_usual_;
    }
  }
  AddSample(features, seconds, weight_seconds);
  Solve();
  ++num_steps_;
}

void CostModel::FollowSpeed(double ratio) {
  const double change = std::log(std::clamp(ratio, 1 / kOutlier, kOutlier));
  trend_ = kTrendDecay * trend_ + (1 - kTrendDecay) * change;
  if (std::abs(trend_) < kTrend) return;
  Stretch(std::exp(kTrendShare * trend_));
  trend_ -= kTrendShare * trend_;
}

void CostModel::Stretch(double factor) {
  for (int i = 0; i < kNumFeatures; ++i) {
    coefficients_[i] *= factor;
    targets_[i] /= factor;
    for (double& square : squares_[i]) square /= factor * factor;
  }
}

void CostModel::AddSample(const Features& features, double seconds, double weight_seconds) {
  for (int i = 0; i < kNumFeatures; ++i) {
    const double weighted = features[i] / (weight_seconds * weight_seconds);
    targets_[i] = kDecay * targets_[i] + weighted * seconds;
    for (int j = 0; j < kNumFeatures; ++j) {
      squares_[i][j] = kDecay * squares_[i][j] + weighted * features[j];
    }
  }
}

// Coordinate descent: each coefficient at its best while the others stay, until none moves.
void CostModel::Solve() {
  const Features before = coefficients_;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    double moved = 0;
    for (int i = 0; i < kNumFeatures; ++i) {
      const double usual = kUsual[i] * recent_seconds_ / recent_usual_;
      const double inertia = kInertia / (usual * usual);
      double rest = targets_[i] + inertia * before[i];
      for (int j = 0; j < kNumFeatures; ++j) {
        if (j != i) rest -= squares_[i][j] * coefficients_[j];
      }
      const double best = std::max(0.0, rest / (squares_[i][i] + inertia));
      moved = std::max(moved, std::abs(best - coefficients_[i]) / usual);
      coefficients_[i] = best;
    }
    if (moved < 1e-4) return;
  }
}

std::optional<double> CostModel::TokensPerSecond() const {
  if (num_steps_ < kMinSteps) return std::nullopt;
  return recent_tokens_ / recent_seconds_;
}

// ---- error

void CostModel::LearnError(absl::Duration predicted, absl::Duration actual) {
  if (predicted <= absl::ZeroDuration() || actual <= absl::ZeroDuration()) return;
  const double error = std::min(std::abs(absl::FDivDuration(actual, predicted) - 1), 1.0);
  mean_error_ = kErrorDecay * mean_error_ + (1 - kErrorDecay) * error;
}

double CostModel::Margin() const {
  return std::clamp(1 + kErrorsPerMargin * mean_error_, 1.05, 2.0);
}

}  // namespace headstart
