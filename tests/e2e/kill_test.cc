// Sudden deaths: the server or a client gets SIGKILL at a point that a seed draws, again and again
// in three hundred requests. Whoever is left goes on, a new server answers on the same port, and
// nothing stays behind on disk, in /dev/shm, or in the server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/e2e/child_process.h"
#include "tests/e2e/live_server.h"
#include "tests/e2e/tcp_proxy.h"
#include "tests/engine/simulation/random.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace headstart::testing {
namespace {

namespace fs = std::filesystem;
using simulation::Random;

constexpr uint64_t kSeed = 1;
constexpr int64_t kRequests = 300;
constexpr int64_t kTokens = 600;  // of each
constexpr int64_t kAtOnce = 3;    // requests under way when the server is killed

// A port that nobody has, below those that the kernel gives to connections: it is still free when
// the next server wants it.
int FreePort(Random& random) {
  while (true) {
    const int port = static_cast<int>(random.Between(20000, 32000));
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const bool is_free = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
    close(fd);
    if (is_free) return port;
  }
}

class KillTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(WriteTinyModel(dir_ / "model", LargeKvModel()));
    for (const char* folder : {"home", "tmp", "work"}) fs::create_directory(dir_ / folder);
    client_.target = absl::StrCat("127.0.0.1:", port_);
    client_.timeout = absl::Seconds(60);
    client_.wait_for_ready = true;
    client_.retry.max_attempts = 1;
    client_.connections = 1;
  }
  void TearDown() override {
    if (HasFailure() && server_ != nullptr) std::fputs(server_->Output().c_str(), stderr);
  }

  // In folders of its own, to which whatever it leaves would go. Does not wait for anything.
  void SpawnServer() {
    fs::remove(dir_ / "port");
    server_ = std::make_unique<ChildProcess>("/usr/bin/env",
                                             std::vector<std::string>{"-C",
                                                                      dir_ / "work",
                                                                      "HOME=" + dir_ / "home",
                                                                      "TMPDIR=" + dir_ / "tmp",
                                                                      HEADSTART_PROGRAM,
                                                                      "serve",
                                                                      "--model",
                                                                      dir_ / "model",
                                                                      "--dtype",
                                                                      "f32",
                                                                      "--listen",
                                                                      client_.target,
                                                                      "--admin-listen",
                                                                      "",
                                                                      "--default-lease",
                                                                      "200ms",
                                                                      "--max-lease",
                                                                      "200ms",
                                                                      "--port-file",
                                                                      dir_ / "port"},
                                             dir_ / "log");
  }
  void StartServer() {
    SpawnServer();
    EXPECT_TRUE(ComesTrue([this] { return fs::exists(dir_ / "port") || server_->HasEnded(); }));
    ASSERT_FALSE(server_->HasEnded()) << server_->Output();
  }
  void ExpectAnswers() {
    const auto received = Receive(client_, request_);
    ASSERT_OK(received) << server_->Output();
    if (expected_.empty()) expected_ = received->kv;
    EXPECT_TRUE(received->kv == expected_) << "another answer";
  }
  void ExpectIdle() {
    ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(client_));
    EXPECT_TRUE(ComesTrue([&client] {
      const auto loads = client->GetLoads();
      return loads.ok() && loads->inflight_requests() == 0 && loads->leases() == 0;
    }));
  }

  // What a process has open or mapped that has a name where the next one would find it.
  std::vector<std::string> NamesHeld() const {
    std::vector<std::string> held;
    for (const auto& entry :
         fs::directory_iterator(absl::StrCat("/proc/", server_->pid(), "/fd"))) {
      std::error_code gone;
      held.push_back(fs::read_symlink(entry.path(), gone).string());
    }
    std::ifstream maps(absl::StrCat("/proc/", server_->pid(), "/maps"));
    for (std::string line; std::getline(maps, line);) held.push_back(line);
    std::erase_if(held, [this](const std::string& name) {
      const bool is_own = absl::StrContains(name, dir_.path()) &&
                          !absl::StrContains(name, dir_ / "model") && !absl::EndsWith(name, "/log");
      return !is_own && !absl::StrContains(name, "/dev/shm");
    });
    return held;
  }

  void KillServer() {
    EXPECT_THAT(NamesHeld(), ::testing::IsEmpty()) << "would outlive it";
    server_->Signal(SIGKILL);
    EXPECT_EQ(server_->Wait(), -SIGKILL);
  }

  // With `kAtOnce` requests under way, when they have so many bytes of KV together.
  void KillServerAt(int64_t bytes) {
    std::atomic<int64_t> received{0};
    std::atomic<int64_t> ended{0};
    std::vector<std::thread> clients;
    for (int64_t i = 0; i < kAtOnce; ++i) {
      clients.emplace_back([&] {
        KvReceiverOptions receive;
        receive.on_progress = [&received, last = int64_t{0}](int64_t now, int64_t) mutable {
          received += now - std::exchange(last, now);
        };
        const auto outcome = Receive(client_, request_, receive);
        if (outcome.ok()) {
          EXPECT_TRUE(outcome->kv == expected_) << "another answer";
        } else {
          EXPECT_TRUE(absl::IsDataLoss(outcome.status()) || absl::IsUnavailable(outcome.status()))
              << outcome.status();
        }
        ++ended;
      });
    }
    EXPECT_TRUE(ComesTrue([&] { return received >= bytes || ended == kAtOnce; }));
    KillServer();
    for (std::thread& client : clients) client.join();
    StartServer();
  }

  // When so many bytes have come for it.
  void KillClientAt(int64_t bytes) {
    TcpProxy proxy(port_, {});
    ChildProcess client(HEADSTART_PROGRAM,
                        {"request", "--target", proxy.target(), "--random", absl::StrCat(kTokens)},
                        dir_ / "client");
    EXPECT_TRUE(ComesTrue([&] { return proxy.bytes_from_server() >= bytes || client.HasEnded(); }));
    if (!client.HasEnded()) client.Signal(SIGKILL);
    client.Wait();
  }

  // One that fetches on two connections, once the server has its request.
  void KillFetchingClient() {
    ChildProcess client(HEADSTART_PROGRAM,
                        {"request", "--target", client_.target, "--random", absl::StrCat(kTokens),
                         "--connections", "2"},
                        dir_ / "client");
    ASSERT_OK_AND_ASSIGN(const auto asking, PrefillClient::Create(client_));
    EXPECT_TRUE(ComesTrue([&] {
      const auto loads = asking->GetLoads();
      return (loads.ok() && loads->inflight_requests() > 0) || client.HasEnded();
    }));
    if (!client.HasEnded()) client.Signal(SIGKILL);
    client.Wait();
  }

  std::set<std::string> Files() const {
    std::set<std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(dir_.path())) {
      files.insert(fs::relative(entry.path(), dir_.path()).string());
    }
    return files;
  }

  TempDir dir_;
  Random random_{kSeed};
  // Different ports for tests that run at the same time.
  Random ports_{static_cast<uint64_t>(getpid())};
  const int port_ = FreePort(ports_);
  PrefillClientOptions client_;
  const v1::PrefillRequest request_ = RequestOf(SomePrompt(kTokens));
  std::vector<std::byte> expected_;
  std::unique_ptr<ChildProcess> server_;
};

TEST_F(KillTest, WhoeverIsLeftGoesOnAndNothingStaysBehind) {
  StartServer();
  ExpectAnswers();
  const std::set<std::string> before = Files();
  int64_t requests = 1;
  while (requests < kRequests && !HasFailure()) {
    const int64_t kind = random_.Between(1, 100);
    if (kind <= 20) {
      KillServerAt(random_.Between(0, kAtOnce * std::ssize(expected_)));
      requests += kAtOnce;
    } else if (kind <= 60) {
      KillClientAt(random_.Between(0, std::ssize(expected_)));
      ++requests;
    } else if (kind <= 75) {
      KillFetchingClient();
      ++requests;
    } else if (kind <= 80) {  // while it loads
      KillServer();
      SpawnServer();
      KillServer();
      StartServer();
    }
    ExpectAnswers();
    ++requests;
    ExpectIdle();
  }
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0) << server_->Output();
  std::set<std::string> after = Files();
  after.erase("client");
  EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace headstart::testing
