// What config.json of a Hugging Face model directory says, for every model that Headstart runs. One
// struct for Llama and Qwen: what differs between them is a field, not a class.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/model/model_file.h"
#include "kernels/attention_params.h"

namespace headstart {

enum class RopeType : uint8_t { kDefault, kLinear, kLlama3, kYarn };

struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  int64_t original_max_positions = 0;  // llama3, yarn
  double low_freq_factor = 1.0;        // llama3
  double high_freq_factor = 4.0;       // llama3
  double beta_fast = 32.0;             // yarn
  double beta_slow = 1.0;              // yarn
  bool truncate = true;                // yarn: whole dimensions as borders of the ramp
  double attention_factor =
      1.0;  // yarn; resolved at parse time (mscale included), 1 for the others

  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

struct ModelConfig {
  std::string architecture;  // model_type: "llama", "qwen2", "qwen3"
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  HeadShape heads;
  int32_t intermediate_size = 0;
  int32_t vocab_size = 0;
  int64_t max_positions = 0;  // longest context that is served: where plain RoPE of this model ends
  float rms_norm_eps = 0.0f;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  DType dtype = DType::kBF16;  // of the weights, as the config says
  RopeConfig rope;
  std::vector<int32_t> eos_token_ids;

  // K and V of one token in all layers.
  int64_t KvBytesPerToken(DType kv_dtype) const {
    return int64_t{2} * num_layers * heads.num_kv_heads * heads.head_dim * DTypeBytes(kv_dtype);
  }
};

// Parses the text of a config.json. `file` is only for messages. Everything that Headstart can't
// run exactly is refused with INVALID_ARGUMENT and the field's name: mixture of experts, MLA,
// quantised weights, an active sliding window, unknown rope types, two rope spellings that differ.
// Depth, size and number ranges are bounded: hostile text ends in an error, quickly and in little
// memory.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json, absl::string_view file);

// Reads DIR/config.json. Where DIR/generation_config.json has eos ids they replace those of
// config.json, as in Hugging Face. A folder with an adapter (adapter_config.json), which Hugging
// Face would add to the weights, is refused.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir,
                                            Links links = Links::kInside);

// inv_freq[head_dim / 2] after rope scaling, in fp32 as Hugging Face computes it.
std::vector<float> InverseFrequencies(const RopeConfig& rope, int32_t head_dim);

absl::string_view RopeTypeName(RopeType type);

}  // namespace headstart
