// What a client receives is what the engine computed, byte for byte, and it comes while the engine
// computes.
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/checksum.h"
#include "engine/attention_options.h"
#include "tests/e2e/live_server.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::BackendCall;
using testing::Compute;
using testing::Computed;
using testing::LiveServer;
using testing::LiveServerOptions;
using testing::Notification;
using testing::Receive;
using testing::Received;
using testing::RequestOf;
using testing::SomePrompt;

// FAST with little enough kept that prompts of a few hundred tokens run sparse.
v1::PrefillRequest SparseRequest(const std::vector<uint32_t>& ids) {
  v1::PrefillRequest request = RequestOf(ids, v1::ATTENTION_PRESET_FAST);
  v1::AttentionOptions& attention = *request.mutable_attention();
  attention.set_gamma(0.2f);
  attention.set_floor_tokens(128);
  attention.set_dense_below_tokens(128);
  attention.set_dense_tail_blocks(0);
  return request;
}

// The same for the engine.
ProxyAttnOptions SparseOptions(const HeadShape& heads) {
  ProxyAttnOptions options = ResolvePreset(AttentionPreset::kFast, heads);
  options.gamma = 0.2f;
  options.floor_tokens = 128;
  options.dense_below_tokens = 128;
  options.dense_tail_blocks = 0;
  return options;
}

PrefillRequest Local(const v1::PrefillRequest& request, const HeadShape& heads) {
  PrefillRequest local;
  local.token_ids.assign(request.token_ids().begin(), request.token_ids().end());
  const bool dense = request.attention().preset() == v1::ATTENTION_PRESET_EXACT;
  local.preset = dense ? AttentionPreset::kExact : AttentionPreset::kFast;
  local.attention = dense ? ResolvePreset(AttentionPreset::kExact, heads) : SparseOptions(heads);
  return local;
}

void ExpectSame(const Received& received, const Computed& computed) {
  EXPECT_TRUE(received.kv == computed.kv) << "the KV differs";
  const v1::Completed& completed = received.outcome.completed;
  EXPECT_EQ(completed.first_token().id(), computed.result.first_token.id);
  EXPECT_EQ(completed.first_token().logprob(), computed.result.first_token.logprob);
  EXPECT_EQ(completed.statistics().executed_blocks(), computed.result.executed_blocks);
  EXPECT_EQ(completed.statistics().causal_blocks(), computed.result.causal_blocks);
  const auto& density = completed.manifest().layer_density();
  EXPECT_EQ(std::vector<float>(density.begin(), density.end()), computed.result.layer_density);
}

class StreamedKvTest : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    LiveServerOptions options;
    options.server.piece_tokens = GetParam();
    ASSERT_OK_AND_ASSIGN(server_, LiveServer::Start(options));
    ASSERT_OK_AND_ASSIGN(engine_, server_->MakeLocalEngine());
  }
  void ExpectStreamedEqualsLocal(const v1::PrefillRequest& request) {
    SCOPED_TRACE(absl::StrCat(request.token_ids_size(), " tokens"));
    ASSERT_OK_AND_ASSIGN(const Received received, Receive(server_->client_options(), request));
    ASSERT_OK_AND_ASSIGN(const Computed computed,
                         Compute(*engine_, Local(request, engine_->config().heads)));
    ExpectSame(received, computed);
    last_ = received.outcome;
  }

  std::unique_ptr<LiveServer> server_;
  std::unique_ptr<Engine> engine_;
  PrefillOutcome last_;
};

TEST_P(StreamedKvTest, DenseKvIsTheEngines) {
  for (const int64_t length : {1, 127, 128, 129, 700})
    ExpectStreamedEqualsLocal(RequestOf(SomePrompt(length)));
  EXPECT_EQ(last_.completed.manifest().attention().algorithm(),
            v1::AttentionProvenance::ALGORITHM_DENSE);
}

TEST_P(StreamedKvTest, SparseKvIsTheEngines) {
  for (const int64_t length : {129, 1000, 1500})
    ExpectStreamedEqualsLocal(SparseRequest(SomePrompt(length)));
  EXPECT_EQ(last_.completed.manifest().attention().algorithm(),
            v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  EXPECT_LT(last_.completed.statistics().executed_blocks(),
            last_.completed.statistics().causal_blocks())
      << "nothing was left out: this test would not see a sparse path";
}

INSTANTIATE_TEST_SUITE_P(PieceTokens, StreamedKvTest, ::testing::Values(128, 384, 8192));

TEST(StreamingTest, FirstChunkArrivesBeforeTheLastLayerIsComputed) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  const int32_t last_layer = server->num_layers() - 1;
  Notification got_chunk;
  bool last_layer_waited = false;
  // The last layer's attention does not begin until the client has a chunk. Were KV sent only at
  // the end, the two would wait for each other, and the client's timeout would end the request.
  server->backend().SetHook([&](const BackendCall& call) {
    if (call.op == "Attention" && call.layer == last_layer) {
      last_layer_waited = true;
      got_chunk.WaitForNotification();
    }
    return absl::OkStatus();
  });
  KvReceiverOptions receive;
  int64_t chunks = 0;
  receive.on_progress = [&](int64_t, int64_t) {
    if (chunks++ == 0) got_chunk.Notify();
  };
  const auto received = Receive(server->client_options(), RequestOf(SomePrompt(300)), receive);
  if (chunks == 0) got_chunk.Notify();  // let the server go
  EXPECT_OK(received);
  EXPECT_TRUE(last_layer_waited);
}

TEST(StreamingTest, RequestsThatInterleaveGetWhatTheyGetAlone) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  ASSERT_OK_AND_ASSIGN(const auto engine, server->MakeLocalEngine());
  std::vector<v1::PrefillRequest> requests;
  for (uint32_t i = 0; i < 12; ++i) {
    const std::vector<uint32_t> prompt = SomePrompt(50 + 97 * i, i);
    requests.push_back(i % 2 == 0 ? RequestOf(prompt) : SparseRequest(prompt));
  }
  std::vector<absl::StatusOr<Received>> received(requests.size(), absl::UnknownError("not run"));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < requests.size(); ++i) {
    threads.emplace_back([&, i] { received[i] = Receive(server->client_options(), requests[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSERT_OK(received[i].status());
    ASSERT_OK_AND_ASSIGN(const Computed computed,
                         Compute(*engine, Local(requests[i], engine->config().heads)));
    ExpectSame(*received[i], computed);
  }
  EXPECT_TRUE(server->BecomesIdle(absl::Seconds(1)));
}

TEST(StreamingTest, CallsOfOneClientShareItsConnection) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(server->client_options()));
  const int64_t before = server->server().Snapshot().connections_accepted;
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] { EXPECT_OK(client->Prefill(RequestOf(SomePrompt(200, i)), {})); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(server->server().Snapshot().connections_accepted, before + 1);
}

TEST(StreamingTest, ManifestSaysWhatRan) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  ASSERT_OK_AND_ASSIGN(const auto engine, server->MakeLocalEngine());
  const std::vector<uint32_t> prompt = SomePrompt(600);
  ASSERT_OK_AND_ASSIGN(const Received received,
                       Receive(server->client_options(), SparseRequest(prompt)));
  const v1::KvManifest& manifest = received.outcome.completed.manifest();
  EXPECT_EQ(manifest.model(), "tiny");
  EXPECT_EQ(manifest.model_hash(), engine->model_hash());
  EXPECT_EQ(manifest.token_hash(), TokenHash(prompt));
  EXPECT_EQ(manifest.layout().num_layers(), 6);
  EXPECT_EQ(manifest.layout().num_kv_heads(), 2);
  EXPECT_EQ(manifest.layout().head_dim(), 32);
  EXPECT_EQ(manifest.layout().dtype(), v1::KV_DTYPE_F32);
  EXPECT_EQ(manifest.layout().block_tokens(), 128);
  const v1::AttentionOptions& options = manifest.attention().options();
  EXPECT_EQ(options.preset(), v1::ATTENTION_PRESET_FAST);
  EXPECT_EQ(options.gamma(), 0.2f);
  EXPECT_EQ(options.floor_tokens(), 128);
  EXPECT_EQ(options.num_proxies(), 4) << "the preset's, resolved";
}

}  // namespace
}  // namespace headstart
