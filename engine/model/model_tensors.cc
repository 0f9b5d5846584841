#include "engine/model/model_tensors.h"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/model/json_reader.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using Shape = std::vector<int64_t>;
using Shapes = std::vector<std::pair<std::string, Shape>>;

constexpr absl::string_view kInvFreq = "rotary_emb.inv_freq";

void AddLinear(const std::string& prefix, int64_t out, int64_t in, bool has_bias, Shapes& shapes) {
  shapes.push_back({prefix + ".weight", {out, in}});
  if (has_bias) shapes.push_back({prefix + ".bias", {out}});
}

void AddLayer(const ModelConfig& c, int32_t layer, Shapes& shapes) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = prefix + "self_attn.";
  const int64_t hidden = c.hidden_size;
  const int64_t ffn = c.intermediate_size;
  const int64_t q_size = int64_t{c.heads.num_heads} * c.heads.head_dim;
  const int64_t kv_size = int64_t{c.heads.num_kv_heads} * c.heads.head_dim;
  shapes.push_back({prefix + "input_layernorm.weight", {hidden}});
  AddLinear(attention + "q_proj", q_size, hidden, c.qkv_bias, shapes);
  AddLinear(attention + "k_proj", kv_size, hidden, c.qkv_bias, shapes);
  AddLinear(attention + "v_proj", kv_size, hidden, c.qkv_bias, shapes);
  if (c.qk_norm) {
    shapes.push_back({attention + "q_norm.weight", {c.heads.head_dim}});
    shapes.push_back({attention + "k_norm.weight", {c.heads.head_dim}});
  }
  AddLinear(attention + "o_proj", hidden, q_size, c.o_bias, shapes);
  shapes.push_back({prefix + "post_attention_layernorm.weight", {hidden}});
  AddLinear(prefix + "mlp.gate_proj", ffn, hidden, c.mlp_bias, shapes);
  AddLinear(prefix + "mlp.up_proj", ffn, hidden, c.mlp_bias, shapes);
  AddLinear(prefix + "mlp.down_proj", hidden, ffn, c.mlp_bias, shapes);
}

// All but embedding and head.
Shapes BodyShapes(const ModelConfig& config) {
  Shapes shapes;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) AddLayer(config, layer, shapes);
  shapes.push_back({"model.norm.weight", {config.hidden_size}});
  return shapes;
}

// What a tensor is called in the files.
std::string StoredName(const std::string& name, const WeightFiles& files) {
  const absl::string_view bare = absl::StripPrefix(name, "model.");
  return !files.Contains(name) && files.Contains(bare) ? std::string(bare) : name;
}

class Finder {
 public:
  Finder(const ModelConfig& config, const WeightFiles& files) : config_(config), files_(files) {}

  absl::StatusOr<ModelTensors> Find() && {
    const Shape table = {config_.vocab_size, config_.hidden_size};
    const bool has_head = files_.Contains(kHead);
    const bool has_embedding = files_.Contains(StoredName(kEmbedding, files_));
    const bool only_head = config_.tie_word_embeddings && has_head && !has_embedding;
    HEADSTART_RETURN_IF_ERROR(
        Add(kEmbedding, only_head ? kHead : StoredName(kEmbedding, files_), table));
    if (!only_head && (has_head || !config_.tie_word_embeddings)) {
      HEADSTART_RETURN_IF_ERROR(Add(kHead, kHead, table));
    }
    for (const auto& [name, shape] : BodyShapes(config_)) {
      HEADSTART_RETURN_IF_ERROR(Add(name, StoredName(name, files_), shape));
    }
    HEADSTART_RETURN_IF_ERROR(CheckLeftovers());
    return std::move(found_);
  }

 private:
  absl::Status Add(const std::string& name, const std::string& stored_name, const Shape& shape) {
    absl::StatusOr<StoredTensor> tensor = files_.Find(stored_name);
    if (!tensor.ok()) return absl::InvalidArgumentError(tensor.status().message());
    if (tensor->shape != shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor->Where(), ": shape [", absl::StrJoin(tensor->shape, ", "),
                       "], config.json makes it [", absl::StrJoin(shape, ", "), "]"));
    }
    used_.insert(stored_name);
    found_.emplace(name, *std::move(tensor));
    return absl::OkStatus();
  }

  absl::Status CheckLeftovers() const {
    for (const std::string& name : files_.Names()) {
      if (used_.contains(name)) continue;
      if (name == kInvFreq || absl::EndsWith(name, absl::StrCat(".", kInvFreq))) {
        HEADSTART_RETURN_IF_ERROR(CheckInvFreq(name));
        continue;
      }
      return absl::InvalidArgumentError(absl::StrCat(files_.FileOf(name), ": tensor ", Quoted(name),
                                                     " has no place in a ", config_.architecture,
                                                     " model of this config.json"));
    }
    return absl::OkStatus();
  }

  // It may be rounded to 16 bits, and be that of RoPE before its scaling.
  absl::Status CheckInvFreq(const std::string& name) const {
    HEADSTART_ASSIGN_OR_RETURN(const StoredTensor tensor, files_.Find(name));
    const std::vector<float> scaled = InverseFrequencies(config_.rope, config_.heads.head_dim);
    RopeConfig plain;
    plain.theta = config_.rope.theta;
    const std::vector<float> unscaled = InverseFrequencies(plain, config_.heads.head_dim);
    if (tensor.shape == Shape{static_cast<int64_t>(scaled.size())}) {
      HEADSTART_ASSIGN_OR_RETURN(const std::vector<float> stored, ReadFloats(tensor));
      const double tolerance = tensor.dtype == DType::kF32 ? 1e-5 : 0x1p-8;
      if (AllNear(stored, scaled, tolerance) || AllNear(stored, unscaled, tolerance)) {
        return absl::OkStatus();
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.Where(), " is not what the RoPE of config.json comes to"));
  }

  static bool AllNear(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
    for (size_t i = 0; i < a.size(); ++i) {
      constexpr double kLeastF16 = 0x1p-24;
      if (!(std::abs(a[i] - b[i]) <= tolerance * b[i] + kLeastF16)) return false;
    }
    return true;
  }

  static absl::StatusOr<std::vector<float>> ReadFloats(const StoredTensor& tensor) {
    std::vector<std::byte> bytes(static_cast<size_t>(tensor.bytes));
    HEADSTART_RETURN_IF_ERROR(tensor.file->Read(tensor.offset, absl::MakeSpan(bytes)));
    const int64_t width = DTypeBytes(tensor.dtype);
    std::vector<float> floats(static_cast<size_t>(tensor.bytes / width));
    for (size_t i = 0; i < floats.size(); ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes.data() + i * static_cast<size_t>(width), static_cast<size_t>(width));
      if (tensor.dtype == DType::kF16) {
        floats[i] = Float16ToFloat(static_cast<uint16_t>(bits));
        continue;
      }
      if (tensor.dtype == DType::kBF16) bits <<= 16;
      std::memcpy(&floats[i], &bits, sizeof(bits));
    }
    return floats;
  }

  const ModelConfig& config_;
  const WeightFiles& files_;
  ModelTensors found_;
  absl::flat_hash_set<std::string> used_;  // names in the files
};

}  // namespace

absl::StatusOr<ModelTensors> FindModelTensors(const ModelConfig& config, const WeightFiles& files) {
  return Finder(config, files).Find();
}

}  // namespace headstart
