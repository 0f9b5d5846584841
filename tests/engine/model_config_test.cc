#include "engine/model/model_config.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using testing::ConfigSpelling;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::StatusIs;
using testing::TempDir;
using testing::TinyModelConfig;
using testing::TinyModelOptions;
using testing::WriteFile;

absl::StatusOr<ModelConfig> Parse(const json& config) {
  return ParseModelConfig(config.dump(), "config.json");
}

json Base(const std::string& architecture = "llama") {
  TinyModelOptions options;
  options.architecture = architecture;
  return json::parse(TinyModelConfig(options));
}

json With(json config, const std::string& field, const json& value) {
  config[field] = value;
  return config;
}

TEST(ModelConfigTest, ReadsLlama31) {
  const json config = json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "use_cache": true, "vocab_size": 128256})");
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
  EXPECT_EQ(c.architecture, "llama");
  EXPECT_EQ(c.hidden_size, 4096);
  EXPECT_EQ(c.num_layers, 32);
  EXPECT_EQ(c.heads.num_heads, 32);
  EXPECT_EQ(c.heads.num_kv_heads, 8);
  EXPECT_EQ(c.heads.head_dim, 128);
  EXPECT_EQ(c.intermediate_size, 14336);
  EXPECT_EQ(c.vocab_size, 128256);
  EXPECT_EQ(c.max_positions, 131072);
  EXPECT_FLOAT_EQ(c.rms_norm_eps, 1e-5f);
  EXPECT_FALSE(c.tie_word_embeddings || c.qkv_bias || c.o_bias || c.mlp_bias || c.qk_norm);
  EXPECT_EQ(c.dtype, DType::kBF16);
  EXPECT_EQ(c.rope.type, RopeType::kLlama3);
  EXPECT_EQ(c.rope.original_max_positions, 8192);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_EQ(c.KvBytesPerToken(DType::kBF16), 131072);
}

TEST(ModelConfigTest, ReadsQwen25) {
  const json config = json::parse(R"({
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "use_sliding_window": false, "vocab_size": 151936, "eos_token_id": 151645})");
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
  EXPECT_TRUE(c.qkv_bias);
  EXPECT_FALSE(c.o_bias || c.mlp_bias || c.qk_norm);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.heads.head_dim, 128);
  EXPECT_EQ(c.rope.theta, 1e6);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(151645));
}

TEST(ModelConfigTest, ReadsQwen3AsTransformers5WritesIt) {
  const json config = json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "dtype": "bfloat16",
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 2, "num_key_value_heads": 8, "pad_token_id": null, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "sliding_window": null,
    "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})");
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
  EXPECT_TRUE(c.qk_norm);
  EXPECT_FALSE(c.qkv_bias || c.o_bias);
  EXPECT_EQ(c.heads.head_dim, 128);  // not hidden_size / num_attention_heads
  EXPECT_EQ(c.rope.theta, 1e6);
  EXPECT_EQ(c.dtype, DType::kBF16);
  EXPECT_THAT(c.eos_token_ids, IsEmpty());
}

TEST(ModelConfigTest, FillsInWhatOldConfigsLeaveOut) {
  json config = Base();
  for (const char* field : {"num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
                            "hidden_act", "tie_word_embeddings", "eos_token_id", "torch_dtype"}) {
    config.erase(field);
  }
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
  EXPECT_EQ(c.heads.num_kv_heads, c.heads.num_heads);
  EXPECT_EQ(c.heads.head_dim, c.hidden_size / c.heads.num_heads);
  EXPECT_EQ(c.rope, RopeConfig{});
  EXPECT_FALSE(c.tie_word_embeddings);
}

TEST(ModelConfigTest, TakesBiasesFromTheArchitecture) {
  ASSERT_OK_AND_ASSIGN(ModelConfig c, Parse(With(Base(), "attention_bias", true)));
  EXPECT_TRUE(c.qkv_bias && c.o_bias);
  ASSERT_OK_AND_ASSIGN(c, Parse(With(Base(), "mlp_bias", true)));
  EXPECT_TRUE(c.mlp_bias);
  EXPECT_FALSE(c.qkv_bias);
  ASSERT_OK_AND_ASSIGN(c, Parse(With(Base("qwen3"), "attention_bias", true)));
  EXPECT_TRUE(c.qkv_bias && c.o_bias && c.qk_norm);
  // Qwen2's biases are part of the architecture, whatever the field says.
  ASSERT_OK_AND_ASSIGN(c, Parse(With(Base("qwen2"), "attention_bias", false)));
  EXPECT_TRUE(c.qkv_bias);
  EXPECT_FALSE(c.o_bias);
}

TEST(ModelConfigTest, DualChunkAttentionIsServedUpToItsRange) {
  json config = With(Base("qwen2"), "max_position_embeddings", 1010000);
  config["dual_chunk_attention_config"] = {
      {"chunk_size", 262144}, {"local_size", 8192}, {"original_max_position_embeddings", 262144}};
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
  EXPECT_EQ(c.max_positions, 262144);
  config["dual_chunk_attention_config"].erase("original_max_position_embeddings");
  EXPECT_THAT(Parse(config),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("dual_chunk_attention_config"),
                             HasSubstr("original_max_position_embeddings is missing"))));
}

TEST(ModelConfigTest, ReadsTheDTypeInBothSpellings) {
  for (const auto& [name, dtype] :
       {std::pair{"float32", DType::kF32}, std::pair{"torch.bfloat16", DType::kBF16},
        std::pair{"float16", DType::kF16}}) {
    for (const char* field : {"torch_dtype", "dtype"}) {
      json config = Base();
      config.erase("torch_dtype");
      config[field] = name;
      ASSERT_OK_AND_ASSIGN(const ModelConfig c, Parse(config));
      EXPECT_EQ(c.dtype, dtype) << field << " " << name;
    }
  }
  EXPECT_THAT(Parse(With(Base(), "dtype", "float32")),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("torch_dtype=\"bfloat16\" differs from dtype")));
}

// What Hugging Face reads as if it were not there, or as something that we have.
TEST(ModelConfigTest, ReadsHarmlessOddities) {
  json config = Base();
  config["pretraining_tp"] = 2;
  config["hidden_act"] = "swish";
  config["torch_dtype"] = "auto";
  config["eos_token_id"] = -1;
  config.erase("rms_norm_eps");
  ASSERT_OK_AND_ASSIGN(ModelConfig c, Parse(config));
  EXPECT_EQ(c.rms_norm_eps, 1e-6f);
  EXPECT_THAT(c.eos_token_ids, IsEmpty());
  ASSERT_OK_AND_ASSIGN(c, Parse(With(Base(), "eos_token_id", {7, -1})));
  EXPECT_THAT(c.eos_token_ids, ElementsAre(7));
}

// Of a model of two layers.
TEST(ModelConfigTest, KnowsWhetherALayerHasAWindow) {
  const auto qwen = [](const json& fields) {
    json config = Base("qwen2");
    config.update(fields);
    return Parse(config);
  };
  const auto refused = StatusIs(absl::StatusCode::kInvalidArgument,
                                HasSubstr("sliding-window attention is not supported"));
  EXPECT_OK(qwen({{"use_sliding_window", true}}));  // from layer 28 on
  EXPECT_OK(qwen({{"use_sliding_window", true}, {"max_window_layers", 2}}));
  EXPECT_OK(
      qwen({{"use_sliding_window", true}, {"sliding_window", nullptr}, {"max_window_layers", 0}}));
  EXPECT_OK(qwen({{"use_sliding_window", true},
                  {"max_window_layers", 0},
                  {"layer_types", {"full_attention", "full_attention"}}}));
  EXPECT_OK(qwen({{"sliding_window", 4096}, {"max_window_layers", 0}}));  // not switched on
  EXPECT_THAT(qwen({{"use_sliding_window", true}, {"max_window_layers", 1}}), refused);
  EXPECT_THAT(
      qwen({{"use_sliding_window", true}, {"sliding_window", 64}, {"max_window_layers", 0}}),
      refused);
  EXPECT_OK(Parse(With(Base(), "use_sliding_window", true)));
  EXPECT_THAT(Parse(With(With(Base(), "use_sliding_window", true), "sliding_window", 64)), refused);
}

// json can't build these.
TEST(ModelConfigTest, NamesTheFieldOfANumberThatJsonDoesNotHave) {
  for (const char* number : {"Infinity", "NaN"}) {
    const std::string text = std::string(R"({"model_type": "llama", "rms_norm_eps": )") + number +
                             R"(, "vocab_size": 3})";
    EXPECT_THAT(ParseModelConfig(text, "config.json"),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("config.json: not JSON at byte 41"),
                               HasSubstr(std::string("\"") + number + "\""),
                               HasSubstr("after the key \"rms_norm_eps\""))));
  }
}

struct Refusal {
  std::string architecture;
  std::string field;
  std::string value;    // JSON
  std::string message;  // part of it
};

void PrintTo(const Refusal& refusal, std::ostream* out) {
  *out << refusal.architecture << " " << refusal.field << "=" << refusal.value;
}

class RefusalTest : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesFileAndField) {
  const Refusal& refusal = GetParam();
  const json config = With(Base(refusal.architecture), refusal.field, json::parse(refusal.value));
  EXPECT_THAT(Parse(config), StatusIs(absl::StatusCode::kInvalidArgument,
                                      AllOf(HasSubstr("config.json: " + refusal.field),
                                            HasSubstr(refusal.message))));
}

INSTANTIATE_TEST_SUITE_P(
    Features, RefusalTest,
    ::testing::Values(
        Refusal{"qwen2", "num_experts", "60", "mixture of experts"},
        Refusal{"llama", "num_local_experts", "8", "mixture of experts"},
        Refusal{"llama", "n_routed_experts", "64", "mixture of experts"},
        Refusal{"qwen3", "num_experts_per_tok", "8", "mixture of experts"},
        Refusal{"qwen3", "moe_intermediate_size", "768", "mixture of experts"},
        Refusal{"llama", "kv_lora_rank", "512", "latent attention"},
        Refusal{"llama", "q_lora_rank", "1536", "latent attention"},
        Refusal{"llama", "qk_rope_head_dim", "64", "latent attention"},
        Refusal{"llama", "quantization_config", R"({"quant_method": "awq"})", "quantised"},
        Refusal{"llama", "sliding_window", "4096", "sliding-window"},
        Refusal{"qwen3", "layer_types", R"(["full_attention", "sliding_attention"])",
                "another entry"},
        Refusal{"llama", "partial_rotary_factor", "0.5", "part of the head"},
        Refusal{"llama", "transformers_weights", R"("other.safetensors")", "another name"},
        Refusal{"llama", "rope_interleaved", "true", "interleaved RoPE"},
        Refusal{"llama", "no_rope_layers", "[1, 1, 1, 0]", "layers without RoPE"},
        Refusal{"llama", "final_logit_softcapping", "30.0", "soft-capped"},
        Refusal{"llama", "logits_scaling", "8.0", "scaled activations"},
        Refusal{"llama", "hidden_act", R"("gelu")", "is not supported"},
        Refusal{"llama", "model_type", R"("mixtral")", "is not supported"},
        Refusal{"llama", "architectures", R"(["LlamaForSequenceClassification"])",
                "is not [\"LlamaForCausalLM\"]"},
        Refusal{"qwen2", "mlp_bias", "true", "does not exist in qwen2"},
        Refusal{"llama", "use_qk_norm", "true", "does not exist in llama"},
        Refusal{"llama", "torch_dtype", R"("float8_e4m3fn")", "is not supported"}));

INSTANTIATE_TEST_SUITE_P(
    Values, RefusalTest,
    ::testing::Values(
        Refusal{"llama", "hidden_size", "-1", "=-1 is not in [1, 1048576]"},
        Refusal{"llama", "hidden_size", "18446744073709551615", "is not in [1, 1048576]"},
        Refusal{"llama", "hidden_size", "99999999999999999999999", "is not a whole number"},
        Refusal{"llama", "hidden_size", "64.0", "=64.0 is not a whole number"},
        Refusal{"llama", "hidden_size", R"("64")", "=\"64\" is not a whole number"},
        Refusal{"llama", "hidden_size", "null", " is missing"},
        Refusal{"llama", "num_hidden_layers", "0", "=0 is not in [1, 4096]"},
        Refusal{"llama", "num_attention_heads", "true", "is not a whole number"},
        Refusal{"llama", "num_key_value_heads", "3", "does not divide num_attention_heads=4"},
        Refusal{"llama", "num_key_value_heads", "8", "is not in [1, 4]"},
        Refusal{"llama", "head_dim", "17", "even number"},
        Refusal{"llama", "rms_norm_eps", "-1e-5", "is not in [0, 1]"},
        Refusal{"llama", "tie_word_embeddings", "1", "is not true or false"},
        Refusal{"llama", "eos_token_id", "-2", "is not a token id"},
        Refusal{"llama", "eos_token_id", "[2, \"3\"]", "is not a token id"},
        Refusal{"llama", "max_position_embeddings", "99999999999", "is not in [1, 16777216]"}));

// Values that nlohmann::json itself refuses to build are given as text.
TEST(ModelConfigTest, RefusesNumbersOutOfRange) {
  std::string text = Base().dump();
  text.replace(text.find("\"hidden_size\":64"), 16, "\"hidden_size\":1e999");
  EXPECT_THAT(ParseModelConfig(text, "config.json"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("config.json: not JSON")));
}

TEST(ModelConfigTest, RefusesHeadsThatDoNotShareTheHiddenSize) {
  json config = With(Base(), "hidden_size", 66);
  EXPECT_OK(Parse(config));  // has a head_dim of its own
  config.erase("head_dim");
  EXPECT_THAT(Parse(config), StatusIs(absl::StatusCode::kInvalidArgument,
                                      HasSubstr("hidden_size=66 is no multiple")));
}

TEST(ModelConfigTest, RefusesDuplicateKeys) {
  std::string text = Base().dump();
  text.insert(1, "\"hidden_size\": 128, ");
  EXPECT_THAT(ParseModelConfig(text, "config.json"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("config.json: duplicate key \"hidden_size\"")));
}

TEST(ModelConfigTest, IgnoresWhatIsSwitchedOff) {
  json config = Base("qwen2");
  config["num_experts"] = 0;
  config["quantization_config"] = nullptr;
  config["use_sliding_window"] = false;
  config["sliding_window"] = 4096;
  config["pretraining_tp"] = 1;
  config["partial_rotary_factor"] = 1.0;
  config["pruned_heads"] = json::object();
  EXPECT_OK(Parse(config));
}

class ModelDirTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK(WriteFile(dir_ / "config.json", Base().dump())); }
  TempDir dir_;
};

TEST_F(ModelDirTest, EosIdsOfTheGenerationConfigGoFirst) {
  ASSERT_OK_AND_ASSIGN(ModelConfig c, ReadModelConfig(dir_.path()));
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2));
  ASSERT_OK(WriteFile(dir_ / "generation_config.json", R"({"eos_token_id": [7, 8]})"));
  ASSERT_OK_AND_ASSIGN(c, ReadModelConfig(dir_.path()));
  EXPECT_THAT(c.eos_token_ids, ElementsAre(7, 8));
  ASSERT_OK(WriteFile(dir_ / "generation_config.json", R"({"temperature": 0.6})"));
  ASSERT_OK_AND_ASSIGN(c, ReadModelConfig(dir_.path()));
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2));
}

TEST_F(ModelDirTest, RefusesADamagedGenerationConfig) {
  ASSERT_OK(WriteFile(dir_ / "generation_config.json", R"({"eos_token_id": "two"})"));
  EXPECT_THAT(ReadModelConfig(dir_.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("generation_config.json: eos_token_id")));
}

TEST_F(ModelDirTest, RefusesAnAdapter) {
  ASSERT_OK(WriteFile(dir_ / "adapter_config.json", "{}"));
  EXPECT_THAT(ReadModelConfig(dir_.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("adapter_config.json: adapters are not supported")));
}

TEST_F(ModelDirTest, NamesAFolderThatIsNotThere) {
  EXPECT_THAT(ReadModelConfig(dir_ / "nowhere"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nowhere")));
}

}  // namespace
}  // namespace headstart
