#include "engine/model/model_config.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "engine/model/json_reader.h"
#include "engine/model/model_file.h"
#include "engine/model/rope_config.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using nlohmann::json;

constexpr JsonLimits kConfigLimits = {.max_bytes = 4 << 20, .max_values = 100'000};

// What a field may hold when the model is one that we run.
enum class Allowed : uint8_t {
  kUnset,  // absent, null, false, 0 or empty
  kOne,    // absent, or the number 1
};

struct Restriction {
  absl::string_view field;
  Allowed allowed;
  absl::string_view why;
};

constexpr absl::string_view kMoe = "mixture of experts is not supported";
constexpr absl::string_view kMla = "multi-head latent attention is not supported";
constexpr absl::string_view kQuantised = "quantised weights are not supported";
constexpr absl::string_view kWindow = "sliding-window attention is not supported";
constexpr absl::string_view kPartialRope = "RoPE on a part of the head is not supported (1 is)";
constexpr absl::string_view kScaled = "scaled activations are not supported";
constexpr absl::string_view kNope = "layers without RoPE are not supported";
constexpr absl::string_view kNotDecoder = "only decoder-only models are supported";

constexpr Restriction kRestrictions[] = {
    {"num_experts", Allowed::kUnset, kMoe},
    {"num_local_experts", Allowed::kUnset, kMoe},
    {"n_routed_experts", Allowed::kUnset, kMoe},
    {"n_shared_experts", Allowed::kUnset, kMoe},
    {"num_experts_per_tok", Allowed::kUnset, kMoe},
    {"moe_intermediate_size", Allowed::kUnset, kMoe},
    {"shared_expert_intermediate_size", Allowed::kUnset, kMoe},
    {"kv_lora_rank", Allowed::kUnset, kMla},
    {"q_lora_rank", Allowed::kUnset, kMla},
    {"qk_rope_head_dim", Allowed::kUnset, kMla},
    {"qk_nope_head_dim", Allowed::kUnset, kMla},
    {"v_head_dim", Allowed::kUnset, kMla},
    {"quantization_config", Allowed::kUnset, kQuantised},
    {"compression_config", Allowed::kUnset, kQuantised},
    {"attention_chunk_size", Allowed::kUnset, "chunked attention is not supported"},
    {"partial_rotary_factor", Allowed::kOne, kPartialRope},
    {"rotary_pct", Allowed::kOne, kPartialRope},
    {"rope_interleaved", Allowed::kUnset, "interleaved RoPE is not supported"},
    {"no_rope_layers", Allowed::kUnset, kNope},
    {"no_rope_layer_interval", Allowed::kUnset, kNope},
    {"transformers_weights", Allowed::kUnset, "weights under another name are not supported"},
    {"attn_logit_softcapping", Allowed::kUnset, "soft-capped logits are not supported"},
    {"final_logit_softcapping", Allowed::kUnset, "soft-capped logits are not supported"},
    {"query_pre_attn_scalar", Allowed::kUnset, kScaled},
    {"attention_multiplier", Allowed::kUnset, kScaled},
    {"embedding_multiplier", Allowed::kOne, kScaled},
    {"residual_multiplier", Allowed::kOne, kScaled},
    {"logits_scaling", Allowed::kOne, kScaled},
    {"logit_scale", Allowed::kOne, kScaled},
    {"clip_qkv", Allowed::kUnset, "clipped projections are not supported"},
    {"pruned_heads", Allowed::kUnset, "pruned heads are not supported"},
    {"is_encoder_decoder", Allowed::kUnset, kNotDecoder},
    {"add_cross_attention", Allowed::kUnset, kNotDecoder},
};

bool IsUnset(const json& value) {
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value.get<double>() == 0.0;
  if (value.is_string()) return value.get_ref<const std::string&>().empty();
  return value.empty();  // null, [] and {}
}

absl::Status CheckRestrictions(const JsonFields& fields) {
  for (const Restriction& restriction : kRestrictions) {
    const json* value = fields.Find(restriction.field);
    if (value == nullptr) continue;
    const bool fine = restriction.allowed == Allowed::kUnset
                          ? IsUnset(*value)
                          : value->is_number() && value->get<double>() == 1.0;
    if (!fine) return fields.Error(restriction.field, absl::StrCat("(", restriction.why, ")"));
  }
  return absl::OkStatus();
}

// Whether a layer has a window by the fields that came before layer_types, as Hugging Face fills
// them in: Qwen has one behind max_window_layers where the switch is on; in a llama model a window
// is Mistral's.
absl::StatusOr<bool> HasWindow(const JsonFields& fields, const ModelConfig& config) {
  const bool is_llama = config.architecture == "llama";
  HEADSTART_ASSIGN_OR_RETURN(const bool is_used, fields.BoolOr("use_sliding_window", is_llama));
  if (!is_used) return false;
  const json* window = fields.Find("sliding_window");
  if (is_llama) return window != nullptr && !IsUnset(*window);
  const bool is_null = fields.object().contains("sliding_window") && window == nullptr;
  constexpr int64_t kDefaultFirst = 28;
  HEADSTART_ASSIGN_OR_RETURN(
      const int64_t first,
      fields.IntegerOr("max_window_layers", kDefaultFirst, 0, std::numeric_limits<int32_t>::max()));
  return !is_null && first < config.num_layers;
}

absl::Status CheckWindow(const JsonFields& fields, const ModelConfig& config) {
  const json* layer_types = fields.Find("layer_types");
  if (layer_types == nullptr || config.architecture == "llama") {
    HEADSTART_ASSIGN_OR_RETURN(const bool has_window, HasWindow(fields, config));
    if (has_window) return fields.Error("sliding_window", absl::StrCat("(", kWindow, ")"));
  }
  if (layer_types == nullptr) return absl::OkStatus();
  if (!layer_types->is_array()) return fields.Error("layer_types", "is not a list");
  for (const json& type : *layer_types) {
    if (type != "full_attention") {
      return fields.Error("layer_types", "has another entry than \"full_attention\"");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadArchitecture(const JsonFields& fields, ModelConfig& config) {
  HEADSTART_ASSIGN_OR_RETURN(config.architecture, fields.String("model_type"));
  const std::pair<absl::string_view, absl::string_view> known[] = {
      {"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
  const auto* found = std::find_if(std::begin(known), std::end(known), [&](const auto& entry) {
    return entry.first == config.architecture;
  });
  if (found == std::end(known)) {
    return fields.Error("model_type", "is not supported (llama, qwen2, qwen3 are)");
  }
  const json* classes = fields.Find("architectures");
  if (classes == nullptr || IsUnset(*classes)) return absl::OkStatus();
  if (!classes->is_array() || classes->size() != 1 || (*classes)[0] != std::string(found->second)) {
    return fields.Error("architectures", absl::StrCat("is not [\"", found->second, "\"]"));
  }
  return absl::OkStatus();
}

absl::Status ReadHeads(const JsonFields& fields, ModelConfig& config) {
  HEADSTART_ASSIGN_OR_RETURN(config.heads.num_heads,
                             fields.Integer("num_attention_heads", 1, 1024));
  HEADSTART_ASSIGN_OR_RETURN(
      config.heads.num_kv_heads,
      fields.IntegerOr("num_key_value_heads", config.heads.num_heads, 1, config.heads.num_heads));
  if (config.heads.num_heads % config.heads.num_kv_heads != 0) {
    return fields.Error("num_key_value_heads", absl::StrCat("does not divide num_attention_heads=",
                                                            config.heads.num_heads));
  }
  // Without head_dim the heads share hidden_size, but for Qwen3, whose default is 128.
  const bool is_qwen3 = config.architecture == "qwen3";
  if (!is_qwen3 && !fields.Has("head_dim") && config.hidden_size % config.heads.num_heads != 0) {
    return fields.Error("hidden_size", absl::StrCat("is no multiple of num_attention_heads=",
                                                    config.heads.num_heads));
  }
  HEADSTART_ASSIGN_OR_RETURN(
      config.heads.head_dim,
      fields.IntegerOr("head_dim", is_qwen3 ? 128 : config.hidden_size / config.heads.num_heads, 2,
                       1024));
  if (config.heads.head_dim % 2 != 0) {
    return fields.Error("head_dim", absl::StrCat("makes heads of ", config.heads.head_dim,
                                                 " dimensions; RoPE needs an even number"));
  }
  return absl::OkStatus();
}

absl::Status ReadShape(const JsonFields& fields, ModelConfig& config) {
  HEADSTART_ASSIGN_OR_RETURN(config.hidden_size, fields.Integer("hidden_size", 1, 1 << 20));
  HEADSTART_ASSIGN_OR_RETURN(config.num_layers, fields.Integer("num_hidden_layers", 1, 4096));
  HEADSTART_ASSIGN_OR_RETURN(config.intermediate_size,
                             fields.Integer("intermediate_size", 1, 1 << 22));
  HEADSTART_ASSIGN_OR_RETURN(config.vocab_size, fields.Integer("vocab_size", 1, 1 << 24));
  constexpr double kDefaultEps = 1e-6;  // Hugging Face's, for llama and qwen alike
  HEADSTART_ASSIGN_OR_RETURN(config.rms_norm_eps,
                             fields.NumberOr("rms_norm_eps", kDefaultEps, 0.0, 1.0));
  HEADSTART_ASSIGN_OR_RETURN(config.tie_word_embeddings,
                             fields.BoolOr("tie_word_embeddings", false));
  HEADSTART_ASSIGN_OR_RETURN(const std::string activation, fields.StringOr("hidden_act", "silu"));
  if (activation != "silu" && activation != "swish") {  // two names of one function
    return fields.Error("hidden_act", "is not supported (silu is)");
  }
  return ReadHeads(fields, config);
}

// Llama has its biases by two switches; Qwen2 always has them on q, k and v; Qwen3 has the first
// switch, and norms of q and k.
absl::Status ReadBiases(const JsonFields& fields, ModelConfig& config) {
  HEADSTART_ASSIGN_OR_RETURN(const bool attention_bias, fields.BoolOr("attention_bias", false));
  HEADSTART_ASSIGN_OR_RETURN(const bool mlp_bias, fields.BoolOr("mlp_bias", false));
  const bool is_qwen2 = config.architecture == "qwen2";
  config.qkv_bias = is_qwen2 || attention_bias;
  config.o_bias = !is_qwen2 && attention_bias;
  config.qk_norm = config.architecture == "qwen3";
  if (mlp_bias && config.architecture != "llama") {
    return fields.Error("mlp_bias", absl::StrCat("does not exist in ", config.architecture));
  }
  config.mlp_bias = mlp_bias;
  for (const absl::string_view name : {"use_qk_norm", "qk_layernorm", "qk_norm"}) {
    const json* value = fields.Find(name);
    if (value != nullptr && !IsUnset(*value) && !config.qk_norm) {
      return fields.Error(name, absl::StrCat("does not exist in ", config.architecture));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<DType> ReadDType(const JsonFields& fields) {
  HEADSTART_ASSIGN_OR_RETURN(std::string old_name, fields.StringOr("torch_dtype", ""));
  HEADSTART_ASSIGN_OR_RETURN(std::string name, fields.StringOr("dtype", old_name));
  if (!old_name.empty() && old_name != name)
    return fields.Error("torch_dtype", "differs from dtype");
  const absl::string_view field = fields.Has("dtype") ? "dtype" : "torch_dtype";
  const absl::string_view plain = absl::StripPrefix(name, "torch.");
  // "auto" was asked for when the config was written; every tensor says its own.
  if (plain.empty() || plain == "auto" || plain == "float32") return DType::kF32;
  if (plain == "bfloat16") return DType::kBF16;
  if (plain == "float16") return DType::kF16;
  return fields.Error(field, "is not supported (float32, bfloat16, float16 are)");
}

absl::Status ReadContext(const JsonFields& fields, ModelConfig& config) {
  HEADSTART_ASSIGN_OR_RETURN(const int64_t positions,
                             fields.Integer("max_position_embeddings", 1, kMaxPositionsLimit));
  HEADSTART_ASSIGN_OR_RETURN(config.rope, ParseRope(fields, positions));
  config.max_positions = RopeRange(config.rope, positions);
  if (!fields.Has("dual_chunk_attention_config")) return absl::OkStatus();
  // Dual-chunk attention is plain attention up to the original context, which is what we serve.
  HEADSTART_ASSIGN_OR_RETURN(const JsonFields dual_chunk,
                             fields.Object("dual_chunk_attention_config"));
  HEADSTART_ASSIGN_OR_RETURN(
      const int64_t original,
      dual_chunk.Integer("original_max_position_embeddings", 1, kMaxPositionsLimit));
  config.max_positions = std::min(config.max_positions, original);
  return absl::OkStatus();
}

// An id, a list of ids, or nothing. -1 is an id that no token has: what models without an end say.
absl::StatusOr<std::optional<std::vector<int32_t>>> ReadEosIds(const JsonFields& fields) {
  const json* value = fields.Find("eos_token_id");
  if (value == nullptr) return std::nullopt;
  std::vector<int32_t> ids;
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& id : list) {
    if (id.is_number_integer() && id == -1) continue;
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
      return fields.Error("eos_token_id", "is not a token id or a list of them");
    }
    ids.push_back(static_cast<int32_t>(id.get<uint64_t>()));
  }
  return ids;
}

absl::StatusOr<json> ParseObject(absl::string_view text, absl::string_view file) {
  HEADSTART_ASSIGN_OR_RETURN(json root, ParseJson(text, file, kConfigLimits));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": not a JSON object"));
  }
  return root;
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, absl::string_view file) {
  HEADSTART_ASSIGN_OR_RETURN(const json root, ParseObject(text, file));
  const JsonFields fields(root, std::string(file));
  ModelConfig config;
  HEADSTART_RETURN_IF_ERROR(ReadArchitecture(fields, config));
  HEADSTART_RETURN_IF_ERROR(CheckRestrictions(fields));
  HEADSTART_RETURN_IF_ERROR(ReadShape(fields, config));
  HEADSTART_RETURN_IF_ERROR(CheckWindow(fields, config));
  HEADSTART_RETURN_IF_ERROR(ReadBiases(fields, config));
  HEADSTART_ASSIGN_OR_RETURN(config.dtype, ReadDType(fields));
  HEADSTART_RETURN_IF_ERROR(ReadContext(fields, config));
  HEADSTART_ASSIGN_OR_RETURN(auto eos_token_ids, ReadEosIds(fields));
  config.eos_token_ids = std::move(eos_token_ids).value_or(std::vector<int32_t>());
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir, Links links) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(model_dir, links));
  constexpr absl::string_view kAdapter = "adapter_config.json";
  if (dir.Contains(kAdapter)) {
    return absl::InvalidArgumentError(absl::StrCat(
        dir.PathOf(kAdapter), ": adapters are not supported; merge it into the weights"));
  }
  HEADSTART_ASSIGN_OR_RETURN(const std::string text,
                             dir.ReadText("config.json", kConfigLimits.max_bytes));
  HEADSTART_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(text, dir.PathOf("config.json")));
  constexpr absl::string_view kGeneration = "generation_config.json";
  if (!dir.Contains(kGeneration)) return config;
  HEADSTART_ASSIGN_OR_RETURN(const std::string generation,
                             dir.ReadText(kGeneration, kConfigLimits.max_bytes));
  HEADSTART_ASSIGN_OR_RETURN(const json root, ParseObject(generation, dir.PathOf(kGeneration)));
  HEADSTART_ASSIGN_OR_RETURN(auto ids, ReadEosIds(JsonFields(root, dir.PathOf(kGeneration))));
  if (ids) config.eos_token_ids = *std::move(ids);
  return config;
}

}  // namespace headstart
