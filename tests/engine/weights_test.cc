#include "engine/model/weights.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "engine/model/tensor_scan.h"
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

StoredTensor Stored(const std::string& bytes, DType dtype) {
  return {"file",
          dtype,
          {static_cast<int64_t>(bytes.size()) / DTypeBytes(dtype)},
          reinterpret_cast<const std::byte*>(bytes.data()),
          static_cast<int64_t>(bytes.size())};
}

TEST(TensorScanTest, ChecksumIsCrc32c) {
  // Check value of CRC-32C: "123456789" -> e3069283. The extra byte makes whole f16 values; the
  // second vector is 32 zero bytes (RFC 3720, B.4).
  std::string nine = "123456789";
  StoredTensor tensor = Stored(nine, DType::kF16);
  tensor.bytes = 9;
  EXPECT_EQ(ScanTensor(tensor).crc32c, 0xe3069283u);
  EXPECT_EQ(ScanTensor(Stored(std::string(32, '\0'), DType::kF32)).crc32c, 0x8a9136aau);
}

TEST(TensorScanTest, FindsTheFirstValueThatIsNotFinite) {
  // Longer than the pieces that the scan works in, and at an odd address.
  constexpr int64_t kCount = 300'000;
  for (const auto& [dtype, infinity] :
       {std::pair{DType::kBF16, uint16_t{0xff80}}, std::pair{DType::kF16, uint16_t{0x7c00}}}) {
    std::string bytes(2 * kCount + 1, '\1');
    StoredTensor tensor = Stored(bytes, dtype);
    ++tensor.data;
    tensor.bytes = 2 * kCount;
    EXPECT_EQ(ScanTensor(tensor).first_nonfinite, -1);
    for (const int64_t index : {kCount - 1, int64_t{131'072}, int64_t{0}}) {
      std::memcpy(bytes.data() + 1 + 2 * index, &infinity, sizeof(infinity));
      EXPECT_EQ(ScanTensor(tensor).first_nonfinite, index);
    }
  }
  std::string floats(4 * kCount, '\0');
  const uint32_t nan = 0x7f800001u;
  std::memcpy(floats.data() + 4 * 77'777, &nan, sizeof(nan));
  EXPECT_EQ(ScanTensor(Stored(floats, DType::kF32)).first_nonfinite, 77'777);
}

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

TEST_F(WeightsTest, LeavesOutWhatIsKnownToCarryNothing) {
  TinyModelOptions options;
  TensorMap tensors = TinyModelTensors(options);
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"];
  EXPECT_OK(LoadTensors(options, tensors));
  options.tie_word_embeddings = true;
  ASSERT_OK_AND_ASSIGN(const ModelWeights tied, LoadTensors(options, tensors));
  EXPECT_EQ(tied.model_hash, Hash(options));  // lm_head.weight is not used, so not hashed
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
  TinyModelOptions changed = base;
  changed.seed = 2;
  EXPECT_NE(Hash(changed), hash);
  changed = base;
  changed.rope_theta = 500000.0;
  EXPECT_NE(Hash(changed), hash);
  changed = base;
  changed.dtype = DType::kF32;
  EXPECT_NE(Hash(changed), hash);
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
