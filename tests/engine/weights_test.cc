#include "engine/model/weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>
#include <string>

#include "absl/strings/strip.h"
#include "engine/model/model_hash.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/fault_backend.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using ::testing::AllOf;
using testing::FaultBackend;
using ::testing::HasSubstr;
using testing::StatusIs;
using testing::TempDir;
using testing::TensorMap;
using testing::TinyModelOptions;
using testing::TinyModelTensors;

constexpr int64_t kPositions = 128;

class WeightsTest : public ::testing::Test {
 protected:
  static TinyModelOptions Options(const std::string& architecture) {
    TinyModelOptions options;
    options.architecture = architecture;
    return options;
  }

  absl::StatusOr<ModelWeights> Load(const TinyModelOptions& options) {
    TempDir dir;
    HEADSTART_RETURN_IF_ERROR(testing::WriteTinyModel(dir.path(), options));
    return LoadDir(dir.path());
  }
  absl::StatusOr<ModelWeights> LoadTensors(const TinyModelOptions& options,
                                           const TensorMap& tensors) {
    TempDir dir;
    HEADSTART_RETURN_IF_ERROR(testing::WriteTinyModel(dir.path(), options));
    HEADSTART_RETURN_IF_ERROR(testing::WriteWeights(dir.path(), tensors, 1));
    return LoadDir(dir.path());
  }
  absl::StatusOr<ModelWeights> LoadDir(const std::string& dir) {
    HEADSTART_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(dir));
    HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(dir));
    return LoadWeights(config, *files, *backend_, kPositions, progress_);
  }
  std::string Hash(const TinyModelOptions& options) {
    const absl::StatusOr<ModelWeights> weights = Load(options);
    EXPECT_OK(weights);
    return weights.ok() ? weights->model_hash : "";
  }

  void SetUp() override {
    BackendOptions options;
    options.dtype = ComputeDType::kF32;
    ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(options));
    backend_ = std::make_unique<FaultBackend>(std::move(inner));
  }
  std::unique_ptr<FaultBackend> backend_;
  LoadProgress progress_;
};

class ArchitectureTest : public WeightsTest, public ::testing::WithParamInterface<std::string> {};

TEST_P(ArchitectureTest, LoadsEveryArchitecture) {
  ASSERT_OK_AND_ASSIGN(const ModelWeights weights, Load(Options(GetParam())));
  EXPECT_EQ(weights.layers.size(), 2);
  EXPECT_EQ(weights.layers[1].qkv->out_features(), (4 + 2 * 2) * 32);
  EXPECT_EQ(weights.layers[1].gate_up->out_features(), 2 * 96);
  EXPECT_EQ(weights.lm_head->out_features(), 256);
  EXPECT_EQ(weights.layers[0].q_norm.data() != nullptr, GetParam() == "qwen3");
}

TEST_P(ArchitectureTest, NamesEachTensorThatIsMissing) {
  const TinyModelOptions options = Options(GetParam());
  const TensorMap complete = TinyModelTensors(options);
  for (const auto& [name, tensor] : complete) {
    TensorMap tensors = complete;
    tensors.erase(name);
    EXPECT_THAT(LoadTensors(options, tensors),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("model.safetensors"),
                               HasSubstr("tensor \"" + name + "\" is missing"))));
  }
}

TEST_P(ArchitectureTest, RefusesATensorWithoutAPlace) {
  const TinyModelOptions options = Options(GetParam());
  TensorMap tensors = TinyModelTensors(options);
  tensors["model.layers.1.self_attn.o_proj.bias"] = tensors["model.norm.weight"];
  EXPECT_THAT(LoadTensors(options, tensors),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("o_proj.bias"), HasSubstr("has no place"))));
}

INSTANTIATE_TEST_SUITE_P(All, ArchitectureTest, ::testing::Values("llama", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

// Of old Llama checkpoints: head_dim 32, theta 10000.
testing::TestTensor InvFreq(double theta) {
  testing::TestTensor tensor{DType::kF32, {16}, std::vector<std::byte>(16 * sizeof(float))};
  for (int i = 0; i < 16; ++i) {
    const auto value = static_cast<float>(std::pow(theta, -i / 16.0));
    std::memcpy(&tensor.bytes[i * sizeof(value)], &value, sizeof(value));
  }
  return tensor;
}

TEST_F(WeightsTest, LeavesOutInverseFrequenciesThatSayWhatTheConfigSays) {
  const std::string name = "model.layers.0.self_attn.rotary_emb.inv_freq";
  for (const char* scaling : {"", R"({"rope_type":"linear","factor":4.0})"}) {
    TinyModelOptions options;
    options.rope_scaling = scaling;
    TensorMap tensors = TinyModelTensors(options);
    tensors[name] = InvFreq(10000);
    ASSERT_OK_AND_ASSIGN(const ModelWeights weights, LoadTensors(options, tensors));
    EXPECT_EQ(weights.model_hash, Hash(options));
    tensors[name] = InvFreq(10500);
    EXPECT_THAT(LoadTensors(options, tensors),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr(name), HasSubstr("is not what the RoPE"))));
  }
}

class HeadTest : public WeightsTest {
 protected:
  HeadTest() { tied_.tie_word_embeddings = true; }

  absl::StatusOr<std::string> HashOf(const TinyModelOptions& options, const TensorMap& tensors) {
    HEADSTART_ASSIGN_OR_RETURN(const ModelWeights weights, LoadTensors(options, tensors));
    return weights.model_hash;
  }

  const TinyModelOptions untied_;
  TinyModelOptions tied_;
  const TensorMap with_head_ = TinyModelTensors(untied_);
  const std::string embedding_ = "model.embed_tokens.weight";
  const std::string head_ = "lm_head.weight";
};

TEST_F(HeadTest, ThatDiffersIsUsedWhateverTheConfigSays) {
  ASSERT_OK_AND_ASSIGN(const std::string hash, HashOf(tied_, with_head_));
  EXPECT_EQ(hash, Hash(untied_));
  EXPECT_NE(hash, Hash(tied_));
}

TEST_F(HeadTest, ThatEqualsTheEmbeddingIsNoOtherModel) {
  TensorMap tensors = with_head_;
  tensors[head_] = tensors[embedding_];
  EXPECT_EQ(HashOf(tied_, tensors).value_or("none"), Hash(tied_));
  EXPECT_EQ(HashOf(untied_, tensors).value_or("none"), Hash(tied_));
}

TEST_F(HeadTest, MayBeSavedInPlaceOfATiedEmbedding) {
  TensorMap tensors = with_head_;
  tensors[head_] = tensors[embedding_];
  tensors.erase(embedding_);
  EXPECT_EQ(HashOf(tied_, tensors).value_or("none"), Hash(tied_));
  EXPECT_THAT(HashOf(untied_, tensors), StatusIs(absl::StatusCode::kInvalidArgument,
                                                 HasSubstr("\"" + embedding_ + "\" is missing")));
}

TEST_F(HeadTest, MayStandBesideABodyThatWasSavedAlone) {
  TensorMap tensors;
  for (const auto& [name, tensor] : with_head_) {
    tensors[std::string(absl::StripPrefix(name, "model."))] = tensor;
  }
  EXPECT_EQ(HashOf(untied_, tensors).value_or("none"), Hash(untied_));
  // Twice the same thing has no place.
  tensors["model.norm.weight"] = with_head_.at("model.norm.weight");
  EXPECT_THAT(HashOf(untied_, tensors), StatusIs(absl::StatusCode::kInvalidArgument,
                                                 HasSubstr("\"norm.weight\" has no place")));
}

TEST_F(WeightsTest, HashDoesNotDependOnSharding) {
  TinyModelOptions options;
  const std::string whole = Hash(options);
  EXPECT_EQ(whole.size(), 64);
  options.num_shards = 3;
  EXPECT_EQ(Hash(options), whole);
  options.spelling = testing::ConfigSpelling::kNew;
  EXPECT_EQ(Hash(options), whole);
}

TEST_F(WeightsTest, HashDependsOnWeightsAndConfiguration) {
  const TinyModelOptions base;
  const std::string hash = Hash(base);
  std::set<std::string> hashes = {hash};
  TinyModelOptions changed = base;
  changed.seed = 2;
  EXPECT_NE(Hash(changed), hash);
  changed = base;
  changed.rope_theta = 500000.0;
  EXPECT_NE(Hash(changed), hash);
  for (const char* scaling : {R"({"rope_type":"linear","factor":2.0})",
                              R"({"rope_type":"yarn","factor":2.0,"attention_factor":1.5})",
                              R"({"rope_type":"yarn","factor":2.0,"attention_factor":1.25})"}) {
    TinyModelOptions scaled = base;
    scaled.rope_scaling = scaling;
    EXPECT_TRUE(hashes.insert(Hash(scaled)).second) << scaling;
  }
  changed = base;
  changed.dtype = DType::kF32;
  EXPECT_NE(Hash(changed), hash);
}

TEST_F(WeightsTest, HashIsThatOfTheFilesWithoutLoading) {
  for (const char* architecture : {"llama", "qwen2", "qwen3"}) {
    TinyModelOptions options = Options(architecture);
    options.num_shards = 2;
    TempDir dir;
    ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
    ASSERT_OK_AND_ASSIGN(const ModelConfig config, ReadModelConfig(dir.path()));
    ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir.path()));
    EXPECT_EQ(HashModel(config, *files, 2).value_or("none"), Hash(options));
  }
}

TEST_F(WeightsTest, SaysWhenAFileIsCutWhileItIsRead) {
  TempDir dir;
  ASSERT_OK(testing::WriteTinyModel(dir.path(), TinyModelOptions{}));
  progress_ = [&](int64_t, int64_t) {
    std::filesystem::resize_file(dir / "model.safetensors", 1 << 15);
    return absl::OkStatus();
  };
  EXPECT_THAT(LoadDir(dir.path()), StatusIs(absl::StatusCode::kInvalidArgument,
                                            HasSubstr("model.safetensors: ends at byte 32768")));
}

TEST_F(WeightsTest, TakesTensorsAtOddAddresses) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    TinyModelOptions options;
    options.dtype = dtype;
    TempDir dir;
    ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
    ASSERT_OK_AND_ASSIGN(const ModelWeights aligned, LoadDir(dir.path()));
    // One more byte of padding shifts all data.
    const std::string file = testing::SafetensorsFile(TinyModelTensors(options));
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
    ASSERT_OK(testing::WriteFile(dir / "model.safetensors",
                                 testing::SafetensorsFile(file.substr(8, header_bytes) + " ",
                                                          file.substr(8 + header_bytes))));
    ASSERT_OK_AND_ASSIGN(const ModelWeights shifted, LoadDir(dir.path()));
    EXPECT_EQ(shifted.model_hash, aligned.model_hash);
    const auto* a = static_cast<const float*>(aligned.final_norm.data());
    const auto* b = static_cast<const float*>(shifted.final_norm.data());
    EXPECT_TRUE(std::equal(a, a + 64, b));
  }
}

TEST_F(WeightsTest, ReportsProgressUpToTheEnd) {
  int64_t last = 0;
  int64_t total = 0;
  progress_ = [&](int64_t done_bytes, int64_t total_bytes) {
    EXPECT_GT(done_bytes, last);
    last = done_bytes;
    total = total_bytes;
    return absl::OkStatus();
  };
  ASSERT_OK(Load(TinyModelOptions{}));
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0);
}

TEST_F(WeightsTest, WhoIsToldOfProgressMayEndIt) {
  int calls = 0;
  progress_ = [&](int64_t, int64_t) {
    return ++calls == 2 ? absl::CancelledError("enough") : absl::OkStatus();
  };
  EXPECT_THAT(Load(TinyModelOptions{}),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
  EXPECT_EQ(calls, 2);
}

TEST_F(WeightsTest, PassesTheBackendsErrorsOn) {
  for (const char* op : {"PrepareLinear", "PrepareVector", "PrepareTable", "PrepareRope"}) {
    backend_->SetHook([op](const testing::BackendCall& call) {
      return call.op == op ? absl::ResourceExhaustedError("no memory") : absl::OkStatus();
    });
    EXPECT_THAT(Load(TinyModelOptions{}),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory")))
        << op;
  }
}

}  // namespace
}  // namespace headstart
