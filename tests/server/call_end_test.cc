// How calls end that do not simply run through, and that every end gives everything back (checked
// after each test).
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_server.h"

namespace headstart::testing {
namespace {

// 1 KiB of KV a token in chunks of 64 KiB: a long prompt has more than a connection takes that
// nobody reads from.
class CallEndTest : public ServerTest {
 protected:
  CallEndTest() {
    model_.max_positions = 8192;
    options_.piece_tokens = 128;
  }

  // Host memory for two pieces: then compute waits for room.
  void LimitHostMemory() { options_.host_kv_bytes = 4 << 20; }
};

// A call that is opened and not followed by a message. A generated stub can't do that, a generic
// one can.
class MessagelessCall {
 public:
  explicit MessagelessCall(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(channel),
        call_(stub_.PrepareCall(&context_, "/headstart.v1.PrefillService/Prefill", &queue_)) {
    call_->StartCall(nullptr);
    WaitForQueue();
  }
  void Cancel() { context_.TryCancel(); }
  grpc::Status Finish() {
    grpc::Status status;
    call_->Finish(&status, nullptr);
    WaitForQueue();
    return status;
  }

 private:
  void WaitForQueue() {
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue_.Next(&tag, &ok));
  }

  grpc::TemplatedGenericStub<v1::PrefillRequest, v1::PrefillResponse> stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::PrefillRequest, v1::PrefillResponse>> call_;
};

auto WithTimeout(absl::Duration timeout) {
  return
      [timeout](grpc::ClientContext& context) { context.set_deadline(Instant::Now() + timeout); };
}

// ---- full

TEST_F(CallEndTest, RefusesWhenTheQueueIsFull) {
  options_.max_queue_requests = 2;
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();  // else both run together
  OpenCall queued(stub.get(), Prompt(10));
  WaitForQueued(1);
  const CallResult refused = Run(Prompt(10));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(refused.reason(), "QUEUE_FULL");
  EXPECT_TRUE(refused.has_retry_delay());
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(queued.Finish().status.ok());
  EXPECT_EQ(Requests("RESOURCE_EXHAUSTED", "QUEUE_FULL"), 1);
}

TEST_F(CallEndTest, TellsWhatIsAheadInTheQueue) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall first(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  OpenCall second(stub.get(), Prompt(20));
  WaitForQueued(1);
  OpenCall third(stub.get(), Prompt(30));
  const v1::Accepted accepted = third.Read().accepted();
  EXPECT_EQ(accepted.queue_requests(), 2u);
  EXPECT_EQ(accepted.queue_tokens(), 30u);
  EXPECT_EQ(Metric("headstart_queue_requests{model=\"tiny\"}"), 2);
  EXPECT_EQ(Metric("headstart_queue_tokens{model=\"tiny\"}"), 50);
  EXPECT_EQ(Metric("headstart_running_requests{model=\"tiny\"}"), 1);
  EXPECT_EQ(Metric("headstart_inflight_tokens{model=\"tiny\"}"), 60);
  barrier.Open();
  for (OpenCall* call : {&first, &second, &third}) EXPECT_TRUE(call->Finish().status.ok());
}

TEST_F(CallEndTest, RefusesAnIdThatIsInFlight) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  v1::PrefillRequest request = Prompt(10);
  request.set_request_id("twice");
  const auto stub = NewStub();
  OpenCall first(stub.get(), request);
  barrier.WaitUntilReached();
  const CallResult second = Run(request);
  EXPECT_EQ(second.status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(second.reason(), "DUPLICATE_REQUEST_ID");
  barrier.Open();
  EXPECT_TRUE(first.Finish().status.ok());
  EXPECT_TRUE(Run(request).status.ok());
}

// A client whose connection broke, where the server has not noticed yet.
TEST_F(CallEndTest, AnAttemptTakesThePlaceOfTheOneBefore) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  v1::PrefillRequest request = Prompt(10);
  request.set_request_id("mine");
  request.set_attempt_key("random bytes");
  const auto stub = NewStub();
  OpenCall first(stub.get(), request);
  barrier.WaitUntilReached();
  OpenCall second(stub.get(), request);
  const CallResult ended = first.Finish();
  EXPECT_EQ(ended.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(ended.reason(), "CLIENT_CANCELLED");
  barrier.Open();
  EXPECT_TRUE(second.Finish().status.ok());
}

// ---- cancel

TEST_F(CallEndTest, CancelBeforeTheMessageIsACancel) {
  Start();
  const auto channel = NewChannel();
  constexpr int kCalls = 10;
  for (int i = 0; i < kCalls; ++i) {
    MessagelessCall call(channel);
    // Once another call of the connection has been answered, the server knows this one.
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    ASSERT_TRUE(v1::PrefillService::NewStub(channel)->GetServerInfo(&context, {}, &info).ok());
    call.Cancel();
    EXPECT_EQ(call.Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  const auto malformed = [this] { return Requests("INVALID_ARGUMENT", "MALFORMED_REQUEST"); };
  const auto cancelled = [this] { return Requests("CANCELLED", "CLIENT_CANCELLED"); };
  EXPECT_TRUE(ComesTrue([&] { return malformed() + cancelled() == kCalls; }));
  EXPECT_EQ(malformed(), 0);
}

TEST_F(CallEndTest, CancelInTheQueueComputesNothing) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), Prompt(10));
  WaitForQueued(1);
  queued.context().TryCancel();
  EXPECT_EQ(queued.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  WaitForQueued(0);
  EXPECT_EQ(server_->Snapshot().load.inflight_requests, 1);  // while the other still computes
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_EQ(backend_->CountCalls("Embed"), 1);
  EXPECT_EQ(Requests("CANCELLED", "CLIENT_CANCELLED"), 1);
}

TEST_F(CallEndTest, CancelWhileComputingStopsAtTheNextLayer) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall call(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  call.context().TryCancel();
  EXPECT_EQ(call.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(ComesTrue([this] { return Requests("CANCELLED", "CLIENT_CANCELLED") == 1; }))
      << "although the engine stands still";
  const int64_t before = backend_->CountCalls("Attention");
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(absl::Seconds(1))) << WhatIsLeft();
  EXPECT_EQ(backend_->CountCalls("Attention"), before);  // no further layer
  EXPECT_TRUE(Run(Prompt(3)).status.ok());
}

TEST_F(CallEndTest, CancelWhileSendingFreesEverything) {
  Start();
  const auto stub = NewSlowStub();
  OpenCall call(stub.get(), Prompt(4096));
  while (!call.Read().has_chunk()) {
  }
  call.context().TryCancel();
  EXPECT_EQ(call.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(BecomesIdle(absl::Seconds(1))) << WhatIsLeft();
  EXPECT_EQ(
      Metric("headstart_kv_transfer_failures_total{model=\"tiny\",reason=\"CLIENT_CANCELLED\"}"),
      1);
}

TEST_F(CallEndTest, BrokenConnectionIsACancel) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  {
    auto channel = NewChannel();
    const auto stub = v1::PrefillService::NewStub(channel);
    OpenCall call(stub.get(), Prompt(10));
    barrier.WaitUntilReached();
    call.context().TryCancel();
    call.Finish();
  }
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(absl::Seconds(1))) << WhatIsLeft();
}

// ---- deadlines

TEST_F(CallEndTest, ClientsDeadlineInTheQueueComputesNothing) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  const CallResult late = Run(Prompt(10), WithTimeout(absl::Milliseconds(100)));
  EXPECT_EQ(late.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  WaitForQueued(0);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_EQ(backend_->CountCalls("Embed"), 1);
  EXPECT_EQ(Requests("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"), 1);
}

TEST_F(CallEndTest, ServersDeadlineInTheQueueIsAnsweredWhileAnotherComputes) {
  options_.max_deadline = absl::Milliseconds(200);
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  const Instant began = Instant::Now();
  const CallResult late = Run(Prompt(10));
  EXPECT_EQ(late.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(late.reason(), "DEADLINE_EXCEEDED");
  EXPECT_LT(Instant::Now() - began, absl::Milliseconds(1200));
  barrier.Open();
  EXPECT_EQ(running.Finish().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(CallEndTest, ServersDeadlineEndsCompute) {
  options_.max_deadline = absl::Milliseconds(100);
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall call(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  const CallResult late = call.Finish();  // although the engine stands still
  EXPECT_EQ(late.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(late.reason(), "DEADLINE_EXCEEDED");
  const int64_t before = backend_->CountCalls("Attention");
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(absl::Seconds(1))) << WhatIsLeft();
  EXPECT_EQ(backend_->CountCalls("Attention"), before);  // no further layer
}

TEST_F(CallEndTest, CallWithoutItsMessageIsEnded) {
  options_.first_message_timeout = absl::Milliseconds(100);
  Start();
  const grpc::Status status = MessagelessCall(NewChannel()).Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_NE(status.error_message().find("100ms"), std::string::npos);
}

// ---- slow readers

TEST_F(CallEndTest, ClientThatReadsNothingIsCutAndTheNextIsServed) {
  LimitHostMemory();
  options_.write_stall_timeout = absl::Milliseconds(300);
  Start();
  const auto slow = NewSlowStub();
  OpenCall stalled(slow.get(), Prompt(4096));
  EXPECT_TRUE(stalled.Read().has_accepted());
  EXPECT_TRUE(Run(Prompt(10)).status.ok());
  EXPECT_TRUE(ComesTrue([&] { return Requests("CANCELLED", "CLIENT_STALLED") == 1; }));
  const CallResult cut = stalled.Finish();
  EXPECT_EQ(cut.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_FALSE(cut.responses.back().has_completed());
  EXPECT_EQ(Requests("CANCELLED", "CLIENT_STALLED"), 1);
  EXPECT_GE(
      Metric("headstart_kv_transfer_failures_total{model=\"tiny\",reason=\"CLIENT_STALLED\"}"), 1);
}

TEST_F(CallEndTest, ClientThatDoesNotTakeTheTailIsCutWithoutHoldingCompute) {
  options_.write_stall_timeout = absl::Milliseconds(300);
  options_.piece_tokens = 8192;  // and host memory for the KV of eight such prompts
  Start();
  const auto slow = NewSlowStub();
  OpenCall stalled(slow.get(), Prompt(4096));
  EXPECT_TRUE(stalled.Read().has_accepted());
  EXPECT_TRUE(Run(Prompt(10)).status.ok());
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
  EXPECT_EQ(stalled.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(Requests("CANCELLED", "CLIENT_STALLED"), 1);
}

TEST_F(CallEndTest, ClientThatTakesHardlyAnythingIsCut) {
  LimitHostMemory();
  options_.write_stall_timeout = absl::Milliseconds(500);
  options_.min_kv_rate = int64_t{1} << 40;  // nobody is that fast
  Start();
  grpc::ClientContext context;
  const auto slow = NewSlowStub();
  const auto reader = slow->Prefill(&context, Prompt(4096));
  v1::PrefillResponse response;
  // Takes something all the time: no single write stalls.
  while (reader->Read(&response)) absl::SleepFor(absl::Milliseconds(10));
  const grpc::Status cut = reader->Finish();
  EXPECT_EQ(cut.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_THAT(cut.error_message(), ::testing::HasSubstr("the least is"));
}

// Compute waits for room, and the only client takes nothing: no layer finishes, and nothing is
// wrong.
TEST_F(CallEndTest, SlowReaderDoesNotMakeTheServerSick) {
  LimitHostMemory();
  options_.stuck_after = absl::Milliseconds(1);
  Start();
  const auto slow = NewSlowStub();
  OpenCall call(slow.get(), Prompt(4096));
  EXPECT_TRUE(call.Read().has_accepted());
  EXPECT_TRUE(ComesTrue(
      [this] { return Metric("headstart_kv_room_waiting_requests{model=\"tiny\"}") == 1; }));
  const double layers = Metric("headstart_layers_done_total");
  // The server looks at its compute once a second.
  for (const Instant until = Instant::Now() + absl::Seconds(2.5); Instant::Now() < until;) {
    EXPECT_EQ(Health(), "SERVING");
    EXPECT_EQ(Get("/healthz").status, 200);
    EXPECT_EQ(Metric("headstart_stuck"), 0);
  }
  EXPECT_EQ(Metric("headstart_layers_done_total"), layers);
  EXPECT_TRUE(call.Finish().status.ok());
}

TEST_F(CallEndTest, DeadlineEndsATailThatIsNotTaken) {
  options_.max_deadline = absl::Seconds(2);
  Start();
  const auto slow = NewSlowStub();
  OpenCall stalled(slow.get(), Prompt(4096));
  EXPECT_TRUE(stalled.Read().has_accepted());
  EXPECT_TRUE(BecomesIdle(absl::Seconds(3.5))) << WhatIsLeft();
  EXPECT_EQ(stalled.Finish().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(CallEndTest, SlowButSteadyClientGetsEverything) {
  LimitHostMemory();
  options_.write_stall_timeout = absl::Seconds(5);
  Start();
  const auto slow = NewSlowStub();
  OpenCall call(slow.get(), Prompt(2048));
  int64_t chunks = 0;
  v1::PrefillResponse response = call.Read();
  for (; !response.has_completed(); response = call.Read()) {
    if (response.has_chunk() && ++chunks % 8 == 0) absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(CompletedOf(response).num_chunks(), chunks);
  EXPECT_TRUE(call.Finish().status.ok());
  EXPECT_GT(Metric("headstart_kv_room_wait_seconds_count{model=\"tiny\"}"), 0);
}

}  // namespace
}  // namespace headstart::testing
