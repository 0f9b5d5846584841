#include "engine/model/weights.h"

#include <cstdlib>
#include <utility>

#include "absl/container/btree_map.h"
#include "absl/strings/str_cat.h"
#include "engine/model/model_hash.h"
#include "engine/model/model_tensors.h"
#include "engine/model/tensor_reader.h"
#include "kernels/base/machine.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

struct FreeDeleter {
  void operator()(std::byte* data) const { std::free(data); }
};

// Reads tensors, each once, and gives them to the backend.
class Loader {
 public:
  Loader(ModelTensors tensors, int64_t total_bytes, Backend& backend, const LoadProgress& progress,
         int32_t num_threads)
      : tensors_(std::move(tensors)),
        total_bytes_(total_bytes),
        backend_(backend),
        progress_(progress),
        num_threads_(num_threads > 0 ? num_threads : UsableCpus()) {}

  absl::Status Ends(ModelWeights& out) {
    HEADSTART_ASSIGN_OR_RETURN(const HostTensor embedding, ReadOne(kEmbedding));
    HEADSTART_ASSIGN_OR_RETURN(out.embedding, backend_.PrepareTable(embedding));
    HostTensor head = embedding;
    if (tensors_.contains(kHead)) {
      HEADSTART_ASSIGN_OR_RETURN(head, ReadOne(kHead));
    }
    HEADSTART_ASSIGN_OR_RETURN(out.lm_head, backend_.PrepareLinear({head}, {}));
    return absl::OkStatus();
  }

  absl::StatusOr<Buffer> Norm(const std::string& prefix) {
    HEADSTART_ASSIGN_OR_RETURN(const HostTensor vector, ReadOne(prefix + ".weight"));
    return backend_.PrepareVector(vector);
  }

  // PREFIX.weight of each part and, where the model has it, PREFIX.bias.
  absl::StatusOr<std::unique_ptr<LinearWeight>> Linear(std::vector<std::string> prefixes) {
    std::vector<std::string> names;
    for (const std::string& prefix : prefixes) names.push_back(prefix + ".weight");
    for (const std::string& prefix : prefixes) {
      if (tensors_.contains(prefix + ".bias")) names.push_back(prefix + ".bias");
    }
    HEADSTART_ASSIGN_OR_RETURN(const std::vector<HostTensor> read, Read(names));
    const absl::Span<const HostTensor> all = read;
    return backend_.PrepareLinear(all.first(prefixes.size()), all.subspan(prefixes.size()));
  }

  std::string Hash(const ModelConfig& config) const {
    return ModelHash(config, tensors_, digests_);
  }

 private:
  absl::StatusOr<HostTensor> ReadOne(const std::string& name) {
    HEADSTART_ASSIGN_OR_RETURN(const std::vector<HostTensor> read, Read({name}));
    return read.front();
  }

  // What it returns lies in `memory_` until the next call.
  absl::StatusOr<std::vector<HostTensor>> Read(const std::vector<std::string>& names) {
    std::vector<int64_t> offsets;
    int64_t bytes = 0;
    for (const std::string& name : names) {
      constexpr int64_t kAlignment = 64;
      offsets.push_back(bytes);
      bytes += (tensors_.at(name).bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    HEADSTART_RETURN_IF_ERROR(Reserve(bytes));
    std::vector<TensorRead> reads;
    std::vector<HostTensor> out;
    for (size_t i = 0; i < names.size(); ++i) {
      const StoredTensor& tensor = tensors_.at(names[i]);
      const int64_t rows = tensor.shape.size() == 1 ? 1 : tensor.shape[0];
      reads.push_back({tensor, memory_.get() + offsets[i]});
      out.push_back({reads.back().into, tensor.dtype, rows, tensor.shape.back()});
      done_bytes_ += tensor.bytes;
    }
    HEADSTART_ASSIGN_OR_RETURN(const std::vector<Sha256> digests, ReadTensors(reads, num_threads_));
    for (size_t i = 0; i < names.size(); ++i) digests_[names[i]] = digests[i];
    if (progress_) HEADSTART_RETURN_IF_ERROR(progress_(done_bytes_, total_bytes_));
    return out;
  }

  absl::Status Reserve(int64_t bytes) {
    if (bytes <= capacity_) return absl::OkStatus();
    memory_.reset();
    memory_.reset(static_cast<std::byte*>(std::malloc(static_cast<size_t>(bytes))));
    capacity_ = memory_ == nullptr ? 0 : bytes;
    if (memory_ != nullptr) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes on the host to read weights"));
  }

  const ModelTensors tensors_;
  const int64_t total_bytes_;
  Backend& backend_;
  const LoadProgress& progress_;
  const int32_t num_threads_;
  absl::btree_map<std::string, Sha256> digests_;  // by tensor
  std::unique_ptr<std::byte, FreeDeleter> memory_;
  int64_t capacity_ = 0;
  int64_t done_bytes_ = 0;
};

int64_t BytesOf(const ModelTensors& tensors) {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) bytes += tensor.bytes;
  return bytes;
}

absl::StatusOr<LayerWeights> LoadLayer(const ModelConfig& config, int32_t layer, Loader& load) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = prefix + "self_attn.";
  LayerWeights out;
  HEADSTART_ASSIGN_OR_RETURN(out.input_norm, load.Norm(prefix + "input_layernorm"));
  HEADSTART_ASSIGN_OR_RETURN(
      out.qkv, load.Linear({attention + "q_proj", attention + "k_proj", attention + "v_proj"}));
  if (config.qk_norm) {
    HEADSTART_ASSIGN_OR_RETURN(out.q_norm, load.Norm(attention + "q_norm"));
    HEADSTART_ASSIGN_OR_RETURN(out.k_norm, load.Norm(attention + "k_norm"));
  }
  HEADSTART_ASSIGN_OR_RETURN(out.output, load.Linear({attention + "o_proj"}));
  HEADSTART_ASSIGN_OR_RETURN(out.post_attention_norm,
                             load.Norm(prefix + "post_attention_layernorm"));
  HEADSTART_ASSIGN_OR_RETURN(out.gate_up,
                             load.Linear({prefix + "mlp.gate_proj", prefix + "mlp.up_proj"}));
  HEADSTART_ASSIGN_OR_RETURN(out.down, load.Linear({prefix + "mlp.down_proj"}));
  return out;
}

}  // namespace

absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, const WeightFiles& files,
                                         Backend& backend, int64_t num_positions,
                                         const LoadProgress& progress, int32_t num_threads) {
  HEADSTART_ASSIGN_OR_RETURN(ModelTensors tensors, FindModelTensors(config, files));
  const int64_t total_bytes = BytesOf(tensors);
  Loader load(std::move(tensors), total_bytes, backend, progress, num_threads);
  ModelWeights out;
  HEADSTART_RETURN_IF_ERROR(load.Ends(out));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HEADSTART_ASSIGN_OR_RETURN(out.layers.emplace_back(), LoadLayer(config, layer, load));
  }
  HEADSTART_ASSIGN_OR_RETURN(out.final_norm, load.Norm("model.norm"));
  HEADSTART_ASSIGN_OR_RETURN(
      out.rope,
      backend.PrepareRope(InverseFrequencies(config.rope, config.heads.head_dim),
                          static_cast<float>(config.rope.attention_factor), num_positions));
  out.model_hash = load.Hash(config);
  return out;
}

}  // namespace headstart
