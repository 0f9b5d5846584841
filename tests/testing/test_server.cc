#include "tests/testing/test_server.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/kv_collector.h"

namespace headstart::testing {

TestServer::TestServer() {
  options_.model_dir = dir_ / "tiny";
  options_.listen = "127.0.0.1:0";
  options_.admin_listen = "127.0.0.1:0";
  options_.backend.dtype = ComputeDType::kF32;
  options_.backend.num_threads = 1;
  options_.drain_timeout = absl::Seconds(30);
}

absl::Status TestServer::StartServing() {
  HEADSTART_RETURN_IF_ERROR(StartLoading([this] { return MakeEngine(); }));
  return server_->WaitUntilLoaded();
}

absl::Status TestServer::StartLoading(Server::EngineFactory make_engine) {
  HEADSTART_RETURN_IF_ERROR(WriteTinyModel(options_.model_dir, model_));
  HEADSTART_ASSIGN_OR_RETURN(server_, Server::Start(options_, std::move(make_engine)));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Engine>> TestServer::MakeEngine() {
  HEADSTART_ASSIGN_OR_RETURN(auto inner, MakeBackend(options_.backend));
  auto backend = std::make_unique<FaultBackend>(std::move(inner));
  backend_ = backend.get();
  return testing::MakeEngine(ToEngineOptions(options_), std::move(backend));
}

absl::StatusOr<std::unique_ptr<Engine>> TestServer::MakeLocalEngine() const {
  HEADSTART_ASSIGN_OR_RETURN(auto backend, MakeBackend(options_.backend));
  return testing::MakeEngine(ToEngineOptions(options_), std::move(backend));
}

bool TestServer::BecomesIdle(absl::Duration limit) const {
  return ComesTrue([this] { return WhatIsLeft().empty(); }, limit);
}

std::string TestServer::WhatIsLeft() const {
  const MetricsSnapshot now = server_->Snapshot();
  std::string left;
  const auto expect_equal = [&left](absl::string_view what, int64_t a, int64_t b) {
    if (a != b) absl::StrAppend(&left, what, " ", a, " of ", b, "; ");
  };
  expect_equal("requests in flight", now.load.inflight_requests, 0);
  expect_equal("tokens in flight", now.load.inflight_tokens, 0);
  expect_equal("requests queued", now.load.queued_requests, 0);
  expect_equal("tokens queued", now.load.queued_tokens, 0);
  expect_equal("leases", now.load.leases, 0);
  expect_equal("tickets released", now.load.released, now.load.acquired);
  expect_equal("device pages released", now.pool_released, now.pool_acquired);
  expect_equal("device pages free", now.pool_free, now.pool_blocks);
  expect_equal("host bytes free", now.host_kv_free_bytes, now.host_kv_bytes);
  return left;
}

bool ComesTrue(const std::function<bool()>& condition, absl::Duration limit) {
  const Instant end = Instant::Now() + limit;
  while (!condition()) {
    if (Instant::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

}  // namespace headstart::testing
