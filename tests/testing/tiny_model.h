// Small models with random weights, written as Hugging Face directories: the models of every test
// that needs one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/base/dtype.h"

namespace headstart::testing {

struct TestTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

using TensorMap = std::map<std::string, TestTensor>;

// How config.json spells RoPE and the dtype: rope_theta + rope_scaling + torch_dtype, or
// rope_parameters + dtype (transformers 5).
enum class ConfigSpelling : uint8_t { kOld, kNew };

struct TinyModelOptions {
  std::string architecture = "llama";  // "llama", "qwen2" or "qwen3"
  int32_t hidden_size = 64;
  int32_t num_layers = 2;
  int32_t num_heads = 4;
  int32_t num_kv_heads = 2;
  int32_t head_dim = 32;  // need not be hidden_size / num_heads
  int32_t intermediate_size = 96;
  int32_t vocab_size = 256;
  int64_t max_positions = 2048;  // max_position_embeddings
  bool tie_word_embeddings = false;
  bool attention_bias = false;  // llama, qwen3; qwen2 always has biases on q, k and v
  bool mlp_bias = false;        // llama
  double rope_theta = 10000.0;
  // JSON object without theta, e.g. {"rope_type":"linear","factor":2.0}; empty: plain RoPE.
  std::string rope_scaling;
  ConfigSpelling spelling = ConfigSpelling::kOld;
  DType dtype = DType::kBF16;  // of the stored weights: kF32, kBF16 or kF16
  int32_t num_shards = 1;      // more than 1: shards with an index
  uint64_t seed = 1;           // equal seeds give equal weights
};

// config.json.
std::string TinyModelConfig(const TinyModelOptions& options);

// The weights under their Hugging Face names. A tensor's values depend on its name and the seed
// alone.
TensorMap TinyModelTensors(const TinyModelOptions& options);

// A safetensors file with `tensors`, one after the other in order of name.
std::string SafetensorsFile(const TensorMap& tensors);

// A safetensors file with `header_json` as it is, whatever it says, followed by `data`.
std::string SafetensorsFile(absl::string_view header_json, absl::string_view data);

// model.safetensors, or `num_shards` shards and their index, in the existing folder `dir`.
absl::Status WriteWeights(const std::string& dir, const TensorMap& tensors, int32_t num_shards);

// Replaces the file's content.
absl::Status WriteFile(const std::string& path, absl::string_view content);

// The whole directory: config.json, generation_config.json and the weights. Creates `dir`.
absl::Status WriteTinyModel(const std::string& dir, const TinyModelOptions& options);

}  // namespace headstart::testing
