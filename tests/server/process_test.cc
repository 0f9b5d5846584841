// The program: exit codes, signals, config, limits of the machine.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/instant.h"
#include "server/program/exit_code.h"
#include "server/program/serve_command.h"
#include "tests/e2e/child_process.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/kv_collector.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class ProcessTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK(WriteTinyModel(dir_ / "tiny", model_)); }

  // Runs the program to its end.
  struct Ended {
    int exit_code = 0;
    std::string output;
  };
  Ended Run(std::vector<std::string> arguments) {
    ChildProcess child(HEADSTART_PROGRAM, std::move(arguments), dir_ / "log");
    Ended ended;
    ended.exit_code = child.Wait();
    ended.output = child.Output();
    return ended;
  }

  std::vector<std::string> ServeArguments(const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {
        "serve",       "--model", dir_ / "tiny", "--listen",    "127.0.0.1:0", "--admin-listen",
        "127.0.0.1:0", "--dtype", "f32",         "--port-file", dir_ / "ports"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  // Starts a server and waits until it is ready.
  void StartServer(const std::vector<std::string>& more = {}) {
    child_ = std::make_unique<ChildProcess>(HEADSTART_PROGRAM, ServeArguments(more), dir_ / "log");
    WaitUntilReady();
  }
  void WaitUntilReady() {
    std::ifstream file;
    while (!file.is_open()) {
      ASSERT_FALSE(child_->HasEnded()) << child_->Output();
      absl::SleepFor(absl::Milliseconds(5));
      file.open(dir_ / "ports");
    }
    const auto ports = nlohmann::json::parse(file);
    port_ = ports["port"];
    admin_port_ = ports["admin_port"];
    while (Http("/readyz") != 200) {
      ASSERT_FALSE(child_->HasEnded()) << child_->Output();
      absl::SleepFor(absl::Milliseconds(5));
    }
  }

  int Http(const std::string& path) const {
    return Exchange(admin_port_, HttpHead("GET", path)).status;
  }

  grpc::Status Call() const {
    grpc::ChannelArguments own;
    own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    const auto stub = v1::PrefillService::NewStub(grpc::CreateCustomChannel(
        absl::StrCat("127.0.0.1:", port_), grpc::InsecureChannelCredentials(), own));
    return OpenCall(stub.get(), Prompt(5)).Finish().status;
  }

  TempDir dir_;
  TinyModelOptions model_;
  std::unique_ptr<ChildProcess> child_;
  int port_ = 0;
  int admin_port_ = 0;
};

// ---- exit codes

TEST_F(ProcessTest, HelpAndVersionExitWithZero) {
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"--help"},
                                                    {"--version"},
                                                    {"serve", "--help"},
                                                    {"inspect", "--help"},
                                                    {"request", "--help"},
                                                    {"bench", "--help"}}) {
    EXPECT_EQ(Run(arguments).exit_code, kExitOk) << absl::StrJoin(arguments, " ");
  }
}

TEST_F(ProcessTest, WrongUsageExitsWithTwo) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{},
                                             {"sevre"},
                                             {"serve"},
                                             {"serve", "--model", "x", "--no-such-flag"},
                                             {"serve", "--model", "x", "--drain-timeout", "soon"},
                                             {"serve", "--model", "x", "--config", "/none.toml"},
                                             {"serve", "--model", "x", "--tls-cert", "only.crt"},
                                             {"inspect"}}) {
    const Ended ended = Run(arguments);
    EXPECT_EQ(ended.exit_code, kExitUsage) << absl::StrJoin(arguments, " ") << ended.output;
  }
}

TEST_F(ProcessTest, FlagsThatDoNotSuitTheModelExitWithTwo) {
  const Ended ended = Run(ServeArguments({"--num-proxies", "3"}));
  EXPECT_EQ(ended.exit_code, kExitUsage);
  EXPECT_THAT(ended.output, HasSubstr("num_proxies=3"));
}

TEST_F(ProcessTest, BadModelExitsWithThreeAndNamesIt) {
  const Ended missing = Run({"serve", "--model", "/none/model", "--listen", "127.0.0.1:0",
                             "--admin-listen", "127.0.0.1:0"});
  EXPECT_EQ(missing.exit_code, kExitModel);
  EXPECT_THAT(missing.output, HasSubstr("/none/model"));
  EXPECT_EQ(Run({"inspect", "--model", "/none/model"}).exit_code, kExitModel);
  ASSERT_OK(WriteFile(dir_ / "tiny/model.safetensors", "not tensors"));
  const Ended corrupt = Run(ServeArguments());
  EXPECT_EQ(corrupt.exit_code, kExitModel);
  EXPECT_THAT(corrupt.output, HasSubstr("model.safetensors"));
  ASSERT_OK(WriteFile(dir_ / "tiny/config.json", "{}"));
  EXPECT_EQ(Run(ServeArguments()).exit_code, kExitModel);
}

// A socket that listens on a free port, for others to find taken.
class TakenPort {
 public:
  TakenPort() : sockets_(*ListenOn({"127.0.0.1", 0})) {}
  int port() const { return LocalEndpoint(sockets_.front().get()).port; }
  std::string address() const { return absl::StrCat("127.0.0.1:", port()); }

 private:
  const std::vector<Descriptor> sockets_;
};

TEST_F(ProcessTest, TakenPortExitsWithFourBeforeTheModelIsTouched) {
  const TakenPort taken;
  for (const char* flag : {"--listen", "--admin-listen"}) {
    // The model does not exist: whoever looked at it would exit with 3.
    std::vector<std::string> arguments = {"serve", "--model", "/none/model"};
    const std::string other = std::string(flag) == "--listen" ? "--admin-listen" : "--listen";
    for (const std::string& more :
         {std::string(flag), taken.address(), other, std::string("127.0.0.1:0")}) {
      arguments.push_back(more);
    }
    const Instant began = Instant::Now();
    const Ended ended = Run(arguments);
    EXPECT_EQ(ended.exit_code, kExitListen) << ended.output;
    EXPECT_THAT(ended.output, HasSubstr(std::to_string(taken.port())));
    EXPECT_LT(Instant::Now() - began, absl::Seconds(1) * HEADSTART_TIME_SCALE);
  }
}

TEST_F(ProcessTest, BadAddressAndCertificateExitWithFour) {
  const auto expect_refused = [this](std::vector<std::string> arguments, const std::string& named) {
    arguments.insert(arguments.begin(), {"serve", "--model", dir_ / "tiny"});
    const Ended ended = Run(arguments);
    EXPECT_EQ(ended.exit_code, kExitListen) << ended.output;
    EXPECT_THAT(ended.output, HasSubstr(named));
  };
  expect_refused({"--listen", "nowhere"}, "nowhere");
  expect_refused({"--listen", "no.such.host.invalid:80"}, "no.such.host.invalid");
  expect_refused({"--listen", "127.0.0.1:0", "--admin-listen", "no.such.host.invalid:80"},
                 "no.such.host.invalid");
  expect_refused({"--listen", "127.0.0.1:0", "--tls-cert", "/none.crt", "--tls-key", "/none.key"},
                 "/none.crt");
  expect_refused(
      {"--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--port-file", "/none/ports"},
      "/none/ports");
}

// ---- config

TEST_F(ProcessTest, PrintsItsConfigAndServesFromIt) {
  const Ended printed = Run(ServeArguments({"--print-config", "--drain-timeout", "7s"}));
  ASSERT_EQ(printed.exit_code, kExitOk);
  EXPECT_THAT(printed.output, HasSubstr("drain-timeout=\"7s\""));
  ASSERT_OK(WriteFile(dir_ / "server.toml", printed.output));
  child_ = std::make_unique<ChildProcess>(
      HEADSTART_PROGRAM, std::vector<std::string>{"serve", "--config", dir_ / "server.toml"},
      dir_ / "log");
  WaitUntilReady();
  EXPECT_TRUE(Call().ok());
}

TEST_F(ProcessTest, InspectSaysTheSameInJsonAndInWords) {
  const Ended json = Run({"inspect", "--model", dir_ / "tiny", "--dtype", "f32", "--json"});
  ASSERT_EQ(json.exit_code, kExitOk);
  const auto parsed = nlohmann::json::parse(json.output);
  EXPECT_EQ(parsed["kv_bytes_per_token"], 1024);
  EXPECT_EQ(parsed["max_context_tokens"], 2048);
  EXPECT_EQ(parsed["architecture"], "llama");
  const auto& bytes = parsed["memory_bytes"];
  // Attention packs K and V of a layer: of the whole context, 2048 tokens.
  EXPECT_GT(bytes["scratch"], 2048 * 1024 / parsed["num_layers"].get<int>());
  EXPECT_EQ(bytes["total"].get<int64_t>(),
            bytes["weights"].get<int64_t>() + bytes["kv_pool"].get<int64_t>() +
                bytes["workspace"].get<int64_t>() + bytes["scratch"].get<int64_t>() +
                bytes["staging"].get<int64_t>());
  const Ended words = Run({"inspect", "--model", dir_ / "tiny", "--dtype", "f32"});
  EXPECT_THAT(words.output, HasSubstr("1024 bytes a token"));
}

// ---- the end

TEST_F(ProcessTest, SignalsAndDrainEndAnIdleServerWithZero) {
  for (const int signal : {SIGTERM, SIGINT, 0}) {
    const std::string admin = dir_ / "admin";
    StartServer({"--admin-socket", admin});
    EXPECT_TRUE(Call().ok());
    if (signal != 0) {
      child_->Signal(signal);
    } else {
      EXPECT_EQ(Exchange(admin, HttpHead("POST", "/drain")).status, 202);
    }
    EXPECT_EQ(child_->Wait(), kExitOk) << child_->Output();
    EXPECT_NE(access(admin.c_str(), F_OK), 0);
    unlink((dir_ / "ports").c_str());
  }
}

TEST_F(ProcessTest, SurvivesExhaustedFileDescriptors) {
  child_ = std::make_unique<ChildProcess>(
      "/bin/sh",
      std::vector<std::string>{"-c", "ulimit -n 128; exec \"$0\" \"$@\"", HEADSTART_PROGRAM,
                               "serve", "--model", dir_ / "tiny", "--listen", "127.0.0.1:0",
                               "--admin-listen", "127.0.0.1:0", "--port-file", dir_ / "ports"},
      dir_ / "log");
  WaitUntilReady();
  for (int round = 0; round < 2; ++round) {
    std::vector<int> flood;
    for (int i = 0; i < 400; ++i) {
      flood.push_back(socket(AF_INET, SOCK_STREAM, 0));
      sockaddr_in address = {};
      address.sin_family = AF_INET;
      address.sin_port = htons(static_cast<uint16_t>(port_));
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      connect(flood.back(), reinterpret_cast<sockaddr*>(&address), sizeof(address));
    }
    EXPECT_EQ(Http("/healthz"), 200);
    for (const int fd : flood) close(fd);
    const Instant limit = Instant::Now() + absl::Seconds(10) * HEADSTART_TIME_SCALE;
    grpc::Status status = Call();
    while (!status.ok() && Instant::Now() < limit) status = Call();
    EXPECT_TRUE(status.ok()) << "round " << round << ": " << status.error_message();
  }
}

// ---- RunServer with an engine of the test's, in a process of its own

ServerOptions QuietOptions(const std::string& model_dir) {
  ServerOptions options;
  options.model_dir = model_dir;
  options.listen = "127.0.0.1:0";
  options.admin_listen = "127.0.0.1:0";
  options.log_level = "error";
  options.port_file = model_dir + ".ports";
  options.backend.dtype = ComputeDType::kF32;
  options.backend.num_threads = 1;
  return options;
}

// The port of a server that writes this file, once it serves.
int ServingPort(const std::string& port_file) {
  std::ifstream in;
  while (!in.is_open()) {
    absl::SleepFor(absl::Milliseconds(5));
    in.open(port_file);
  }
  const auto ports = nlohmann::json::parse(in);
  const std::string ready = HttpHead("GET", "/readyz");
  while (Exchange(static_cast<int>(ports["admin_port"]), ready).status != 200) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  return ports["port"];
}

// As RunServer does, for threads that are started before it.
void BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

// Serves a model whose first attention never returns; a client calls it, then `act` runs. The
// engine is never let go.
int ServeStuckEngine(const ServerOptions& options, const std::function<void()>& act) {
  BlockSignals();
  auto stuck = std::make_shared<Notification>();
  std::thread([options, stuck, act] {
    const auto stub = v1::PrefillService::NewStub(
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", ServingPort(options.port_file)),
                            grpc::InsecureChannelCredentials()));
    OpenCall call(stub.get(), Prompt(5),
                  [](grpc::ClientContext& context) { context.set_wait_for_ready(true); });
    while (!call.Read().has_manifest()) {
    }
    stuck->WaitForNotification();
    act();
    call.Finish();
  }).detach();
  return RunServer(options, [options, stuck]() -> absl::StatusOr<std::unique_ptr<Engine>> {
    auto backend = std::make_unique<FaultBackend>(*MakeBackend(options.backend));
    backend->SetHook([stuck](const BackendCall& call) {
      if (call.op == "Attention") {
        stuck->Notify();
        absl::SleepFor(absl::InfiniteDuration());
      }
      return absl::OkStatus();
    });
    return MakeEngine(ToEngineOptions(options), std::move(backend));
  });
}

class ServerDeathTest : public ProcessTest {
 protected:
  // Each statement runs in a fresh process: the program is started again up to it.
  ServerDeathTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(ServerDeathTest, EngineThatHangsDoesNotKeepTheProcess) {
  ServerOptions options = QuietOptions(dir_ / "tiny");
  options.drain_timeout = absl::Milliseconds(200);
  EXPECT_EXIT(exit(ServeStuckEngine(options, [] { kill(getpid(), SIGTERM); })),
              ::testing::ExitedWithCode(kExitRuntime), "the end hangs");
}

TEST_F(ServerDeathTest, SecondSignalEndsAtOnce) {
  const ServerOptions options = QuietOptions(dir_ / "tiny");
  for (const int signal : {SIGTERM, SIGINT}) {
    EXPECT_EXIT(exit(ServeStuckEngine(options,
                                      [signal] {
                                        kill(getpid(), SIGTERM);
                                        absl::SleepFor(absl::Milliseconds(200));
                                        kill(getpid(), signal);
                                      })),
                ::testing::ExitedWithCode(kExitSignalBase + signal), "");
  }
}

TEST_F(ServerDeathTest, SignalWhileLoadingEndsWithoutWaitingForTheModel) {
  const ServerOptions options = QuietOptions(dir_ / "tiny");
  EXPECT_EXIT(exit(RunServer(options,
                             []() -> absl::StatusOr<std::unique_ptr<Engine>> {
                               kill(getpid(), SIGTERM);
                               absl::SleepFor(absl::InfiniteDuration());
                               return absl::InternalError("");
                             })),
              ::testing::ExitedWithCode(kExitOk), "");
}

TEST_F(ServerDeathTest, LostBackendExitsWithSix) {
  const ServerOptions options = QuietOptions(dir_ / "tiny");
  const auto serve = [options] {
    std::thread([options] {
      const auto stub = v1::PrefillService::NewStub(
          grpc::CreateChannel(absl::StrCat("127.0.0.1:", ServingPort(options.port_file)),
                              grpc::InsecureChannelCredentials()));
      while (OpenCall(stub.get(), Prompt(5)).Finish().status.error_code() !=
             grpc::StatusCode::INTERNAL) {
      }
    }).detach();
    return RunServer(options, [options]() -> absl::StatusOr<std::unique_ptr<Engine>> {
      auto backend = std::make_unique<FaultBackend>(*MakeBackend(options.backend));
      backend->SetHook([](const BackendCall& call) {
        return call.op == "Attention" ? absl::InternalError("illegal memory access")
                                      : absl::OkStatus();
      });
      return MakeEngine(ToEngineOptions(options), std::move(backend));
    });
  };
  EXPECT_EXIT(exit(serve()), ::testing::ExitedWithCode(kExitBackend), "illegal memory access");
}

}  // namespace
}  // namespace headstart::testing
