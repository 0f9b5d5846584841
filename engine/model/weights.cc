#include "engine/model/weights.h"

#include <openssl/sha.h>

#include <cstring>
#include <utility>

#include "absl/container/btree_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/model/json_reader.h"
#include "engine/model/tensor_scan.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// What of the configuration changes the numbers that come out.
std::string ConfigText(const ModelConfig& c) {
  const RopeConfig& r = c.rope;
  return absl::StrFormat(
      "%s hidden=%d layers=%d heads=%d kv_heads=%d head_dim=%d ffn=%d vocab=%d eps=%.9g tied=%d "
      "qkv_bias=%d o_bias=%d mlp_bias=%d qk_norm=%d rope=%s theta=%.17g factor=%.17g original=%d "
      "low=%.17g high=%.17g fast=%.17g slow=%.17g truncate=%d attention_factor=%.17g\n",
      c.architecture, c.hidden_size, c.num_layers, c.heads.num_heads, c.heads.num_kv_heads,
      c.heads.head_dim, c.intermediate_size, c.vocab_size, c.rms_norm_eps, c.tie_word_embeddings,
      c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, RopeTypeName(r.type), r.theta, r.factor,
      r.original_max_positions, r.low_freq_factor, r.high_freq_factor, r.beta_fast, r.beta_slow,
      r.truncate, r.attention_factor);
}

std::string Sha256Hex(absl::string_view text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest)));
}

// Takes tensors out of the files, each checked and hashed the first time, and gives them to the
// backend.
class Loader {
 public:
  Loader(const ModelConfig& config, const WeightFiles& files, Backend& backend,
         const LoadProgress& progress)
      : config_(config), files_(files), backend_(backend), progress_(progress) {}

  absl::StatusOr<Buffer> Table(const std::string& name, int64_t rows, int64_t cols) {
    HEADSTART_ASSIGN_OR_RETURN(const HostTensor tensor, Take(name, {rows, cols}));
    absl::StatusOr<Buffer> table = backend_.PrepareTable(tensor);
    copies_.clear();
    return table;
  }

  absl::StatusOr<Buffer> Norm(const std::string& prefix, int64_t size) {
    HEADSTART_ASSIGN_OR_RETURN(const HostTensor tensor, Take(prefix + ".weight", {size}));
    absl::StatusOr<Buffer> vector = backend_.PrepareVector(tensor);
    copies_.clear();
    return vector;
  }

  // PREFIX.weight [rows, cols] and, where the model has it, PREFIX.bias [rows].
  struct Part {
    std::string prefix;
    int64_t rows;
  };
  absl::StatusOr<std::unique_ptr<LinearWeight>> Linear(absl::Span<const Part> parts, int64_t cols,
                                                       bool has_bias) {
    std::vector<HostTensor> weights, biases;
    for (const Part& part : parts) {
      HEADSTART_ASSIGN_OR_RETURN(weights.emplace_back(),
                                 Take(part.prefix + ".weight", {part.rows, cols}));
      if (!has_bias) continue;
      HEADSTART_ASSIGN_OR_RETURN(biases.emplace_back(), Take(part.prefix + ".bias", {part.rows}));
    }
    auto linear = backend_.PrepareLinear(weights, biases);
    copies_.clear();
    return linear;
  }

  // Every tensor of the files was taken, or is known to carry nothing.
  absl::Status CheckLeftovers() const {
    for (const std::string& name : files_.Names()) {
      const bool harmless = absl::EndsWith(name, "rotary_emb.inv_freq") ||
                            (config_.tie_word_embeddings && name == "lm_head.weight");
      if (harmless || hash_lines_.contains(name)) continue;
      return absl::InvalidArgumentError(absl::StrCat(files_.FileOf(name), ": tensor ", Quoted(name),
                                                     " has no place in a ", config_.architecture,
                                                     " model of this config.json"));
    }
    return absl::OkStatus();
  }

  std::string ModelHash() const {
    std::string text = ConfigText(config_);
    for (const auto& [name, line] : hash_lines_) text += line;
    return Sha256Hex(text);
  }

 private:
  absl::StatusOr<HostTensor> Take(const std::string& name, const std::vector<int64_t>& shape) {
    absl::StatusOr<StoredTensor> found = files_.Find(name);
    if (!found.ok()) return absl::InvalidArgumentError(found.status().message());
    const std::string where = absl::StrCat(found->file, ": tensor ", Quoted(name));
    if (found->shape != shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": shape [", absl::StrJoin(found->shape, ", "),
                       "], config.json makes it [", absl::StrJoin(shape, ", "), "]"));
    }
    if (!hash_lines_.contains(name)) HEADSTART_RETURN_IF_ERROR(Scan(name, *found, where));
    const int64_t rows = shape.size() == 1 ? 1 : shape[0];
    return HostTensor{Aligned(*found), found->dtype, rows, shape.back()};
  }

  absl::Status Scan(const std::string& name, const StoredTensor& tensor, absl::string_view where) {
    const TensorScan scan = ScanTensor(tensor);
    if (scan.first_nonfinite >= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": element ", scan.first_nonfinite, " is not finite"));
    }
    hash_lines_[name] = absl::StrFormat("%s %s [%s] %08x\n", name, DTypeName(tensor.dtype),
                                        absl::StrJoin(tensor.shape, ","), scan.crc32c);
    done_bytes_ += tensor.bytes;
    return progress_ ? progress_(done_bytes_, files_.total_bytes()) : absl::OkStatus();
  }

  // The tensor's data, or a copy when it lies across its natural alignment in the file.
  const void* Aligned(const StoredTensor& tensor) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data);
    if (address % static_cast<uintptr_t>(DTypeBytes(tensor.dtype)) == 0) return tensor.data;
    copies_.emplace_back(tensor.data, tensor.data + tensor.bytes);
    return copies_.back().data();
  }

  const ModelConfig& config_;
  const WeightFiles& files_;
  Backend& backend_;
  const LoadProgress& progress_;
  absl::btree_map<std::string, std::string> hash_lines_;  // by tensor
  std::vector<std::vector<std::byte>> copies_;            // live until the backend has taken them
  int64_t done_bytes_ = 0;
};

absl::StatusOr<LayerWeights> LoadLayer(const ModelConfig& config, int32_t layer, Loader& load) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = prefix + "self_attn.";
  const int64_t hidden = config.hidden_size;
  const int64_t ffn = config.intermediate_size;
  const HeadShape& heads = config.heads;
  const int64_t q_size = int64_t{heads.num_heads} * heads.head_dim;
  const int64_t kv_size = int64_t{heads.num_kv_heads} * heads.head_dim;
  LayerWeights out;
  HEADSTART_ASSIGN_OR_RETURN(out.input_norm, load.Norm(prefix + "input_layernorm", hidden));
  HEADSTART_ASSIGN_OR_RETURN(out.qkv, load.Linear({{attention + "q_proj", q_size},
                                                   {attention + "k_proj", kv_size},
                                                   {attention + "v_proj", kv_size}},
                                                  hidden, config.qkv_bias));
  if (config.qk_norm) {
    HEADSTART_ASSIGN_OR_RETURN(out.q_norm, load.Norm(attention + "q_norm", heads.head_dim));
    HEADSTART_ASSIGN_OR_RETURN(out.k_norm, load.Norm(attention + "k_norm", heads.head_dim));
  }
  HEADSTART_ASSIGN_OR_RETURN(out.output,
                             load.Linear({{attention + "o_proj", hidden}}, q_size, config.o_bias));
  HEADSTART_ASSIGN_OR_RETURN(out.post_attention_norm,
                             load.Norm(prefix + "post_attention_layernorm", hidden));
  HEADSTART_ASSIGN_OR_RETURN(
      out.gate_up, load.Linear({{prefix + "mlp.gate_proj", ffn}, {prefix + "mlp.up_proj", ffn}},
                               hidden, config.mlp_bias));
  HEADSTART_ASSIGN_OR_RETURN(
      out.down, load.Linear({{prefix + "mlp.down_proj", hidden}}, ffn, config.mlp_bias));
  return out;
}

}  // namespace

absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, const WeightFiles& files,
                                         Backend& backend, int64_t num_positions,
                                         const LoadProgress& progress) {
  const std::string embedding = "model.embed_tokens";
  Loader load(config, files, backend, progress);
  ModelWeights out;
  HEADSTART_ASSIGN_OR_RETURN(
      out.embedding, load.Table(embedding + ".weight", config.vocab_size, config.hidden_size));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HEADSTART_ASSIGN_OR_RETURN(out.layers.emplace_back(), LoadLayer(config, layer, load));
  }
  HEADSTART_ASSIGN_OR_RETURN(out.final_norm, load.Norm("model.norm", config.hidden_size));
  const std::string head = config.tie_word_embeddings ? embedding : "lm_head";
  HEADSTART_ASSIGN_OR_RETURN(out.lm_head,
                             load.Linear({{head, config.vocab_size}}, config.hidden_size, false));
  HEADSTART_RETURN_IF_ERROR(load.CheckLeftovers());
  HEADSTART_ASSIGN_OR_RETURN(
      out.rope,
      backend.PrepareRope(InverseFrequencies(config.rope, config.heads.head_dim),
                          static_cast<float>(config.rope.attention_factor), num_positions));
  out.model_hash = load.ModelHash();
  return out;
}

}  // namespace headstart
