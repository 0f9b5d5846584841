// Which of the stored tensors a model consists of.
#pragma once

#include <string>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "engine/model/model_config.h"
#include "engine/model/safetensors.h"

namespace headstart {

inline constexpr char kEmbedding[] = "model.embed_tokens.weight";
inline constexpr char kHead[] = "lm_head.weight";

// By the names that Hugging Face's …ForCausalLM gives them.
using ModelTensors = absl::btree_map<std::string, StoredTensor>;

// Every tensor that `config` asks for, with the shape that it makes; read as Hugging Face reads
// them:
// * "model." may be missing, as in what the model without its head saved;
// * with tied embeddings one of embedding and head may be missing, and is the other one then. Where
//   both are stored the head is used, which makes a difference only if it differs.
// INVALID_ARGUMENT names file and tensor: missing, wrong shape, dtype that is not f32, bf16 or f16,
// and one that the configuration has no place for (Hugging Face warns of it and goes on; here it
// would mean wrong results in silence). Left out is rotary_emb.inv_freq of old Llama checkpoints,
// where it says what the configuration says, too.
absl::StatusOr<ModelTensors> FindModelTensors(const ModelConfig& config, const WeightFiles& files);

}  // namespace headstart
