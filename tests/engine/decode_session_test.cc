#include "engine/run/decode_session.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/engine/engine_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::KvCollector;
using testing::StatusIs;
using testing::TinyModelOptions;

class DecodeSessionTest : public EngineTest, public ::testing::WithParamInterface<std::string> {
 protected:
  DecodeOptions SessionOptions(int64_t max_tokens = 0) const {
    DecodeOptions options;
    options.model_dir = dir_.path();
    options.backend = Options(dir_.path()).backend;
    options.max_tokens = max_tokens;
    return options;
  }
  // Imports what the sink got.
  static absl::Status Import(const TestEngine& test, const KvCollector& sink, int64_t num_tokens,
                             DecodeSession& session) {
    HEADSTART_RETURN_IF_ERROR(session.StartSequence(num_tokens));
    for (int32_t layer = 0; layer < session.config().num_layers; ++layer) {
      HEADSTART_RETURN_IF_ERROR(
          session.ImportLayer(layer, test.Keys(sink, layer), test.Values(sink, layer)));
    }
    return absl::OkStatus();
  }
};

// Steps from imported KV equal prefills of the prompts that are longer by these tokens.
TEST_P(DecodeSessionTest, ContinuesLikeAPrefillOfTheLongerPrompt) {
  TinyModelOptions model;
  model.architecture = GetParam();
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine(model));
  ASSERT_OK_AND_ASSIGN(const auto session, DecodeSession::Create(SessionOptions(), nullptr));
  EXPECT_EQ(session->model_hash(), test.engine->model_hash());
  // The third fills a page, so that the steps begin another one.
  for (const int64_t num_tokens : {1, 300, 384}) {
    PrefillRequest job;
    job.token_ids = RandomTokens(num_tokens);
    KvCollector sink;
    ASSERT_OK_AND_ASSIGN(PrefillResult prefill, sink.Run(*test.engine, job));
    ASSERT_OK(Import(test, sink, num_tokens, *session));
    for (int step = 0; step < 4; ++step) {
      job.token_ids.push_back(prefill.first_token.id);
      ASSERT_OK_AND_ASSIGN(const SampledToken token, session->Step(prefill.first_token.id));
      KvCollector longer;
      ASSERT_OK_AND_ASSIGN(prefill, longer.Run(*test.engine, job));
      EXPECT_EQ(token.id, prefill.first_token.id) << num_tokens << " + " << step;
      EXPECT_NEAR(token.logprob, prefill.first_token.logprob, 1e-4);
      EXPECT_EQ(session->num_tokens(), num_tokens + step + 1);
      EXPECT_EQ(session->logits().size(), 256);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, DecodeSessionTest,
                         ::testing::Values("llama", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

using DecodeSessionErrorsTest = DecodeSessionTest;

TEST_F(DecodeSessionErrorsTest, AnEmptySequenceNeedsNoImport) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  ASSERT_OK_AND_ASSIGN(const auto session, DecodeSession::Create(SessionOptions(), nullptr));
  SampledToken token;
  for (const int32_t id : {5, 6, 7}) {
    ASSERT_OK_AND_ASSIGN(token, session->Step(id));
  }
  PrefillRequest job;
  job.token_ids = {5, 6, 7};
  KvCollector sink;
  ASSERT_OK_AND_ASSIGN(const PrefillResult prefill, sink.Run(*test.engine, job));
  EXPECT_EQ(token.id, prefill.first_token.id);
}

TEST_F(DecodeSessionErrorsTest, RefusesToRunWithLayersMissing) {
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), {}));
  ASSERT_OK_AND_ASSIGN(const auto session, DecodeSession::Create(SessionOptions(), nullptr));
  ASSERT_OK(session->StartSequence(2));
  const std::vector<std::byte> plane(2 * 2 * 32 * 4);
  ASSERT_OK(session->ImportLayer(0, plane, plane));
  EXPECT_THAT(session->Step(1), StatusIs(absl::StatusCode::kFailedPrecondition,
                                         HasSubstr("layer 1 was not imported")));
  ASSERT_OK(session->ImportLayer(1, plane, plane));
  EXPECT_OK(session->Step(1));
  ASSERT_OK(session->StartSequence(2));  // what was imported before does not count
  EXPECT_THAT(session->Step(1), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(session->logits(), IsEmpty());
}

TEST_F(DecodeSessionErrorsTest, RefusesKvOfAnotherSize) {
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), {}));
  ASSERT_OK_AND_ASSIGN(const auto session, DecodeSession::Create(SessionOptions(), nullptr));
  ASSERT_OK(session->StartSequence(3));
  const std::vector<std::byte> right(2 * 3 * 32 * 4), wrong(2 * 2 * 32 * 4);
  EXPECT_THAT(session->ImportLayer(0, wrong, right),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("K of 512 and V of 768 bytes in layer 0, each must have 768")));
  EXPECT_THAT(session->ImportLayer(0, right, wrong), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(session->ImportLayer(2, right, right),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("layer=2")));
  EXPECT_THAT(session->ImportLayer(-1, right, right), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(DecodeSessionErrorsTest, KeepsToItsRoom) {
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), {}));
  EXPECT_THAT(DecodeSession::Create(SessionOptions(5000), nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("max_tokens=5000")));
  ASSERT_OK_AND_ASSIGN(const auto session, DecodeSession::Create(SessionOptions(3), nullptr));
  EXPECT_THAT(session->StartSequence(4),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_tokens=4")));
  EXPECT_OK(session->Step(0));
  EXPECT_OK(session->Step(0));
  EXPECT_OK(session->Step(0));
  EXPECT_THAT(session->Step(0), StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("max_tokens=3")));
  EXPECT_THAT(session->Step(256),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_id=256")));
}

}  // namespace
}  // namespace headstart
