// The programs as processes: what signals, sudden deaths and a second process on the other side do.
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "client/decode/decode_node.h"
#include "client/grpc_status.h"
#include "kernels/base/instant.h"
#include "tests/e2e/child_process.h"
#include "tests/e2e/live_server.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using testing::BackendCall;
using testing::ChildProcess;
using testing::ComesTrue;
using ::testing::HasSubstr;
using testing::LiveServer;
using testing::LiveServerOptions;
using testing::Notification;
using testing::Receive;
using testing::Received;
using testing::RequestOf;
using testing::SomePrompt;
using testing::StatusIs;
using testing::TempDir;

// HEADSTART_PROGRAM and HEADSTART_DECODE_PROGRAM come from CMake.

std::string WritePrompt(const TempDir& dir, const std::vector<uint32_t>& ids) {
  std::ofstream(dir / "prompt") << absl::StrJoin(ids, " ");
  return dir / "prompt";
}

// ---- a client that dies; the server in this process

// On the call's own connection, and on two that fetch.
class KilledClientTest : public ::testing::TestWithParam<const char*> {};

TEST_P(KilledClientTest, FreesEverythingWithinASecond) {
  LiveServerOptions options;
  options.model.num_layers = 60;
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start(options));
  Notification computes;
  server->backend().SetHook([&, told = false](const BackendCall& call) mutable {
    if (call.op != "Attention" || call.layer < 3) return absl::OkStatus();
    if (!std::exchange(told, true)) computes.Notify();
    absl::SleepFor(
        absl::Milliseconds(50));  // 3 s to the end: being idle within one means that it was seen
    return absl::OkStatus();
  });
  TempDir dir;
  ChildProcess client(
      HEADSTART_PROGRAM,
      {"request", "--target", server->target(), "--random", "200", "--connections", GetParam()},
      dir / "log");
  computes.WaitForNotification();
  client.Signal(SIGKILL);
  const Instant killed = Instant::Now();
  EXPECT_TRUE(server->BecomesIdle(absl::Seconds(1))) << server->WhatIsLeft();
  EXPECT_LT(Instant::Now() - killed, absl::Seconds(1));
  EXPECT_EQ(client.Wait(), -SIGKILL);
}

INSTANTIATE_TEST_SUITE_P(Connections, KilledClientTest, ::testing::Values("1", "2"));

TEST(ClientProcessTest, DecodeProgramPrintsWhatTheLibraryDecodes) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  const std::vector<uint32_t> prompt = SomePrompt(150);
  DecodeNodeOptions options;
  options.client = server->client_options();
  options.request = RequestOf(prompt);
  options.model_dir = server->model_dir();
  options.backend = {.device = "cpu", .dtype = ComputeDType::kF32, .num_threads = 1};
  options.max_new_tokens = 10;
  ASSERT_OK_AND_ASSIGN(const DecodeNodeResult expected, RunDecodeNode(options, [](int32_t) {}));

  TempDir dir;
  ChildProcess decode(HEADSTART_DECODE_PROGRAM,
                      {"--target", server->target(), "--model", server->model_dir(),
                       "--tokens-file", WritePrompt(dir, prompt), "--max-tokens", "10", "--dtype",
                       "f32", "--threads", "1", "--preset", "exact", "--json", dir / "stats.json"},
                      dir / "log");
  ASSERT_EQ(decode.Wait(), 0) << decode.Output();
  EXPECT_EQ(decode.Output(), absl::StrJoin(expected.tokens, "\n") + "\n");
  std::ifstream file(dir / "stats.json");
  const auto json = nlohmann::json::parse(file);
  EXPECT_EQ(json["decode"]["tokens"], expected.tokens);
  EXPECT_EQ(json["decode"]["stop"], "max_tokens");
  EXPECT_EQ(json["prompt_tokens"], 150);
  EXPECT_EQ(json["attention"]["layer_density"].size(), 6);
  EXPECT_LE(json["client"]["first_chunk_seconds"], json["client"]["completed_seconds"]);
}

TEST(ClientProcessTest, BenchRunsAgainstARealServer) {
  ASSERT_OK_AND_ASSIGN(const auto server, LiveServer::Start({}));
  TempDir dir;
  ChildProcess bench(HEADSTART_PROGRAM,
                     {"bench", "--target", server->target(), "--lengths", "100,300", "--presets",
                      "exact,balanced", "--requests", "3", "--concurrency", "2", "--json"},
                     dir / "log");
  ASSERT_EQ(bench.Wait(), 0) << bench.Output();
  const auto json = nlohmann::json::parse(bench.Output());
  ASSERT_EQ(json["results"].size(), 4);
  for (const auto& result : json["results"]) EXPECT_EQ(result["ok"], 3) << result;
  EXPECT_EQ(json["server"]["model"], "tiny");
}

// ---- a server as a process; the client in this one

class ServerProcessTest : public ::testing::Test {
 protected:
  void StartServer(const std::vector<std::string>& more = {}) {
    ASSERT_OK(testing::WriteTinyModel(dir_ / "model", testing::LargeKvModel()));
    std::vector<std::string> arguments = {"serve", "--model",     dir_ / "model", "--dtype",
                                          "f32",   "--listen",    "127.0.0.1:0",  "--admin-listen",
                                          "",      "--port-file", dir_ / "port"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    std::vector<std::string> command = launcher_;
    command.push_back(HEADSTART_PROGRAM);
    command.insert(command.end(), arguments.begin(), arguments.end());
    server_ = std::make_unique<ChildProcess>(
        command[0], std::vector<std::string>(command.begin() + 1, command.end()), dir_ / "log");
    ASSERT_TRUE(
        ComesTrue([&] { return std::filesystem::exists(dir_ / "port") || server_->HasEnded(); }));
    ASSERT_FALSE(server_->HasEnded()) << server_->Output();
    std::ifstream file(dir_ / "port");
    client_.target = absl::StrCat("127.0.0.1:", nlohmann::json::parse(file)["port"].get<int>());
    client_.timeout = absl::Seconds(30);
    client_.wait_for_ready = true;  // health says when the model is loaded
    client_.retry.max_attempts = 1;
  }
  void TearDown() override {
    if (HasFailure()) std::fputs(server_->Output().c_str(), stderr);
  }
  // Runs `act` when the first chunk is there; the reader stands still meanwhile, so the server is
  // in the middle of it.
  absl::StatusOr<Received> ReceiveAnd(const std::function<void()>& act) {
    KvReceiverOptions receive;
    receive.on_progress = [&, chunks = 0](int64_t, int64_t) mutable {
      if (chunks++ == 0) act();
    };
    return Receive(client_, RequestOf(SomePrompt(4000)), receive);
  }

  TempDir dir_;
  std::vector<std::string> launcher_;  // program and arguments in front of the server's
  PrefillClientOptions client_;
  std::unique_ptr<ChildProcess> server_;
};

TEST_F(ServerProcessTest, SigtermLetsARunningRequestFinishAndRefusesNewOnes) {
  ASSERT_NO_FATAL_FAILURE(StartServer());
  absl::Status refused;
  const auto received = ReceiveAnd([&] {
    server_->Signal(SIGTERM);
    // New calls are refused as soon as the signal is handled; those before it are answered.
    PrefillClientOptions other = client_;
    other.wait_for_ready = false;
    EXPECT_TRUE(ComesTrue([&] {
      CancelToken cancel;
      KvReceiverOptions receive;
      receive.on_accepted = [&](const v1::Accepted&) {
        cancel.Cancel();
        return absl::OkStatus();
      };
      refused = Receive(other, RequestOf({1}), receive, &cancel).status();
      return !absl::IsCancelled(refused);
    }));
  });
  EXPECT_OK(received);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(server_->Wait(), 0);
}

TEST_F(ServerProcessTest, SecondSigtermEndsAtOnce) {
  ASSERT_NO_FATAL_FAILURE(StartServer({"--drain-timeout", "60s"}));
  int exit_code = 0;
  const auto received = ReceiveAnd([&] {
    server_->Signal(SIGTERM);
    EXPECT_TRUE(ComesTrue([&] { return absl::StrContains(server_->Output(), "drain"); }));
    server_->Signal(SIGTERM);
    exit_code = server_->Wait();
  });
  EXPECT_EQ(exit_code, 128 + SIGTERM);
  EXPECT_THAT(received, StatusIs(absl::StatusCode::kDataLoss));
}

TEST_F(ServerProcessTest, KilledServerIsDataLoss) {
  ASSERT_NO_FATAL_FAILURE(StartServer());
  EXPECT_THAT(ReceiveAnd([&] { server_->Signal(SIGKILL); }), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_EQ(server_->Wait(), -SIGKILL);
}

TEST_F(ServerProcessTest, LogsNoPromptTokens) {
  ASSERT_NO_FATAL_FAILURE(StartServer({"--log-level", "debug"}));
  std::vector<uint32_t> prompt(200, 137);
  EXPECT_OK(Receive(client_, RequestOf(prompt)));
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0);
  EXPECT_THAT(server_->Output(), ::testing::Not(HasSubstr("137, 137"))) << "ids in a list";
  EXPECT_THAT(server_->Output(), ::testing::Not(HasSubstr("137 137")));
  EXPECT_THAT(server_->Output(), HasSubstr("200")) << "the length is said";
}

TEST_F(ServerProcessTest, ServesAlthoughItsLogCanNotBeWritten) {
  const std::string serve = "exec \"$0\" \"$@\" 2> ";
  for (const std::string& script : {serve + "/dev/full", serve + ">(true)",
                                    absl::StrCat("ulimit -f 1; ", serve, dir_ / "short_log")}) {
    SCOPED_TRACE(script);
    std::filesystem::remove(dir_ / "port");
    launcher_ = {"/bin/bash", "-c", script};
    ASSERT_NO_FATAL_FAILURE(StartServer({"--log-level", "debug"}));
    for (int i = 0; i < 10; ++i) ASSERT_OK(Receive(client_, RequestOf(SomePrompt(100))));
    server_->Signal(SIGTERM);
    EXPECT_EQ(server_->Wait(), 0);
  }
}

// Unless the environment says how threads wait; and it is still the same process and program.
TEST_F(ServerProcessTest, IdleThreadsSpinOnlyShortly) {
  const auto read = [this](const char* name) {
    std::ifstream file(absl::StrCat("/proc/", server_->pid(), "/", name));
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  launcher_ = {"/usr/bin/env", "-u", "OMP_WAIT_POLICY", "-u", "GOMP_SPINCOUNT"};
  ASSERT_NO_FATAL_FAILURE(StartServer());
  EXPECT_THAT(read("environ"), HasSubstr("GOMP_SPINCOUNT=1000"));
  EXPECT_EQ(read("comm"), "headstart\n");
  EXPECT_OK(Receive(client_, RequestOf(SomePrompt(200))));
  std::filesystem::remove(dir_ / "port");
  launcher_.push_back("OMP_WAIT_POLICY=active");
  ASSERT_NO_FATAL_FAILURE(StartServer());
  EXPECT_THAT(read("environ"), ::testing::Not(HasSubstr("GOMP_SPINCOUNT")));
}

}  // namespace
}  // namespace headstart
