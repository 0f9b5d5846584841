#include "tests/engine/reference_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model/safetensors.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/reference_selection.h"

namespace headstart {
namespace {

using reference::HostMatrix;
using reference::KvRows;

HostMatrix Rounded(HostMatrix m, DType dtype) {
  for (float& value : m.values) value = reference::RoundTo(value, dtype);
  return m;
}

void Add(HostMatrix& x, const HostMatrix& y) {
  for (size_t i = 0; i < x.values.size(); ++i) x.values[i] += y.values[i];
}

class ReferenceModel {
 public:
  ReferenceModel(const ModelConfig& config, const WeightFiles& files, DType dtype)
      : c_(config), files_(files), dtype_(dtype) {}

  absl::StatusOr<ReferenceResult> Run(absl::Span<const int32_t> ids,
                                      const ProxyAttnOptions& options) {
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix embedding, Tensor("model.embed_tokens.weight"));
    HostMatrix x = reference::Embed(ids, Rounded(embedding, dtype_));
    ReferenceResult result;
    for (int32_t layer = 0; layer < c_.num_layers; ++layer) {
      HEADSTART_RETURN_IF_ERROR(RunLayer(layer, options, x, result));
    }
    HEADSTART_ASSIGN_OR_RETURN(HostMatrix last, Norm("model.norm", x));
    last.values.assign(last.Row(last.rows - 1), last.Row(last.rows - 1) + last.cols);
    last.rows = 1;
    HEADSTART_ASSIGN_OR_RETURN(
        const HostMatrix head,
        Tensor(c_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"));
    result.logits = reference::Linear(last, Rounded(head, dtype_), {}).values;
    return result;
  }

 private:
  absl::Status RunLayer(int32_t layer, const ProxyAttnOptions& options, HostMatrix& x,
                        ReferenceResult& result) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix attended,
                               Attention(layer, prefix, options, x, result));
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix o,
                               Linear(prefix + "self_attn.o_proj", attended, c_.o_bias));
    Add(x, o);
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix normed,
                               Norm(prefix + "post_attention_layernorm", x));
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix gate,
                               Linear(prefix + "mlp.gate_proj", normed, c_.mlp_bias));
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix up,
                               Linear(prefix + "mlp.up_proj", normed, c_.mlp_bias));
    HostMatrix gate_up(x.rows, 2 * gate.cols);
    for (int64_t r = 0; r < x.rows; ++r) {
      std::copy_n(Rounded(gate, dtype_).Row(r), gate.cols, gate_up.Row(r));
      std::copy_n(Rounded(up, dtype_).Row(r), up.cols, gate_up.Row(r) + gate.cols);
    }
    HEADSTART_ASSIGN_OR_RETURN(
        const HostMatrix down,
        Linear(prefix + "mlp.down_proj", Rounded(reference::SwiGlu(gate_up), dtype_), c_.mlp_bias));
    Add(x, down);
    return absl::OkStatus();
  }

  absl::StatusOr<HostMatrix> Attention(int32_t layer, const std::string& prefix,
                                       const ProxyAttnOptions& options, const HostMatrix& x,
                                       ReferenceResult& result) {
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix normed, Norm(prefix + "input_layernorm", x));
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix q,
                               Heads(prefix + "self_attn.q", c_.heads.num_heads, normed, true));
    KvRows kv;
    HEADSTART_ASSIGN_OR_RETURN(kv.k,
                               Heads(prefix + "self_attn.k", c_.heads.num_kv_heads, normed, true));
    HEADSTART_ASSIGN_OR_RETURN(kv.v,
                               Heads(prefix + "self_attn.v", c_.heads.num_kv_heads, normed, false));
    BlockSelection selection;
    double density = 1.0;
    if (options.enabled) {
      reference::SelectionInput input;
      input.shape = c_.heads;
      input.q = q;
      input.k = kv.k;
      input.dtype = dtype_;
      input.layer = layer;
      input.ends_prompt = true;
      std::vector<float> budget_ratio(c_.heads.num_heads, 0.0f);
      selection = reference::SelectBlocks(input, options, budget_ratio);
      density = Density(selection);
    }
    HostMatrix out =
        reference::Attention(q, kv, c_.heads, 0, options.enabled ? &selection : nullptr);
    result.layers.push_back(std::move(kv));
    result.layer_density.push_back(density);
    return Rounded(std::move(out), dtype_);
  }

  static double Density(const BlockSelection& selection) {
    int64_t executed = 0;
    int64_t causal = 0;
    for (int32_t h = 0; h < selection.num_heads; ++h) {
      for (int64_t m = 0; m < selection.num_rows; ++m) {
        executed += selection.Count(h, m);
        causal += m + 1;
      }
    }
    return static_cast<double>(executed) / static_cast<double>(causal);
  }

  // A projection of q, k or v; the first two normed where the model does, and rotated.
  absl::StatusOr<HostMatrix> Heads(const std::string& prefix, int32_t num_heads,
                                   const HostMatrix& x, bool rotate) {
    HEADSTART_ASSIGN_OR_RETURN(HostMatrix heads, Linear(prefix + "_proj", x, c_.qkv_bias));
    heads = Rounded(std::move(heads), dtype_);
    if (!rotate) return heads;
    if (c_.qk_norm) {
      HEADSTART_ASSIGN_OR_RETURN(const HostMatrix weight, Tensor(prefix + "_norm.weight"));
      reference::NormHeads(heads, 0, num_heads, weight.values, c_.rms_norm_eps);
    }
    reference::ApplyRope(heads, 0, num_heads, InverseFrequencies(c_.rope, c_.heads.head_dim),
                         static_cast<float>(c_.rope.attention_factor), 0);
    return Rounded(std::move(heads), dtype_);
  }

  // Not rounded: what a product is added to, or stored as, differs.
  absl::StatusOr<HostMatrix> Linear(const std::string& prefix, const HostMatrix& x, bool has_bias) {
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix weight, Tensor(prefix + ".weight"));
    HostMatrix bias;
    if (has_bias) {
      HEADSTART_ASSIGN_OR_RETURN(bias, Tensor(prefix + ".bias"));
    }
    return reference::Linear(x, Rounded(weight, dtype_), bias.values);
  }

  absl::StatusOr<HostMatrix> Norm(const std::string& prefix, const HostMatrix& x) {
    HEADSTART_ASSIGN_OR_RETURN(const HostMatrix weight, Tensor(prefix + ".weight"));
    return Rounded(reference::RmsNorm(x, weight.values, c_.rms_norm_eps), dtype_);
  }

  absl::StatusOr<HostMatrix> Tensor(const std::string& name) {
    HEADSTART_ASSIGN_OR_RETURN(const StoredTensor stored, files_.Find(name));
    std::vector<std::byte> bytes(static_cast<size_t>(stored.bytes));
    HEADSTART_RETURN_IF_ERROR(stored.file->Read(stored.offset, absl::MakeSpan(bytes)));
    const int64_t rows = stored.shape.size() == 1 ? 1 : stored.shape[0];
    const int64_t cols = stored.shape.back();
    return reference::Load({bytes.data(), stored.dtype, rows, cols, cols});
  }

  const ModelConfig& c_;
  const WeightFiles& files_;
  const DType dtype_;
};

}  // namespace

absl::StatusOr<ReferenceResult> RunReference(const std::string& model_dir,
                                             absl::Span<const int32_t> token_ids,
                                             const ProxyAttnOptions& options, DType dtype) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(model_dir));
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(model_dir));
  return ReferenceModel(config, *files, dtype).Run(token_ids, options);
}

}  // namespace headstart
