// Detached KV through a real server: every part on any number of connections is what the engine
// computed, a stream that breaks goes on, and nothing is left behind.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "engine/attention_options.h"
#include "tests/e2e/live_server.h"
#include "tests/e2e/tcp_proxy.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::Compute;
using testing::Computed;
using testing::LiveServer;
using testing::LiveServerOptions;
using testing::Receive;
using testing::Received;
using testing::RequestOf;
using testing::SomePrompt;
using testing::StatusIs;

constexpr int64_t kTokens = 700;
constexpr int32_t kLayers = 4, kKvHeads = 4, kHeadDim = 16;

class LiveFetchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    LiveServerOptions options;
    options.model.num_layers = kLayers;
    options.model.num_heads = 8;
    options.model.num_kv_heads = kKvHeads;
    options.model.head_dim = kHeadDim;
    options.model.max_positions = 4096;
    options.server.piece_tokens = 384;
    ASSERT_OK_AND_ASSIGN(server_, LiveServer::Start(options));
    ASSERT_OK_AND_ASSIGN(const auto engine, server_->MakeLocalEngine());
    PrefillRequest local;
    local.token_ids.assign(request_.token_ids().begin(), request_.token_ids().end());
    local.preset = AttentionPreset::kExact;
    local.attention = ResolvePreset(AttentionPreset::kExact, engine->config().heads);
    ASSERT_OK_AND_ASSIGN(computed_, Compute(*engine, local));
  }
  void TearDown() override {
    EXPECT_TRUE(server_->BecomesIdle(absl::Seconds(10))) << server_->WhatIsLeft();
  }

  PrefillClientOptions ClientOptions(int connections) const {
    PrefillClientOptions options = server_->client_options();
    options.connections = connections;
    options.retry.max_attempts = 3;
    return options;
  }

  // What the engine made of some layers and heads, from a token on.
  std::vector<std::byte> Expected(const v1::KvPart& part, int64_t skip_tokens = 0) const {
    const int64_t row =
        static_cast<int64_t>(computed_.kv.size()) / (int64_t{2} * kLayers * kKvHeads * kTokens);
    const uint32_t layer_end =
        part.layer_count() == 0 ? kLayers : part.layer_begin() + part.layer_count();
    const uint32_t head_end =
        part.kv_head_count() == 0 ? kKvHeads : part.kv_head_begin() + part.kv_head_count();
    std::vector<std::byte> bytes;
    for (uint32_t plane = 2 * part.layer_begin(); plane < 2 * layer_end; ++plane) {
      for (uint32_t h = part.kv_head_begin(); h < head_end; ++h) {
        const auto head = computed_.kv.begin() + (int64_t{plane} * kKvHeads + h) * kTokens * row;
        bytes.insert(bytes.end(), head + skip_tokens * row, head + kTokens * row);
      }
    }
    return bytes;
  }

  // Sends the prompt, with these readers announced; where its KV is.
  KvLocation Detach(const std::vector<v1::KvPart>& readers) const {
    v1::PrefillRequest request = request_;
    request.mutable_detached()->mutable_readers()->Add(readers.begin(), readers.end());
    KvLocation location;
    KvReceiverOptions receive;
    receive.on_accepted = [&location](const v1::Accepted& accepted) {
      location = {.fetch_id = accepted.fetch_id(), .fetch_address = accepted.fetch_address()};
      return absl::OkStatus();
    };
    const auto client = PrefillClient::Create(ClientOptions(1));
    EXPECT_OK((*client)->Prefill(request, receive));
    return location;
  }

  absl::StatusOr<std::vector<std::byte>> Fetch(const PrefillClient& client,
                                               const KvLocation& location, const v1::KvPart& part,
                                               int stripes, FetchOutcome* outcome = nullptr) const {
    std::vector<std::byte> kv;
    KvReceiverOptions receive;
    receive.on_manifest = [&kv](const v1::KvManifest&, const KvShape& shape) {
      kv.assign(shape.total_bytes(), std::byte{0});
      return ContiguousKv(shape, absl::MakeSpan(kv));
    };
    const auto fetched = client.Fetch(location, part, stripes, receive);
    if (!fetched.ok()) return fetched.status();
    if (outcome != nullptr) *outcome = *fetched;
    return kv;
  }

  const v1::PrefillRequest request_ = RequestOf(SomePrompt(kTokens));
  std::unique_ptr<LiveServer> server_;
  Computed computed_;
};

TEST_F(LiveFetchTest, AnyNumberOfConnectionsBringsWhatTheEngineComputed) {
  for (const int connections : {1, 2, 3, 8}) {
    for (const uint32_t skip_tokens : {0u, 128u, 300u, 699u}) {
      SCOPED_TRACE(absl::StrCat(connections, " connections, skips ", skip_tokens));
      v1::PrefillRequest request = request_;
      request.set_skip_tokens(skip_tokens);
      ASSERT_OK_AND_ASSIGN(const Received received, Receive(ClientOptions(connections), request));
      EXPECT_TRUE(received.kv == Expected({}, skip_tokens));
      EXPECT_EQ(received.outcome.completed.first_token().id(), computed_.result.first_token.id);
      EXPECT_EQ(received.outcome.connections, connections);
    }
  }
}

TEST_F(LiveFetchTest, RanksGetTheirHeadsAtTheSameTime) {
  for (const int ranks : {2, 4}) {
    std::vector<v1::KvPart> parts(ranks), readers;
    for (int r = 0; r < ranks; ++r) {
      parts[r].set_kv_head_begin(r * kKvHeads / ranks);
      parts[r].set_kv_head_count(kKvHeads / ranks);
      for (const v1::KvPart& stripe : StripesOf(parts[r], 2)) readers.push_back(stripe);
    }
    const KvLocation location = Detach(readers);
    std::vector<std::thread> threads;
    for (const v1::KvPart& part : parts) {
      threads.emplace_back([&, part] {
        const auto client = PrefillClient::Create(ClientOptions(1));
        const auto kv = Fetch(**client, location, part, 2);
        ASSERT_OK(kv);
        EXPECT_TRUE(*kv == Expected(part));
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(ClientOptions(1)));
    EXPECT_OK(client->ReleaseKv(location));
  }
}

TEST_F(LiveFetchTest, LayersMayBeFetchedApart) {
  const KvLocation location = Detach({});
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(ClientOptions(1)));
  for (const uint32_t begin : {0, 1, 3}) {
    v1::KvPart layers;
    layers.set_layer_begin(begin);
    layers.set_layer_count(1);
    ASSERT_OK_AND_ASSIGN(const auto kv, Fetch(*client, location, layers, 3));
    EXPECT_TRUE(kv == Expected(layers));
  }
  ASSERT_OK_AND_ASSIGN(const absl::Duration lease, client->RenewLease(location));
  EXPECT_GT(lease, absl::ZeroDuration());
  EXPECT_OK(client->ReleaseKv(location));
  const absl::Status gone = Fetch(*client, location, {}, 1).status();
  EXPECT_THAT(gone, StatusIs(absl::StatusCode::kNotFound));
  EXPECT_EQ(ErrorReasonOf(gone), "UNKNOWN_FETCH_ID");
}

// Every connection breaks after 30 % of what is to come.
TEST_F(LiveFetchTest, AFetchThatBreaksGoesOn) {
  const int64_t kv_bytes = static_cast<int64_t>(computed_.kv.size());
  const testing::TcpProxy proxy(server_->server().port(), {.cut_at = kv_bytes * 3 / 10});
  const KvLocation location = Detach({});
  PrefillClientOptions options = ClientOptions(1);
  options.target = proxy.target();
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options));
  FetchOutcome outcome;
  ASSERT_OK_AND_ASSIGN(const auto kv, Fetch(*client, location, {}, 1, &outcome));
  EXPECT_TRUE(kv == computed_.kv);
  EXPECT_GE(outcome.resumes, 3);
  ASSERT_OK_AND_ASSIGN(const auto direct, PrefillClient::Create(ClientOptions(1)));
  EXPECT_OK(direct->ReleaseKv(location));
}

}  // namespace
}  // namespace headstart
