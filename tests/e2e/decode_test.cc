// A decode node goes on from received KV as the engine would have gone on itself.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "client/decode/decode_node.h"
#include "kernels/base/status_macros.h"
#include "tests/e2e/live_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using testing::Compute;
using testing::Computed;
using ::testing::HasSubstr;
using testing::LiveServer;
using testing::LiveServerOptions;
using testing::RequestOf;
using testing::SomePrompt;
using testing::StatusIs;
using testing::TempDir;
using testing::TinyModelOptions;
using testing::WriteTinyModel;

// Greedy continuation without any cache: the whole text runs anew for every token.
std::vector<int32_t> ContinueAlone(Engine& engine, const std::vector<uint32_t>& prompt, int count) {
  PrefillRequest request;
  request.token_ids.assign(prompt.begin(), prompt.end());
  request.attention = ResolvePreset(AttentionPreset::kExact, engine.config().heads);
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) {
    const absl::StatusOr<Computed> computed = Compute(engine, request);
    EXPECT_OK(computed);
    if (!computed.ok()) break;
    tokens.push_back(computed->result.first_token.id);
    request.token_ids.push_back(tokens.back());
  }
  return tokens;
}

class DecodeTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    LiveServerOptions options;
    options.model.architecture = GetParam();
    ASSERT_OK_AND_ASSIGN(server_, LiveServer::Start(options));
    ASSERT_OK_AND_ASSIGN(engine_, server_->MakeLocalEngine());
  }
  DecodeNodeOptions NodeOptions(const std::vector<uint32_t>& prompt) const {
    DecodeNodeOptions options;
    options.client = server_->client_options();
    options.request = RequestOf(prompt);
    options.model_dir = server_->model_dir();
    options.backend.dtype = ComputeDType::kF32;
    options.backend.num_threads = 1;
    options.max_new_tokens = 12;
    options.ignore_eos = true;
    return options;
  }

  // Logits of one step from KV that came in this type.
  std::vector<float> StepFrom(const DecodeNodeOptions& options, v1::KvDtype dtype, int32_t token) {
    v1::PrefillRequest request = options.request;
    request.set_kv_dtype(dtype);
    const auto client = PrefillClient::Create(options.client);
    KvBuffer kv;
    KvShape shape;
    KvReceiverOptions receive;
    receive.on_manifest = [&](const v1::KvManifest&,
                              const KvShape& sent) -> absl::StatusOr<KvDestination> {
      const KvValues values = sent.has_scales() ? KvValues::kF32 : KvValues::kAsSent;
      shape = ShapeOfValues(sent, values);
      HEADSTART_ASSIGN_OR_RETURN(kv, AllocateKv(sent, values));
      return ContiguousKv(sent, kv.span(), values);
    };
    EXPECT_OK((*client)->Prefill(request, std::move(receive)).status());
    const auto session = DecodeSession::Create(
        {.model_dir = options.model_dir, .backend = options.backend, .max_tokens = 1024}, nullptr);
    EXPECT_OK((*session)->StartSequence(shape.num_tokens));
    const int64_t plane = shape.plane_bytes();
    for (int32_t l = 0; l < shape.num_layers; ++l) {
      EXPECT_OK((*session)->ImportLayer(l, kv.span().subspan(2 * l * plane, plane),
                                        kv.span().subspan((2 * l + 1) * plane, plane)));
    }
    EXPECT_OK((*session)->Step(token).status());
    const absl::Span<const float> logits = (*session)->logits();
    return {logits.begin(), logits.end()};
  }

  std::unique_ptr<LiveServer> server_;
  std::unique_ptr<Engine> engine_;
};

TEST_P(DecodeTest, ContinuesAsTheEngineAlone) {
  for (const int64_t length : {1, 5, 128, 250}) {
    const std::vector<uint32_t> prompt = SomePrompt(length, 7);
    std::vector<int32_t> told;
    ASSERT_OK_AND_ASSIGN(
        const DecodeNodeResult result,
        RunDecodeNode(NodeOptions(prompt), [&](int32_t token) { told.push_back(token); }));
    EXPECT_EQ(result.tokens, ContinueAlone(*engine_, prompt, 12)) << length;
    EXPECT_EQ(told, result.tokens);
    EXPECT_EQ(result.stop, "max_tokens");
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, DecodeTest, ::testing::Values("llama", "qwen2", "qwen3"));

using LlamaDecodeTest = DecodeTest;

TEST_P(LlamaDecodeTest, StopsAtAnEndToken) {
  const std::vector<uint32_t> prompt = SomePrompt(40, 7);
  const std::vector<int32_t> alone = ContinueAlone(*engine_, prompt, 12);
  // Declares the fifth token the end. Those before it that are the same end it earlier.
  const size_t end = std::find(alone.begin(), alone.end(), alone[4]) - alone.begin();
  ASSERT_OK(testing::WriteFile(server_->model_dir() + "/generation_config.json",
                               "{\"eos_token_id\": [" + std::to_string(alone[4]) + "]}"));
  DecodeNodeOptions options = NodeOptions(prompt);
  options.ignore_eos = false;
  ASSERT_OK_AND_ASSIGN(const DecodeNodeResult result, RunDecodeNode(options, [](int32_t) {}));
  EXPECT_EQ(result.stop, "eos");
  EXPECT_EQ(result.tokens, std::vector<int32_t>(alone.begin(), alone.begin() + end));
}

TEST_P(LlamaDecodeTest, StopsAtTheEndOfTheContext) {
  DecodeNodeOptions options = NodeOptions(SomePrompt(4090));
  ASSERT_OK_AND_ASSIGN(const DecodeNodeResult result, RunDecodeNode(options, [](int32_t) {}));
  EXPECT_EQ(result.stop, "context");
  EXPECT_EQ(result.tokens.size(), 7) << "the last one needs no place in the context";
}

TEST_P(LlamaDecodeTest, RefusesKvOfAnotherModel) {
  TempDir dir;
  LiveServerOptions same_shape;
  same_shape.model.seed = 2;
  ASSERT_OK(WriteTinyModel(dir.path(), same_shape.model));
  DecodeNodeOptions options = NodeOptions(SomePrompt(10));
  options.model_dir = dir.path();
  EXPECT_THAT(RunDecodeNode(options, [](int32_t) {}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(engine_->model_hash())));
}

TEST_P(LlamaDecodeTest, RefusesKvOfAnotherShape) {
  TempDir dir;
  TinyModelOptions model = LiveServerOptions().model;
  model.num_layers = 5;
  ASSERT_OK(WriteTinyModel(dir.path(), model));
  DecodeNodeOptions options = NodeOptions(SomePrompt(10));
  options.model_dir = dir.path();
  EXPECT_THAT(RunDecodeNode(options, [](int32_t) {}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("num_layers=6")));
}

TEST_P(LlamaDecodeTest, ARefusalDoesNotWaitForTheModel) {
  DecodeNodeOptions options = NodeOptions(SomePrompt(10));
  std::atomic<bool> loaded{false};
  options.on_load = [&](int64_t done_bytes, int64_t total_bytes) {
    loaded = done_bytes == total_bytes;
    absl::SleepFor(absl::Milliseconds(50));  // some seconds for all tensors
    return absl::OkStatus();
  };
  KvReceiverOptions receive;
  receive.on_accepted = [](const v1::Accepted&) { return absl::AbortedError("changed my mind"); };
  EXPECT_THAT(RunDecodeNode(
                  options, [](int32_t) {}, receive),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("changed my mind")));
  EXPECT_FALSE(loaded);
}

TEST_P(LlamaDecodeTest, RefusesTokensOutsideTheVocabularyBeforeItAsks) {
  EXPECT_THAT(RunDecodeNode(NodeOptions({1, 256}), [](int32_t) {}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("token_ids[1]=256 is not below vocab_size 256")));
}

// From fp8 KV: the logits stay near those from the full KV, by the bound that is stated here. Keys
// and values are off by at most 2^-4 of themselves, 2^-6 in the mean; what a tiny random model
// makes of that is less than a tenth of the spread of its logits.
TEST_P(LlamaDecodeTest, GoesOnFromFp8NearTheFullKv) {
  DecodeNodeOptions options = NodeOptions(SomePrompt(700, 3));
  ASSERT_OK_AND_ASSIGN(const DecodeNodeResult full, RunDecodeNode(options, [](int32_t) {}));
  options.request.set_kv_dtype(v1::KV_DTYPE_FP8_E4M3);
  ASSERT_OK_AND_ASSIGN(const DecodeNodeResult fp8, RunDecodeNode(options, [](int32_t) {}));
  EXPECT_EQ(fp8.tokens[0], full.tokens[0]) << "the server's, from the full KV";
  const auto bytes = [](const DecodeNodeResult& r) { return r.prefill.completed.kv_bytes(); };
  EXPECT_LT(bytes(fp8) * 3.9, bytes(full)) << "f32 has four times the bytes, but for the scales";

  const auto logits_of = [&](v1::KvDtype dtype) {
    return StepFrom(options, dtype, full.tokens[0]);
  };
  const std::vector<float> exact = logits_of(v1::KV_DTYPE_F32);
  const std::vector<float> near = logits_of(v1::KV_DTYPE_FP8_E4M3);
  ASSERT_EQ(exact.size(), near.size());
  double error = 0, spread = 0, mean = 0;
  for (const float logit : exact) mean += logit / static_cast<double>(exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(near[i] - exact[i], 2);
    spread += std::pow(exact[i] - mean, 2);
  }
  EXPECT_GT(error, 0);
  EXPECT_LT(std::sqrt(error / spread), 0.1);
}

INSTANTIATE_TEST_SUITE_P(Architectures, LlamaDecodeTest, ::testing::Values("llama"));

}  // namespace
}  // namespace headstart
