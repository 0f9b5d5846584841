#include "engine/model/rope_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr double kMaxTheta = 1e15;
constexpr double kMaxFactor = 1e6;
constexpr double kDefaultTheta = 10000.0;  // Hugging Face's, for llama and qwen alike

// Every field that some rope type of ours reads, and "finetuned", which nothing reads. A field
// beyond these would change the numbers in a way we don't know.
constexpr absl::string_view kKnownFields[] = {"rope_type",
                                              "type",
                                              "rope_theta",
                                              "factor",
                                              "original_max_position_embeddings",
                                              "low_freq_factor",
                                              "high_freq_factor",
                                              "beta_fast",
                                              "beta_slow",
                                              "attention_factor",
                                              "mscale",
                                              "mscale_all_dim",
                                              "truncate",
                                              "partial_rotary_factor",
                                              "finetuned"};

absl::StatusOr<RopeType> ParseType(const JsonFields& rope) {
  HEADSTART_ASSIGN_OR_RETURN(const std::string old_name, rope.StringOr("type", ""));
  HEADSTART_ASSIGN_OR_RETURN(const std::string name, rope.StringOr("rope_type", old_name));
  if (!old_name.empty() && old_name != name) return rope.Error("type", "differs from rope_type");
  for (const RopeType type :
       {RopeType::kDefault, RopeType::kLinear, RopeType::kLlama3, RopeType::kYarn}) {
    if (name == RopeTypeName(type)) return type;
  }
  if (name.empty()) return RopeType::kDefault;
  return rope.Error(rope.Has("rope_type") ? "rope_type" : "type",
                    "is not supported (default, linear, llama3, yarn are)");
}

// 0.1 · mscale · ln(factor) + 1 (YaRN, arXiv 2309.00071, eq. 22, with DeepSeek's mscale).
double YarnScale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

absl::Status ReadYarn(const JsonFields& rope, RopeConfig& out) {
  HEADSTART_ASSIGN_OR_RETURN(out.beta_fast, rope.NumberOr("beta_fast", 32.0, 0.0, 1e6));
  HEADSTART_ASSIGN_OR_RETURN(out.beta_slow, rope.NumberOr("beta_slow", 1.0, 0.0, 1e6));
  if (out.beta_fast == 0.0) out.beta_fast = 32.0;  // 0 means absent there, too
  if (out.beta_slow == 0.0) out.beta_slow = 1.0;
  if (out.beta_fast < out.beta_slow) return rope.Error("beta_fast", "is less than beta_slow");
  HEADSTART_ASSIGN_OR_RETURN(out.truncate, rope.BoolOr("truncate", true));
  HEADSTART_ASSIGN_OR_RETURN(const double mscale, rope.NumberOr("mscale", 0.0, 0.0, 1e3));
  HEADSTART_ASSIGN_OR_RETURN(const double all_dim, rope.NumberOr("mscale_all_dim", 0.0, 0.0, 1e3));
  const double inferred = mscale != 0.0 && all_dim != 0.0
                              ? YarnScale(out.factor, mscale) / YarnScale(out.factor, all_dim)
                              : YarnScale(out.factor, 1.0);
  HEADSTART_ASSIGN_OR_RETURN(out.attention_factor,
                             rope.NumberOr("attention_factor", inferred, 1e-3, 1e3));
  return absl::OkStatus();
}

absl::Status ReadLlama3(const JsonFields& rope, RopeConfig& out) {
  HEADSTART_ASSIGN_OR_RETURN(out.low_freq_factor, rope.Number("low_freq_factor", 1e-3, 1e6));
  HEADSTART_ASSIGN_OR_RETURN(out.high_freq_factor, rope.Number("high_freq_factor", 1e-3, 1e6));
  if (out.high_freq_factor <= out.low_freq_factor) {
    return rope.Error("high_freq_factor", "is not above low_freq_factor");
  }
  return absl::OkStatus();
}

// The context before scaling. Some models have it beside the rope object.
absl::StatusOr<int64_t> ReadOriginalPositions(const JsonFields& config, const JsonFields& rope,
                                              int64_t max_position_embeddings) {
  constexpr absl::string_view kName = "original_max_position_embeddings";
  HEADSTART_ASSIGN_OR_RETURN(
      const int64_t outer, config.IntegerOr(kName, max_position_embeddings, 1, kMaxPositionsLimit));
  HEADSTART_ASSIGN_OR_RETURN(const int64_t inner,
                             rope.IntegerOr(kName, outer, 1, kMaxPositionsLimit));
  if (config.Has(kName) && inner != outer) {
    return rope.Error(kName, absl::StrCat("differs from ", outer, " outside"));
  }
  return inner;
}

// One rope_scaling or rope_parameters object.
absl::StatusOr<RopeConfig> ParseRopeObject(const JsonFields& config, const JsonFields& rope,
                                           double theta, int64_t max_position_embeddings) {
  for (const auto& [name, value] : rope.object().items()) {
    if (std::find(std::begin(kKnownFields), std::end(kKnownFields), name) ==
        std::end(kKnownFields)) {
      return rope.Error(name, "is an unknown field of RoPE");
    }
  }
  HEADSTART_ASSIGN_OR_RETURN(const double rotated, rope.NumberOr("partial_rotary_factor", 1, 0, 1));
  if (rotated != 1.0) return rope.Error("partial_rotary_factor", "is not supported (1 is)");
  RopeConfig out;
  HEADSTART_ASSIGN_OR_RETURN(out.type, ParseType(rope));
  HEADSTART_ASSIGN_OR_RETURN(out.theta, rope.NumberOr("rope_theta", theta, 1.0, kMaxTheta));
  if (out.theta == 1.0) return rope.Error("rope_theta", "must be above 1");
  if (out.type == RopeType::kDefault) return out;
  const bool has_original = out.type == RopeType::kLlama3 || out.type == RopeType::kYarn;
  if (has_original) {
    HEADSTART_ASSIGN_OR_RETURN(out.original_max_positions,
                               ReadOriginalPositions(config, rope, max_position_embeddings));
  }
  if (out.type == RopeType::kYarn && !rope.Has("factor")) {
    out.factor = static_cast<double>(max_position_embeddings) /
                 static_cast<double>(out.original_max_positions);
    if (out.factor < 1.0) return rope.Error("factor", "is missing");
  } else {
    HEADSTART_ASSIGN_OR_RETURN(out.factor, rope.Number("factor", 1.0, kMaxFactor));
  }
  if (out.type == RopeType::kLlama3) HEADSTART_RETURN_IF_ERROR(ReadLlama3(rope, out));
  if (out.type == RopeType::kYarn) HEADSTART_RETURN_IF_ERROR(ReadYarn(rope, out));
  return out;
}

// One of the two spellings, or nothing when it is absent.
absl::StatusOr<std::optional<RopeConfig>> ParseSpelling(const JsonFields& config,
                                                        absl::string_view name, double theta,
                                                        int64_t max_position_embeddings) {
  if (!config.Has(name)) return std::nullopt;
  HEADSTART_ASSIGN_OR_RETURN(const JsonFields rope, config.Object(name));
  HEADSTART_ASSIGN_OR_RETURN(const RopeConfig parsed,
                             ParseRopeObject(config, rope, theta, max_position_embeddings));
  if (config.Has("rope_theta") && parsed.theta != theta) {
    return config.Error("rope_theta", absl::StrCat("differs from ", name, ".rope_theta"));
  }
  return parsed;
}

}  // namespace

absl::string_view RopeTypeName(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
  }
  return "?";
}

absl::StatusOr<RopeConfig> ParseRope(const JsonFields& config, int64_t max_position_embeddings) {
  HEADSTART_ASSIGN_OR_RETURN(const double theta,
                             config.NumberOr("rope_theta", kDefaultTheta, 1.0, kMaxTheta));
  if (theta == 1.0) return config.Error("rope_theta", "must be above 1");
  HEADSTART_ASSIGN_OR_RETURN(const std::optional<RopeConfig> old_spelling,
                             ParseSpelling(config, "rope_scaling", theta, max_position_embeddings));
  HEADSTART_ASSIGN_OR_RETURN(
      const std::optional<RopeConfig> new_spelling,
      ParseSpelling(config, "rope_parameters", theta, max_position_embeddings));
  if (old_spelling && new_spelling && *old_spelling != *new_spelling) {
    return config.Error("rope_scaling", "and rope_parameters say different things");
  }
  if (new_spelling) return *new_spelling;
  if (old_spelling) return *old_spelling;
  RopeConfig plain;
  plain.theta = theta;
  return plain;
}

int64_t RopeRange(const RopeConfig& rope, int64_t max_position_embeddings) {
  double range = static_cast<double>(max_position_embeddings);
  if (rope.type == RopeType::kLinear) range *= rope.factor;
  if (rope.type == RopeType::kYarn) {
    range = static_cast<double>(rope.original_max_positions) * rope.factor;
  }
  return static_cast<int64_t>(std::min(range, static_cast<double>(kMaxPositionsLimit)));
}

}  // namespace headstart
