// Requests that end before their time: cancelled, too late, cut off, damaged, refused.
// Nothing stays behind.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/grpc_status.h"
#include "tests/e2e/live_server.h"
#include "tests/e2e/tcp_proxy.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::BackendCall;
using testing::Harm;
using testing::LiveServer;
using testing::LiveServerOptions;
using testing::Notification;
using testing::Receive;
using testing::Received;
using testing::RequestOf;
using testing::SomePrompt;
using testing::StatusIs;
using testing::TcpProxy;

constexpr absl::Duration kFreedWithin = absl::Seconds(1);

LiveServerOptions LargeKv() {
  LiveServerOptions options;
  options.model = testing::LargeKvModel();
  return options;
}

class EndingTest : public ::testing::Test {
 protected:
  void Start(const LiveServerOptions& options = {}) {
    ASSERT_OK_AND_ASSIGN(server_, LiveServer::Start(options));
  }

  // Every layer from `layer` on takes a while. `on_first` runs in the first of them, once.
  void SlowDownFrom(int32_t layer, std::function<void()> on_first) {
    server_->backend().SetHook(
        [layer, on_first = std::move(on_first), done = false](const BackendCall& call) mutable {
          if (call.op != "Attention" || call.layer < layer) return absl::OkStatus();
          if (!std::exchange(done, true)) on_first();
          absl::SleepFor(absl::Milliseconds(20));
          return absl::OkStatus();
        });
  }
  // And still does what it did before.
  void ExpectAliveAndIdle() {
    EXPECT_TRUE(server_->BecomesIdle(kFreedWithin));
    server_->backend().SetHook(nullptr);
    EXPECT_OK(Receive(server_->client_options(), RequestOf(SomePrompt(100))));
  }

  std::unique_ptr<LiveServer> server_;
};

// ---- cancel and deadline

TEST_F(EndingTest, CancelIsSeenAtEachLayer) {
  LiveServerOptions options;
  options.model.num_layers = 8;
  Start(options);
  for (int32_t layer = 0; layer < server_->num_layers(); ++layer) {
    SCOPED_TRACE(absl::StrCat("layer ", layer));
    CancelToken cancel;
    const int64_t before = server_->backend().CountCalls("Attention");
    SlowDownFrom(layer, [&cancel] { cancel.Cancel(); });
    EXPECT_THAT(Receive(server_->client_options(), RequestOf(SomePrompt(300)), {}, &cancel),
                StatusIs(absl::StatusCode::kCancelled));
    EXPECT_TRUE(server_->BecomesIdle(kFreedWithin));
    const int64_t computed = server_->backend().CountCalls("Attention") - before;
    if (layer <= 4) {
      EXPECT_LT(computed, server_->num_layers()) << "it went on to the end";
    }
  }
  ExpectAliveAndIdle();
}

TEST_F(EndingTest, DeadlineEndsARunningRequest) {
  Start();
  SlowDownFrom(1, [] { absl::SleepFor(absl::Milliseconds(300)); });
  PrefillClientOptions client = server_->client_options();
  client.timeout = absl::Milliseconds(250);
  EXPECT_THAT(Receive(client, RequestOf(SomePrompt(300))),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  ExpectAliveAndIdle();
}

// ---- the wire

class DamagedWireTest : public EndingTest {
 protected:
  void SetUp() override {
    Start(LargeKv());
    TcpProxy proxy(server_->server().port(), {});
    ASSERT_OK_AND_ASSIGN(const Received whole, ReceiveThrough(proxy));
    kv_ = whole.kv;
    completed_ = whole.outcome.completed;
    stream_bytes_ = proxy.bytes_from_server();
    ASSERT_GT(stream_bytes_, static_cast<int64_t>(kv_.size()));
  }
  absl::StatusOr<Received> ReceiveThrough(const TcpProxy& proxy) {
    PrefillClientOptions client = server_->client_options();
    client.target = proxy.target();
    client.timeout = absl::Seconds(10);
    return Receive(client, RequestOf(SomePrompt(500)));
  }

  std::vector<std::byte> kv_;
  v1::Completed completed_;
  int64_t stream_bytes_ = 0;
};

TEST_F(DamagedWireTest, TruncatedStreamIsDataLoss) {
  for (int percent = 30; percent < 100; percent += 10) {
    TcpProxy proxy(server_->server().port(), {.cut_at = stream_bytes_ * percent / 100});
    EXPECT_THAT(ReceiveThrough(proxy), StatusIs(absl::StatusCode::kDataLoss)) << percent << " %";
  }
  ExpectAliveAndIdle();
}

TEST_F(DamagedWireTest, StreamCutBeforeItsFirstChunkIsUnavailable) {
  TcpProxy proxy(server_->server().port(), {.cut_at = 200});
  EXPECT_THAT(ReceiveThrough(proxy), StatusIs(absl::StatusCode::kUnavailable));
  ExpectAliveAndIdle();
}

TEST_F(DamagedWireTest, FlippedBitIsDataLoss) {
  for (int percent = 10; percent < 100; percent += 6) {
    TcpProxy proxy(server_->server().port(), {.flip_at = stream_bytes_ * percent / 100});
    EXPECT_THAT(ReceiveThrough(proxy), StatusIs(absl::StatusCode::kDataLoss)) << percent << " %";
  }
  ExpectAliveAndIdle();
}

// Anywhere: in frame headers, lengths, manifest, trailers. The client may fail or not notice, but
// what it hands over is right.
TEST_F(DamagedWireTest, FlippedBitNeverGivesAWrongResult) {
  for (int64_t i = 0; i < 40; ++i) {
    const int64_t position = i < 20 ? i * 60 : stream_bytes_ - 1 - (i - 20) * 20;
    TcpProxy proxy(server_->server().port(), {.flip_at = position});
    PrefillClientOptions client = server_->client_options();
    client.target = proxy.target();
    client.timeout = absl::Seconds(1);
    const auto received = Receive(client, RequestOf(SomePrompt(500)));
    if (received.ok()) {
      EXPECT_TRUE(received->kv == kv_) << "byte " << position;
      EXPECT_EQ(received->outcome.completed.first_token().id(), completed_.first_token().id())
          << "byte " << position;
    }
  }
  ExpectAliveAndIdle();
}

// ---- the queue

TEST_F(EndingTest, FullQueueRefusesAndTheRetrySucceeds) {
  LiveServerOptions options;
  options.server.max_queue_requests = 1;
  Start(options);
  Notification first_runs, let_go;
  std::atomic<bool> held{false};
  server_->backend().SetHook([&](const BackendCall& call) {
    if (call.op == "Embed" && !held.exchange(true)) {
      first_runs.Notify();
      let_go.WaitForNotification();
    }
    return absl::OkStatus();
  });
  std::thread first(
      [&] { EXPECT_OK(Receive(server_->client_options(), RequestOf(SomePrompt(100)))); });
  first_runs.WaitForNotification();

  PrefillClientOptions patient = server_->client_options();
  patient.retry.max_attempts = 100;
  patient.retry.when_queue_full = true;
  patient.retry.on_retry = [&](const absl::Status& why, absl::Duration) {
    EXPECT_THAT(why, StatusIs(absl::StatusCode::kResourceExhausted));
    EXPECT_EQ(ErrorReasonOf(why), "QUEUE_FULL");
    EXPECT_TRUE(RetryDelayOf(why).has_value());
    if (!let_go.HasBeenNotified()) let_go.Notify();
  };
  const auto second = Receive(patient, RequestOf(SomePrompt(100)));
  first.join();
  ASSERT_OK(second);
  EXPECT_GT(second->outcome.attempts, 1);
  ExpectAliveAndIdle();
}

// ---- the server

TEST_F(EndingTest, ServerThatGoesAwayIsNoSuccess) {
  Start(LargeKv());
  KvReceiverOptions receive;
  const PrefillClientOptions client = server_->client_options();
  std::thread killer;
  receive.on_progress = [&, chunks = 0](int64_t, int64_t) mutable {
    if (chunks++ == 0) killer = std::thread([this] { server_.reset(); });
  };
  EXPECT_THAT(Receive(client, RequestOf(SomePrompt(4000)), receive),
              ::testing::Not(testing::IsOk()));
  killer.join();
}

}  // namespace
}  // namespace headstart
