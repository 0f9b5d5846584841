// Inverse frequencies of RoPE, operation for operation in fp32 as Hugging Face takes them
// (transformers, modeling_rope_utils.py), so that both rotate alike at far positions.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "engine/model/model_config.h"

namespace headstart {
namespace {

// theta^(2 i / head_dim).
std::vector<float> Wavelengths(const RopeConfig& rope, int32_t head_dim) {
  std::vector<float> out(head_dim / 2);
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    out[i] = static_cast<float>(std::pow(static_cast<double>(static_cast<float>(rope.theta)),
                                         static_cast<double>(exponent)));
  }
  return out;
}

// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
float Llama3Frequency(const RopeConfig& rope, float frequency) {
  const auto positions = static_cast<float>(rope.original_max_positions);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto high = static_cast<float>(rope.high_freq_factor);
  const auto longest = static_cast<float>(rope.original_max_positions / rope.low_freq_factor);
  const auto shortest = static_cast<float>(rope.original_max_positions / rope.high_freq_factor);
  const float wavelength = 1.0f / frequency * static_cast<float>(2.0 * std::numbers::pi);
  if (wavelength > longest) return frequency / factor;
  if (wavelength < shortest) return frequency;
  const float smooth = (1.0f / wavelength * positions - low) / (high - low);
  return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

// The dimension that turns `rotations` times within the original context (YaRN, eq. 17).
double YarnDimension(const RopeConfig& rope, int32_t head_dim, double rotations) {
  return head_dim *
         std::log(static_cast<double>(rope.original_max_positions) /
                  (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

std::vector<float> YarnFrequencies(const RopeConfig& rope, int32_t head_dim) {
  double low = YarnDimension(rope, head_dim, rope.beta_fast);
  double high = YarnDimension(rope, head_dim, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  std::vector<float> out = Wavelengths(rope, head_dim);
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float kept = 1.0f - ramp;
    const float stretched = 1.0f / (static_cast<float>(rope.factor) * out[i]);
    out[i] = stretched * (1.0f - kept) + 1.0f / out[i] * kept;
  }
  return out;
}

}  // namespace

std::vector<float> InverseFrequencies(const RopeConfig& rope, int32_t head_dim) {
  if (rope.type == RopeType::kYarn) return YarnFrequencies(rope, head_dim);
  std::vector<float> out = Wavelengths(rope, head_dim);
  for (float& value : out) {
    value = 1.0f / value;
    if (rope.type == RopeType::kLinear) value /= static_cast<float>(rope.factor);
    if (rope.type == RopeType::kLlama3) value = Llama3Frequency(rope, value);
  }
  return out;
}

}  // namespace headstart
