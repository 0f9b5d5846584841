// A long prompt ships through a window of host memory that holds a part of its KV.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/e2e/live_server.h"
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

class HostMemoryTest : public ::testing::Test {
 protected:
  void Start(LiveServerOptions options = {}) {
    options.model = testing::LargeKvModel();
    ASSERT_OK_AND_ASSIGN(server_, LiveServer::Start(options));
    ASSERT_OK_AND_ASSIGN(const auto engine, server_->MakeLocalEngine());
    PrefillRequest request;
    request.token_ids.assign(prompt_.begin(), prompt_.end());
    request.attention = ResolvePreset(AttentionPreset::kExact, engine->config().heads);
    ASSERT_OK_AND_ASSIGN(const Computed computed, Compute(*engine, request));
    expected_ = computed.kv;
  }

  const std::vector<uint32_t> prompt_ = SomePrompt(3000);
  std::unique_ptr<LiveServer> server_;
  std::vector<std::byte> expected_;
};

TEST_F(HostMemoryTest, LongPromptShipsThroughLittleHostMemory) {
  LiveServerOptions options;
  options.server.piece_tokens = 512;
  options.server.host_kv_bytes = 8 << 20;  // of 24 MiB of KV
  Start(options);
  PrefillClientOptions client = server_->client_options();
  client.connections = 3;
  ASSERT_OK_AND_ASSIGN(const Received received, Receive(client, RequestOf(prompt_)));
  EXPECT_TRUE(received.kv == expected_);
  EXPECT_TRUE(server_->BecomesIdle(absl::Seconds(1))) << server_->WhatIsLeft();
}

}  // namespace
}  // namespace headstart
