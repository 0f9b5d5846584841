// Connections that stop in the middle of what they say, and many that say nothing.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server/raw_http2.h"
#include "tests/server/server_fixture.h"

namespace headstart::testing {
namespace {

constexpr absl::Duration kLimit = absl::Seconds(10);

class HalfCallTest : public ServerTest {
 protected:
  void ExpectServesOthers() {
    const CallResult result = Run(Prompt(5));
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  }
};

TEST_F(HalfCallTest, HeadersThatDoNotEndAreClosedWithTheIdleOnes) {
  options_.connections.max_idle = absl::Milliseconds(300);
  Start();
  RawHttp2 half_a_block(server_->port());
  half_a_block.Handshake();
  half_a_block.Send({FrameType::kHeaders, 0, 1, ""});  // CONTINUATION never comes
  RawHttp2 half_a_frame(server_->port());
  half_a_frame.Handshake();
  half_a_frame.Send(Encode({FrameType::kHeaders, kEndHeaders, 1, "abcdef"}).substr(0, 12));
  EXPECT_TRUE(half_a_block.IsClosedWithin(kLimit));
  EXPECT_TRUE(half_a_frame.IsClosedWithin(kLimit));
  ExpectServesOthers();
}

TEST_F(HalfCallTest, ManyIdleConnectionsDoNotHinderOthers) {
  constexpr int64_t kMany = 300;
  options_.connections.max_connections_per_peer = kMany + 10;
  Start();
  std::vector<std::unique_ptr<RawHttp2>> idle;
  for (int64_t i = 0; i < kMany; ++i) {
    idle.push_back(std::make_unique<RawHttp2>(server_->port()));
    idle.back()->Handshake();
    ASSERT_TRUE(idle.back()->Read(kLimit).has_value()) << i;
  }
  EXPECT_EQ(Metric("headstart_connections"), kMany);
  ExpectServesOthers();
  idle.clear();
  EXPECT_TRUE(ComesTrue([this] { return Metric("headstart_connections") == 0; }));
}

}  // namespace
}  // namespace headstart::testing
