// Connections that a decent client would not make, and their limits.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server/raw_http2.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

constexpr char kPrefill[] = "/headstart.v1.PrefillService/Prefill";
constexpr char kModelInfo[] = "/headstart.v1.PrefillService/GetModelInfo";
constexpr absl::Duration kPatience = absl::Seconds(10);

// Trailers, which close the call.
bool IsEnd(const Frame& frame) {
  return frame.type == FrameType::kHeaders && (frame.flags & kEndStream) != 0;
}

// The first frame of that kind; none when it does not come.
std::optional<Frame> ReadUntil(RawHttp2& client, const std::function<bool(const Frame&)>& wanted) {
  std::optional<Frame> frame;
  do {
    frame = client.Read(kPatience);
  } while (frame && !wanted(*frame));
  return frame;
}

class ConnectionTest : public ServerTest {
 protected:
  void ExpectServes() {
    const CallResult result = Run(Prompt(5));
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  }
};

TEST_F(ConnectionTest, SilentConnectionsAreClosed) {
  options_.connections.handshake_timeout = absl::Milliseconds(300);
  Start();
  RawHttp2 silent(server_->port());
  RawHttp2 preface_only(server_->port());
  preface_only.Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  EXPECT_TRUE(silent.IsClosedWithin(kPatience));
  EXPECT_TRUE(preface_only.IsClosedWithin(kPatience));
  ExpectServes();
}

TEST_F(ConnectionTest, OtherProtocolsAreClosed) {
  Start();
  for (const char* greeting : {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01",
                               "SSH-2.0-OpenSSH_9.2\r\n"}) {
    RawHttp2 stranger(server_->port());
    stranger.Send(greeting);
    stranger.Send(std::string(64, '\0'));
    EXPECT_TRUE(stranger.IsClosedWithin(kPatience)) << greeting;
  }
  ExpectServes();
}

TEST_F(ConnectionTest, IdleConnectionsAreClosed) {
  options_.connections.max_idle = absl::Milliseconds(300);
  Start();
  RawHttp2 idle(server_->port());
  idle.Handshake();
  EXPECT_TRUE(idle.IsClosedWithin(kPatience));
  ExpectServes();
}

TEST_F(ConnectionTest, OldConnectionsAreClosedEvenWithCallsThatNeverSendTheirMessage) {
  options_.connections.max_age = absl::Milliseconds(300);
  options_.default_deadline = options_.max_deadline = absl::Milliseconds(300);
  options_.default_lease = options_.max_lease = absl::Milliseconds(300);
  Start();
  RawHttp2 old(server_->port());
  old.Handshake();
  old.OpenCall(1, kModelInfo);
  EXPECT_TRUE(old.IsClosedWithin(kPatience));
  ExpectServes();
}

TEST_F(ConnectionTest, CallsOutliveTheAgeOfTheirConnection) {
  options_.connections.max_age = absl::Milliseconds(100);
  options_.drain_timeout = absl::Milliseconds(1);  // is not for calls of a server that goes on
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto channel = NewChannel();
  const auto stub = v1::PrefillService::NewStub(channel);
  OpenCall call(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  // The server has told the client to go elsewhere.
  EXPECT_TRUE(ComesTrue([&] { return channel->GetState(false) != GRPC_CHANNEL_READY; }));
  EXPECT_EQ(Health(),
            "SERVING");  // as much time as the old connection needs to be closed, if it is
  barrier.Open();
  EXPECT_TRUE(call.Finish().status.ok());
}

TEST_F(ConnectionTest, PeerThatAnswersNoPingIsClosedAndItsRequestEnds) {
  options_.connections.keepalive_time = absl::Milliseconds(300);
  options_.connections.keepalive_timeout = absl::Milliseconds(300);
  Start();
  Barrier barrier(backend_, "Attention", 0);
  RawHttp2 frozen(server_->port());
  frozen.Handshake();
  frozen.OpenCall(1, kPrefill);
  const std::string request = Prompt(5).SerializeAsString();
  frozen.Send({FrameType::kData, kEndStream, 1, Framed(request)});
  barrier.WaitUntilReached();
  EXPECT_TRUE(frozen.IsClosedWithin(kPatience));
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
  EXPECT_EQ(Metric("headstart_requests_total{code=\"CANCELLED\",model=\"tiny\","
                   "reason=\"CLIENT_CANCELLED\"}"),
            1);
}

// Deadlines that lie beyond what 64 bits of nanoseconds count are far, not past: Go's longest
// duration, and the longest timeout that a call may name.
TEST_F(ConnectionTest, TakesTheLongestDeadlines) {
  Start();
  for (const char* timeout : {"8760H", "2562047H", "99999999H"}) {
    RawHttp2 patient(server_->port());
    patient.Handshake();
    patient.OpenCall(1, kPrefill, timeout);
    patient.Send({FrameType::kData, kEndStream, 1, Framed(Prompt(5).SerializeAsString())});
    const std::optional<Frame> answer = ReadUntil(
        patient, [](const Frame& frame) { return frame.type == FrameType::kData || IsEnd(frame); });
    ASSERT_TRUE(answer) << timeout;
    EXPECT_EQ(answer->type, FrameType::kData) << timeout << ": " << answer->payload;
  }
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
}

// gRPC hands such a message over as an empty one.
TEST_F(ConnectionTest, ACompressedFlagThatIsNoneIsAnError) {
  Start();
  for (const char flag : {'\x02', '\x07', '\xff'}) {
    RawHttp2 client(server_->port());
    client.Handshake();
    client.OpenCall(1, kPrefill);
    client.Send({FrameType::kData, kEndStream, 1, Framed(Prompt(5).SerializeAsString(), flag)});
    const std::optional<Frame> end = ReadUntil(client, IsEnd);
    ASSERT_TRUE(end);
    EXPECT_THAT(end->payload, HasSubstr("compressed flag is neither 0 nor 1"));
  }
  EXPECT_EQ(Metric("headstart_requests_total{code=\"INVALID_ARGUMENT\",model=\"tiny\","
                   "reason=\"INVALID_FIELD\"}"),
            3);
  ExpectServes();
}

TEST_F(ConnectionTest, PingFloodEndsTheConnection) {
  Start();
  RawHttp2 flood(server_->port());
  flood.Handshake();
  for (int i = 0; i < 20; ++i) flood.Send({FrameType::kPing, 0, 0, std::string(8, 'p')});
  bool calmed = false;
  for (auto frame = flood.Read(kPatience); frame && !calmed; frame = flood.Read(kPatience)) {
    calmed = frame->type == FrameType::kGoAway && frame->Number(4) == kEnhanceYourCalm;
  }
  EXPECT_TRUE(calmed);
  ExpectServes();
}

// A sender that keeps to flow control, whose message declares more than anyone would take.
TEST_F(ConnectionTest, HugeDeclaredMessageIsCutAtTheMemoryQuota) {
  constexpr int64_t kQuota = 16 << 20;
  options_.connections.receive_memory_bytes = kQuota;
  options_.connections.max_message_bytes = std::numeric_limits<int32_t>::max();
  Start();
  RawHttp2 client(server_->port());
  client.Handshake();
  client.OpenCall(1, kPrefill);
  int64_t window = 65535, stream_window = 65535, sent = 0;
  std::string data("\0\x7f\xff\xff\xff", 5);  // not compressed, 2 GiB - 1
  bool cut = false;
  while (!cut && sent < 8 * kQuota) {
    if (std::min(window, stream_window) >= 16384) {
      data.resize(16384, 'x');
      cut = !client.Send({FrameType::kData, 0, 1, data});
      window -= 16384;
      stream_window -= 16384;
      sent += 16384;
      continue;
    }
    const auto frame = client.Read(absl::Seconds(2));
    if (!frame || frame->type == FrameType::kRstStream || frame->type == FrameType::kGoAway) break;
    if (frame->type == FrameType::kWindowUpdate) {
      (frame->stream == 0 ? window : stream_window) += frame->Number(0);
    }
    for (size_t i = 0; frame->type == FrameType::kSettings && i + 6 <= frame->payload.size();
         i += 6) {
      const bool initial_window = frame->payload[i] == 0 && frame->payload[i + 1] == 4;
      if (initial_window) stream_window += frame->Number(i + 2) - 65535;
    }
  }
  EXPECT_LT(sent, 2 * kQuota);
  ExpectServes();
}

// A header block without an end, of which gRPC keeps everything while its limit is not
// acknowledged.
TEST_F(ConnectionTest, HeadersWithoutAnEndAreCut) {
  options_.connections.max_message_bytes = 1 << 20;
  Start();
  RawHttp2 flood(server_->port());
  flood.Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  flood.Send({FrameType::kSettings, 0, 0, ""});
  const std::string field = std::string("\0\3x-a\x64", 6) + std::string(100, 'b');
  std::string fields;
  while (fields.size() < 16000) fields += field;
  flood.Send({FrameType::kHeaders, 0, 1, field});
  int64_t sent = 0;
  const int64_t far_too_many = 256 << 20;
  while (sent < far_too_many && flood.Send({FrameType::kContinuation, 0, 1, fields})) {
    sent += std::ssize(fields);
  }
  EXPECT_LT(sent, far_too_many);
  ExpectServes();
}

TEST_F(ConnectionTest, CallsThatAreResetAtOnceAreCut) {
  Start();
  RawHttp2 flood(server_->port());
  flood.Handshake();
  const std::string cancel("\0\0\0\x08", 4);
  bool open = true;
  for (uint32_t stream = 1; open; stream += 2) {
    flood.OpenCall(stream, kPrefill);
    open = flood.Send({FrameType::kRstStream, 0, stream, cancel});
  }
  EXPECT_EQ(Metric("headstart_connections_cut_total{reason=\"abandoned_calls\"}"), 1);
  ExpectServes();
}

// Far more than a connection may hold unaccounted, but each message is a call's.
TEST_F(ConnectionTest, ManyLargeRequestsAreNotCut) {
  options_.connections.max_message_bytes = 64 << 10;
  Start();
  const auto stub = NewStub();
  v1::EstimateRequest request;
  request.mutable_request()->set_model(std::string(60 << 10, 'x'));
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    v1::EstimateResponse response;
    EXPECT_EQ(stub->Estimate(&context, request, &response).error_code(),
              grpc::StatusCode::NOT_FOUND);
  }
  EXPECT_EQ(Metric("headstart_connections_cut_total{reason=\"unaccounted_bytes\"}"), 0);
}

TEST_F(ConnectionTest, ConnectionsAboveTheLimitAreShedAndRecover) {
  options_.connections.max_connections = 3;
  Start();
  std::vector<std::unique_ptr<RawHttp2>> held;
  for (int i = 0; i < 3; ++i) {
    held.push_back(std::make_unique<RawHttp2>(server_->port()));
    held.back()->Handshake();
    ASSERT_TRUE(held.back()->Read(kPatience).has_value());
  }
  EXPECT_EQ(Run(Prompt(5)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Get("/healthz").status, 200);  // the check of itself goes past the limit
  EXPECT_EQ(Metric("headstart_connections"), 3);
  EXPECT_GE(Metric("headstart_connections_shed_total{reason=\"max_connections\"}"), 1);
  held.clear();
  EXPECT_TRUE(ComesTrue([this] { return Metric("headstart_connections") == 0; }));
  ExpectServes();
}

TEST_F(ConnectionTest, ManyShortConnectionsLeaveNothing) {
  Start();
  const double fds_before = Metric("process_open_fds");
  for (int i = 0; i < 200; ++i) {
    RawHttp2 hasty(server_->port());
    if (i % 2 == 0) hasty.Handshake();
    if (i % 4 == 0) hasty.OpenCall(1, kPrefill);
  }
  EXPECT_TRUE(ComesTrue([this] { return Metric("headstart_connections") == 0; }));
  EXPECT_LT(Metric("process_open_fds"), fds_before + 10);
  ExpectServes();
}

}  // namespace
}  // namespace headstart::testing
