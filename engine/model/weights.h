// The weights of a model in the form that a backend multiplies.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/model_config.h"
#include "engine/model/safetensors.h"
#include "kernels/backend.h"

namespace headstart {

struct LayerWeights {
  Buffer input_norm;                      // f32 [hidden]
  std::unique_ptr<LinearWeight> qkv;      // [(H + 2 H_kv) d, hidden], bias where the model has it
  Buffer q_norm, k_norm;                  // f32 [d]; empty without QK-norm
  std::unique_ptr<LinearWeight> output;   // [hidden, H d]
  Buffer post_attention_norm;             // f32 [hidden]
  std::unique_ptr<LinearWeight> gate_up;  // [2 ffn, hidden]
  std::unique_ptr<LinearWeight> down;     // [hidden, ffn]
};

struct ModelWeights {
  Buffer embedding;  // compute dtype [vocab, hidden]
  std::vector<LayerWeights> layers;
  Buffer final_norm;                      // f32 [hidden]
  std::unique_ptr<LinearWeight> lm_head;  // [vocab, hidden]
  std::unique_ptr<RopeTable> rope;
  std::string model_hash;  // of what was loaded; see model_hash.h
};

// Called with bytes done and in all, from the loading thread. An error ends the loading with it.
using LoadProgress = std::function<absl::Status(int64_t done_bytes, int64_t total_bytes)>;

// Loads, checks and hands over every tensor. INVALID_ARGUMENT: whatever FindModelTensors says,
// before anything is read, and values that are not finite. The RoPE table covers positions [0,
// num_positions). `progress` may be null. Reads and hashes with `num_threads` threads; 0: all CPUs
// that the process may use. Beside what the backend keeps it takes host memory for what becomes one
// weight: as much as the embedding, or gate and up.
absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, const WeightFiles& files,
                                         Backend& backend, int64_t num_positions,
                                         const LoadProgress& progress, int32_t num_threads = 0);

}  // namespace headstart
