#include "engine/run/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// The first number of SplitMix64 from `seed`, in [0, 1).
double Uniform(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Natural logarithm of the sum of exp(logit).
double LogSumExp(absl::Span<const float> logits, float max_logit) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max_logit);
  return max_logit + std::log(sum);
}

// The ids that may be drawn, most likely first: the top_k, and of them the fewest whose
// probability at `temperature` reaches top_p. weights[i] is the unnormalised probability of ids[i].
struct Candidates {
  std::vector<int32_t> ids;
  std::vector<double> weights;
};

Candidates PickCandidates(absl::Span<const float> logits, const SamplingOptions& options) {
  Candidates out;
  out.ids.resize(logits.size());
  std::iota(out.ids.begin(), out.ids.end(), 0);
  const auto more_likely = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options.top_k > 0 && static_cast<size_t>(options.top_k) < out.ids.size()) {
    std::nth_element(out.ids.begin(), out.ids.begin() + options.top_k - 1, out.ids.end(),
                     more_likely);
    out.ids.resize(static_cast<size_t>(options.top_k));
  }
  std::sort(out.ids.begin(), out.ids.end(), more_likely);
  const double max_logit = logits[out.ids.front()];
  for (const int32_t id : out.ids) {
    out.weights.push_back(std::exp((logits[id] - max_logit) / options.temperature));
  }
  if (options.top_p <= 0.0f) return out;
  const double target =
      options.top_p * std::accumulate(out.weights.begin(), out.weights.end(), 0.0);
  double sum = 0;
  size_t keep = 0;
  while (keep < out.ids.size() && (keep == 0 || sum < target)) sum += out.weights[keep++];
  out.ids.resize(keep);
  out.weights.resize(keep);
  return out;
}

int32_t Draw(const Candidates& candidates, uint64_t seed) {
  const double total = std::accumulate(candidates.weights.begin(), candidates.weights.end(), 0.0);
  double left = Uniform(seed) * total;
  for (size_t i = 0; i < candidates.ids.size(); ++i) {
    left -= candidates.weights[i];
    if (left < 0) return candidates.ids[i];
  }
  return candidates.ids.back();  // rounding
}

}  // namespace

absl::Status ValidateSamplingOptions(const SamplingOptions& options) {
  if (!(options.temperature >= 0.0f && options.temperature <= 100.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.temperature=", options.temperature, " is not in [0, 100]"));
  }
  if (options.top_k < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.top_k=", options.top_k, " is negative"));
  }
  if (!(options.top_p >= 0.0f && options.top_p <= 1.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.top_p=", options.top_p, " is not in [0, 1]"));
  }
  return absl::OkStatus();
}

absl::StatusOr<SampledToken> SampleToken(absl::Span<const float> logits,
                                         const SamplingOptions& options) {
  HEADSTART_CHECK(!logits.empty());
  HEADSTART_RETURN_IF_ERROR(ValidateSamplingOptions(options));
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i])) {
      return NonFiniteError(absl::StrCat("logit ", i, " is not finite"));
    }
  }
  const auto best = std::max_element(logits.begin(), logits.end());
  SampledToken token;
  token.id = options.temperature == 0.0f ? static_cast<int32_t>(best - logits.begin())
                                         : Draw(PickCandidates(logits, options), options.seed);
  token.logprob = static_cast<float>(logits[token.id] - LogSumExp(logits, *best));
  return token;
}

}  // namespace headstart
