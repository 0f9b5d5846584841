// How long steps take, learned from those that ran.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/schedule/density_curve.h"
#include "kernels/attention_params.h"

namespace headstart {

struct PieceShape {
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  const ProxyAttnOptions* attention = nullptr;  // null: dense
};

// A step takes a time for itself, for each token, for each pair of a query and a key that attention
// executes, and for each causal pair that a sparse piece selects from:
//
//   seconds = coefficients . [1, tokens, executed pairs, pairs selected from]
//
// The coefficients, none below 0, have the least squared relative error over the last steps, older
// ones counting less. What these steps don't tell apart stays as it was, in the beginning as in
// models of usual size, so constant traffic unlearns nothing about other lengths. A machine that
// gets slower or faster as a whole shows in errors to one side: then all that is known is
// stretched. Not thread-safe.
class CostModel {
 public:
  // What a step of these pieces took. A step that computed no token, and one with a sparse piece
  // before any density is known, teach nothing.
  void Learn(absl::Span<const PieceShape> pieces, absl::Duration took);
  // Executed / causal blocks of a prompt that ended.
  void LearnDensity(const ProxyAttnOptions& attention, int64_t num_tokens, double density);

  // None before kMinSteps steps were learned. `share`: of what a step takes for itself, where other
  // pieces run in it too.
  std::optional<absl::Duration> Predict(absl::Span<const PieceShape> pieces,
                                        double share = 1) const;
  // Expected density of a prompt: that of prompts with the same options, else of sparse prompts; 1
  // before anything is known.
  double Density(const ProxyAttnOptions& attention, int64_t num_tokens) const;
  // Of the last steps together; none before kMinSteps.
  std::optional<double> TokensPerSecond() const;

  // How far off a prediction was.
  void LearnError(absl::Duration predicted, absl::Duration actual);
  // The factor, in [1.05, 2], by which a prediction should be stretched to hold nearly always.
  double Margin() const;

  static constexpr int64_t kMinSteps = 4;

 private:
  static constexpr int kNumFeatures = 4;
  using Features = std::array<double, kNumFeatures>;

  // None: the density of a piece is not known at all.
  std::optional<double> KnownDensity(const ProxyAttnOptions& attention, int64_t num_tokens) const;
  Features FeaturesOf(absl::Span<const PieceShape> pieces) const;
  bool KnowsDensities(absl::Span<const PieceShape> pieces) const;
  // Follows a machine whose speed changes: errors to one side stretch what was learned.
  void FollowSpeed(double ratio);
  // As if every step so far had taken `factor` times its time.
  void Stretch(double factor);
  // `weight_seconds`: what the step's error is measured by.
  void AddSample(const Features& features, double seconds, double weight_seconds);
  void Solve();

  int64_t num_steps_ = 0;
  Features coefficients_{};
  // Normal equations of the decayed steps.
  std::array<Features, kNumFeatures> squares_{};
  Features targets_{};
  double trend_ = 0;  // mean logarithm of actual / predicted lately

  // Of the last steps.
  double recent_tokens_ = 0;
  double recent_seconds_ = 0;
  double recent_usual_ = 0;  // their times in models of usual size, in tokens

  double mean_error_ = 0.2;  // relative; before anything is known a guess

  // By options, the ones learned last at the end; those of all sparse prompts.
  std::vector<std::pair<ProxyAttnOptions, DensityCurve>> densities_;
  DensityCurve any_density_;
};

}  // namespace headstart
