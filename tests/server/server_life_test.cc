// The server's own life: loading, a backend that fails, draining, the end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "engine/error.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

class ServerLifeTest : public ServerTest {};

// ---- the engine fails

TEST_F(ServerLifeTest, NonFiniteValuesFailOneRequestOnly) {
  Start();
  backend_->PoisonOutput("Embed", 0);
  const CallResult result = Run(Prompt(300));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(result.reason(), "NONFINITE_OUTPUT");
  backend_->PoisonOutput("", 0);
  EXPECT_TRUE(Run(Prompt(300)).status.ok());
  EXPECT_EQ(Metric("headstart_nonfinite_outputs_total{model=\"tiny\"}"), 1);
  EXPECT_EQ(Health(), "SERVING");
}

TEST_F(ServerLifeTest, OutOfMemoryFailsOneRequestOnly) {
  Start();
  backend_->SetHook([](const BackendCall& call) {
    return call.op == "Attention" ? absl::ResourceExhaustedError("no memory for 7 bytes")
                                  : absl::OkStatus();
  });
  const CallResult result = Run(Prompt(300));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(result.reason(), "OUT_OF_MEMORY");
  backend_->SetHook(nullptr);
  EXPECT_TRUE(Run(Prompt(300)).status.ok());
}

TEST_F(ServerLifeTest, LostBackendEndsTheServer) {
  Start();
  Barrier barrier(backend_, "Embed", 0);
  const auto stub = NewStub();
  OpenCall first(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), Prompt(10));
  WaitForQueued(1);
  backend_->SetHook([](const BackendCall& call) {
    return call.op == "Attention" ? absl::InternalError("illegal memory access") : absl::OkStatus();
  });
  barrier.Open();
  EXPECT_EQ(first.Finish().status.error_code(), grpc::StatusCode::INTERNAL);
  const CallResult second = queued.Finish();
  EXPECT_EQ(second.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(second.reason(), "ENGINE_LOST");
  EXPECT_EQ(Run(Prompt(10)).reason(), "ENGINE_LOST");
  EXPECT_EQ(Health(), "NOT_SERVING");
  EXPECT_EQ(Get("/readyz").status, 503);
  server_->WaitForEnd();
  EXPECT_THAT(server_->Shutdown(), StatusIs(absl::StatusCode::kInternal));
}

// ---- the server ends

TEST_F(ServerLifeTest, DrainLetsAcceptedRequestsFinishAndRefusesNewOnes) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), Prompt(10));
  WaitForQueued(1);
  server_->Drain();
  const CallResult refused = Run(Prompt(10));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(refused.reason(), "DRAINING");
  EXPECT_EQ(Health(), "NOT_SERVING");
  EXPECT_EQ(Health("headstart.v1.PrefillService"), "NOT_SERVING");
  EXPECT_EQ(Get("/readyz").body, "draining\n");
  EXPECT_EQ(Get("/healthz").status, 200);  // alive, and still answering
  EXPECT_EQ(Metric("headstart_draining"), 1);
  std::thread end([this] {
    server_->WaitForEnd();
    EXPECT_OK(server_->Shutdown());
  });
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(queued.Finish().status.ok());
  end.join();
}

TEST_F(ServerLifeTest, DrainTimeoutCancelsWhatIsLeft) {
  options_.drain_timeout = absl::Milliseconds(100);
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  server_->Drain();
  absl::Status ended;
  std::thread end([this, &ended] {
    server_->WaitForEnd();
    ended = server_->Shutdown();
  });
  EXPECT_EQ(running.Finish().status.error_code(), grpc::StatusCode::UNAVAILABLE);
  barrier.Open();
  end.join();
  EXPECT_THAT(ended, StatusIs(absl::StatusCode::kDeadlineExceeded, ::testing::HasSubstr("1 ")));
  EXPECT_EQ(Requests("UNAVAILABLE", "DRAINING"), 1);
}

TEST_F(ServerLifeTest, DestroyedServerEndsEverything) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  std::thread opener([&] {
    EXPECT_EQ(running.Finish().status.error_code(), grpc::StatusCode::UNAVAILABLE);
    barrier.Open();
  });
  server_.reset();
  opener.join();
}

// ---- before and between

TEST_F(ServerLifeTest, RefusesWhileTheModelIsLoading) {
  Notification go_on;
  ASSERT_OK(StartLoading([this, &go_on] {
    go_on.WaitForNotification();
    return MakeEngine();
  }));
  const CallResult refused = Run(Prompt(10));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(refused.reason(), "LOADING");
  EXPECT_EQ(Health(), "NOT_SERVING");
  EXPECT_EQ(Get("/readyz").status, 503);
  EXPECT_EQ(Get("/readyz").body, "loading\n");
  EXPECT_EQ(Get("/healthz").status, 200);
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  EXPECT_EQ(NewStub()->GetModelInfo(&context, {}, &info).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  go_on.Notify();
  ASSERT_OK(server_->WaitUntilLoaded());
  EXPECT_EQ(Health(), "SERVING");
  EXPECT_EQ(Get("/readyz").status, 200);
  EXPECT_TRUE(Run(Prompt(10)).status.ok());
}

TEST_F(ServerLifeTest, FailedLoadIsTheEnd) {
  ASSERT_OK(StartLoading([]() -> absl::StatusOr<std::unique_ptr<Engine>> {
    return absl::InvalidArgumentError("config.json: no model");
  }));
  EXPECT_THAT(server_->WaitUntilLoaded(), StatusIs(absl::StatusCode::kInvalidArgument));
  server_->WaitForEnd();
  EXPECT_THAT(server_->Shutdown(), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(ServerLifeTest, AttentionFlagsThatDoNotSuitTheModelAreAUsageError) {
  options_.attention.request.num_proxies = 3;
  const absl::Status status = StartServing();
  EXPECT_THAT(status,
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("num_proxies=3")));
  EXPECT_TRUE(IsUsageError(status));
}

TEST_F(ServerLifeTest, ComputeThatStandsStillIsNotHealthy) {
  options_.stuck_after = absl::Milliseconds(500);
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall call(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  EXPECT_TRUE(ComesTrue([this] { return Health() == "NOT_SERVING"; }));
  EXPECT_EQ(Get("/readyz").status, 503);
  EXPECT_EQ(Get("/healthz").status, 503);
  EXPECT_EQ(Metric("headstart_ready"), 0);
  EXPECT_EQ(Metric("headstart_stuck"), 1);
  barrier.Open();
  EXPECT_TRUE(call.Finish().status.ok());
  EXPECT_TRUE(ComesTrue([this] { return Health() == "SERVING"; }));
  EXPECT_EQ(Get("/healthz").status, 200);
}

}  // namespace
}  // namespace headstart::testing
