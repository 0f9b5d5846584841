#include "tests/testing/tiny_model.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart::testing {
namespace {

using nlohmann::json;

// SplitMix64 (Steele, Lea, Flood 2014): the same numbers with every standard library.
class Random {
 public:
  Random(absl::string_view name, uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u) {
    for (const char c : name) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  // Normal with mean 0 and deviation 1 (Box and Muller).
  double Normal() {
    const double u = Uniform();
    const double v = Uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }

 private:
  // In (0, 1].
  double Uniform() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (static_cast<double>((z ^ (z >> 31)) >> 11) + 1.0) * 0x1p-53;
  }
  uint64_t state_;
};

// IEEE binary16 of a value whose magnitude is in the normal range or rounds to zero; to nearest,
// ties to even. Good enough for random weights.
uint16_t ToFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (std::fabs(value) < 0x1p-14f) return sign;
  const uint32_t magnitude = (bits & 0x7fffffffu) - (112u << 23);
  return sign | static_cast<uint16_t>((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

void Append(float value, DType dtype, std::vector<std::byte>& bytes) {
  const size_t at = bytes.size();
  bytes.resize(at + DTypeBytes(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(&bytes[at], &value, sizeof(value));
    return;
  }
  const uint16_t half = dtype == DType::kBF16 ? BFloat16(value).bits : ToFloat16(value);
  std::memcpy(&bytes[at], &half, sizeof(half));
}

struct TensorMaker {
  const TinyModelOptions& options;
  TensorMap tensors;

  // mean + deviation * normal.
  void Add(const std::string& name, std::vector<int64_t> shape, double mean, double deviation) {
    Random random(name, options.seed);
    TestTensor& tensor = tensors[name];
    tensor.dtype = options.dtype;
    tensor.shape = std::move(shape);
    int64_t elements = 1;
    for (const int64_t dim : tensor.shape) elements *= dim;
    for (int64_t i = 0; i < elements; ++i) {
      Append(static_cast<float>(mean + deviation * random.Normal()), options.dtype, tensor.bytes);
    }
  }
  void AddLinear(const std::string& name, int64_t out, int64_t in, bool bias) {
    Add(name + ".weight", {out, in}, 0.0, 1.0 / std::sqrt(static_cast<double>(in)));
    if (bias) Add(name + ".bias", {out}, 0.0, 0.2);
  }
  void AddNorm(const std::string& name, int64_t size) { Add(name + ".weight", {size}, 1.0, 0.2); }

  void AddLayer(int32_t layer) {
    const TinyModelOptions& o = options;
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const int64_t q_size = int64_t{o.num_heads} * o.head_dim;
    const int64_t kv_size = int64_t{o.num_kv_heads} * o.head_dim;
    const bool qkv_bias = o.attention_bias || o.architecture == "qwen2";
    AddNorm(prefix + "input_layernorm", o.hidden_size);
    AddLinear(prefix + "self_attn.q_proj", q_size, o.hidden_size, qkv_bias);
    AddLinear(prefix + "self_attn.k_proj", kv_size, o.hidden_size, qkv_bias);
    AddLinear(prefix + "self_attn.v_proj", kv_size, o.hidden_size, qkv_bias);
    AddLinear(prefix + "self_attn.o_proj", o.hidden_size, q_size, o.attention_bias);
    if (o.architecture == "qwen3") {
      AddNorm(prefix + "self_attn.q_norm", o.head_dim);
      AddNorm(prefix + "self_attn.k_norm", o.head_dim);
    }
    AddNorm(prefix + "post_attention_layernorm", o.hidden_size);
    AddLinear(prefix + "mlp.gate_proj", o.intermediate_size, o.hidden_size, o.mlp_bias);
    AddLinear(prefix + "mlp.up_proj", o.intermediate_size, o.hidden_size, o.mlp_bias);
    AddLinear(prefix + "mlp.down_proj", o.hidden_size, o.intermediate_size, o.mlp_bias);
  }
};

const char* StoredName(DType dtype) {
  if (dtype == DType::kF32) return "F32";
  return dtype == DType::kBF16 ? "BF16" : "F16";
}

const char* TorchName(DType dtype) {
  if (dtype == DType::kF32) return "float32";
  return dtype == DType::kBF16 ? "bfloat16" : "float16";
}

void AddRope(const TinyModelOptions& options, json& config) {
  json scaling = options.rope_scaling.empty() ? json() : json::parse(options.rope_scaling);
  if (options.spelling == ConfigSpelling::kOld) {
    config["rope_theta"] = options.rope_theta;
    config["rope_scaling"] = scaling;
    return;
  }
  if (scaling.is_null()) scaling = {{"rope_type", "default"}};
  scaling["rope_theta"] = options.rope_theta;
  config["rope_parameters"] = scaling;
}

}  // namespace

std::string TinyModelConfig(const TinyModelOptions& options) {
  json config = {{"model_type", options.architecture},
                 {"hidden_size", options.hidden_size},
                 {"num_hidden_layers", options.num_layers},
                 {"num_attention_heads", options.num_heads},
                 {"num_key_value_heads", options.num_kv_heads},
                 {"head_dim", options.head_dim},
                 {"intermediate_size", options.intermediate_size},
                 {"vocab_size", options.vocab_size},
                 {"max_position_embeddings", options.max_positions},
                 {"rms_norm_eps", 1e-5},
                 {"hidden_act", "silu"},
                 {"tie_word_embeddings", options.tie_word_embeddings},
                 {"eos_token_id", 2}};
  if (options.architecture != "qwen2") config["attention_bias"] = options.attention_bias;
  if (options.architecture == "llama") config["mlp_bias"] = options.mlp_bias;
  const bool old = options.spelling == ConfigSpelling::kOld;
  config[old ? "torch_dtype" : "dtype"] = TorchName(options.dtype);
  AddRope(options, config);
  return config.dump(2);
}

TensorMap TinyModelTensors(const TinyModelOptions& options) {
  TensorMaker maker{options, {}};
  maker.Add("model.embed_tokens.weight", {options.vocab_size, options.hidden_size}, 0.0, 1.0);
  for (int32_t layer = 0; layer < options.num_layers; ++layer) maker.AddLayer(layer);
  maker.AddNorm("model.norm", options.hidden_size);
  if (!options.tie_word_embeddings) {
    maker.AddLinear("lm_head", options.vocab_size, options.hidden_size, false);
  }
  return std::move(maker.tensors);
}

std::string SafetensorsFile(absl::string_view header_json, absl::string_view data) {
  static_assert(std::endian::native == std::endian::little);
  const uint64_t length = header_json.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return absl::StrCat(file, header_json, data);
}

std::string SafetensorsFile(const TensorMap& tensors) {
  json header = json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const int64_t begin = static_cast<int64_t>(data.size());
    data.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
    header[name] = {{"dtype", StoredName(tensor.dtype)},
                    {"shape", tensor.shape},
                    {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return SafetensorsFile(text, data);
}

absl::Status WriteFile(const std::string& path, absl::string_view content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("can't write ", path));
}

absl::Status WriteWeights(const std::string& dir, const TensorMap& tensors, int32_t num_shards) {
  HEADSTART_CHECK(num_shards >= 1);
  if (num_shards == 1) return WriteFile(dir + "/model.safetensors", SafetensorsFile(tensors));
  std::vector<TensorMap> shards(num_shards);
  json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
  size_t next = 0;
  int64_t total_size = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = next++ % shards.size();
    shards[shard][name] = tensor;
    total_size += static_cast<int64_t>(tensor.bytes.size());
    index["weight_map"][name] =
        absl::StrFormat("model-%05d-of-%05d.safetensors", shard + 1, num_shards);
  }
  index["metadata"]["total_size"] = total_size;
  for (size_t i = 0; i < shards.size(); ++i) {
    HEADSTART_RETURN_IF_ERROR(
        WriteFile(absl::StrFormat("%s/model-%05d-of-%05d.safetensors", dir, i + 1, num_shards),
                  SafetensorsFile(shards[i])));
  }
  return WriteFile(dir + "/model.safetensors.index.json", index.dump());
}

absl::Status WriteTinyModel(const std::string& dir, const TinyModelOptions& options) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) return absl::InternalError(absl::StrCat("can't make ", dir, ": ", error.message()));
  HEADSTART_RETURN_IF_ERROR(WriteFile(dir + "/config.json", TinyModelConfig(options)));
  HEADSTART_RETURN_IF_ERROR(
      WriteFile(dir + "/generation_config.json", R"({"eos_token_id": [2, 3]})"));
  return WriteWeights(dir, TinyModelTensors(options), options.num_shards);
}

}  // namespace headstart::testing
