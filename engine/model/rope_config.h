// RoPE in config.json, in both of its spellings.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/model/json_reader.h"
#include "engine/model/model_config.h"

namespace headstart {

// Longest context that a configuration may describe, in tokens.
inline constexpr int64_t kMaxPositionsLimit = int64_t{1} << 24;

// Reads rope_theta + rope_scaling{rope_type or type, …} (transformers up to 4), or
// rope_parameters{rope_theta, rope_type, …} (from 5 on). Where both are given they must say the
// same. `max_position_embeddings` stands in for an absent original_max_position_embeddings.
absl::StatusOr<RopeConfig> ParseRope(const JsonFields& config, int64_t max_position_embeddings);

// How far the scaled RoPE reaches: linear and yarn stretch the context by their factor.
int64_t RopeRange(const RopeConfig& rope, int64_t max_position_embeddings);

}  // namespace headstart
