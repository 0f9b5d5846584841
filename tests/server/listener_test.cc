#include "server/net/listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// A listener whose connections are kept open until the test closes them.
class ListenerTest : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const int fd : clients_) close(fd);
    if (listener_ != nullptr) listener_->Stop();
    CloseAccepted();
  }

  void Start(const ListenerLimits& limits, const std::string& host = "127.0.0.1") {
    auto listener = Listener::Create({host, 0}, limits);
    ASSERT_OK(listener);
    listener_ = *std::move(listener);
    listener_->Start([this](int fd) {
      MutexLock lock(&mutex_);
      accepted_.push_back(fd);
      changed_.SignalAll();
    });
  }

  int Socket() {
    clients_.push_back(socket(AF_INET, SOCK_STREAM, 0));
    return clients_.back();
  }

  void ConnectFrom(int fd, const std::string& source) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    inet_pton(AF_INET, source.c_str(), &address.sin_addr);
    EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    address.sin_port = htons(static_cast<uint16_t>(listener_->port()));
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }

  int Connect(const std::string& source = "127.0.0.1") {
    const int fd = Socket();
    ConnectFrom(fd, source);
    return fd;
  }

  // The other side has closed the connection.
  static bool IsClosed(int fd) {
    pollfd waiting = {fd, POLLIN, 0};
    char byte;
    return poll(&waiting, 1, 5000) == 1 && read(fd, &byte, 1) <= 0;
  }

  // Waits until so many have been handed over.
  void WaitForAccepted(size_t count) {
    MutexLock lock(&mutex_);
    while (accepted_.size() < count) changed_.Wait(&mutex_);
  }

  void CloseAccepted() {
    MutexLock lock(&mutex_);
    for (const int fd : accepted_) close(fd);
    accepted_.clear();
  }

  std::unique_ptr<Listener> listener_;
  std::vector<int> clients_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<int> accepted_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(ListenerTest, TakenPortIsAnErrorThatNamesIt) {
  Start({});
  EXPECT_THAT(
      Listener::Create({"127.0.0.1", listener_->port()}, {}),
      StatusIs(absl::StatusCode::kUnavailable, HasSubstr(std::to_string(listener_->port()))));
}

TEST_F(ListenerTest, UnknownHostIsAnError) {
  EXPECT_THAT(Listener::Create({"no.such.host.invalid", 0}, {}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no.such.host.invalid")));
}

TEST_F(ListenerTest, ClosesWhatIsAboveTheLimit) {
  Start({.max_connections = 2});
  Connect();
  Connect();
  WaitForAccepted(2);
  EXPECT_TRUE(IsClosed(Connect()));
  const ListenerStats stats = listener_->stats();
  EXPECT_EQ(stats.open, 2);
  EXPECT_EQ(stats.accepted, 2);
  EXPECT_EQ(stats.shed[static_cast<size_t>(ShedReason::kMaxConnections)], 1);
}

TEST_F(ListenerTest, TakesNewOnesWhenOldOnesAreClosed) {
  Start({.max_connections = 2});
  Connect();
  Connect();
  WaitForAccepted(2);
  CloseAccepted();  // as gRPC does: without a word
  EXPECT_EQ(listener_->stats().open, 0);
  Connect();
  WaitForAccepted(1);
  EXPECT_EQ(listener_->stats().open, 1);
}

TEST_F(ListenerTest, OnePeerCanNotTakeAllConnections) {
  Start({.max_connections = 10, .max_connections_per_peer = 2});
  Connect("127.0.0.2");
  Connect("127.0.0.2");
  WaitForAccepted(2);
  EXPECT_TRUE(IsClosed(Connect("127.0.0.2")));
  Connect("127.0.0.3");
  WaitForAccepted(3);
  EXPECT_EQ(listener_->stats().shed[static_cast<size_t>(ShedReason::kMaxConnectionsPerPeer)], 1);
}

class ListenerSelfTest : public ListenerTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(ListenerSelfTest, HandsItsOwnConnectionsBackAboveTheLimit) {
  Start({.max_connections = 1}, GetParam());
  Connect();
  WaitForAccepted(1);
  auto own = listener_->ConnectToSelf(absl::Seconds(5));
  ASSERT_OK(own);
  EXPECT_EQ(write(own->server.get(), "x", 1), 1);
  pollfd waiting = {own->client.get(), POLLIN, 0};
  char byte = 0;
  EXPECT_EQ(poll(&waiting, 1, 5000), 1);
  EXPECT_EQ(read(own->client.get(), &byte, 1), 1);
  EXPECT_EQ(byte, 'x');
  EXPECT_EQ(listener_->stats().accepted, 1);
}

INSTANTIATE_TEST_SUITE_P(Hosts, ListenerSelfTest,
                         ::testing::Values("127.0.0.1", "0.0.0.0", "localhost"));

TEST_F(ListenerTest, ListensOnEveryAddressOfAName) {
  Start({}, "localhost");
  addrinfo hints = {}, *infos = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  ASSERT_EQ(getaddrinfo("localhost", std::to_string(listener_->port()).c_str(), &hints, &infos), 0);
  size_t here = 0;
  for (const addrinfo* info = infos; info != nullptr; info = info->ai_next) {
    const Descriptor free(socket(info->ai_family, SOCK_STREAM, 0));
    sockaddr_storage any = {};
    std::memcpy(&any, info->ai_addr, info->ai_addrlen);
    // Both kinds of addresses have their port there.
    reinterpret_cast<sockaddr_in*>(&any)->sin_port = 0;
    if (bind(free.get(), reinterpret_cast<sockaddr*>(&any), info->ai_addrlen) != 0) continue;
    clients_.push_back(socket(info->ai_family, SOCK_STREAM, 0));
    EXPECT_EQ(connect(clients_.back(), info->ai_addr, info->ai_addrlen), 0);
    ++here;
  }
  freeaddrinfo(infos);
  EXPECT_GE(here, 1u);
  WaitForAccepted(here);
}

// A port that is taken on one of a name's addresses is taken.
TEST_F(ListenerTest, WantsEveryAddressOfAName) {
  Start({}, "127.0.0.1");
  EXPECT_THAT(Listener::Create({"localhost", listener_->port()}, {}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("localhost")));
}

// A check that ended leaves nothing by which others could pass for it.
TEST_F(ListenerTest, ExpectsNoOwnConnectionAfterItsCheck) {
  auto listener = Listener::Create({"127.0.0.1", 0}, {});
  ASSERT_OK(listener);
  listener_ = *std::move(listener);
  // Not started: the connection waits in the queue, and is gone when the loop comes to it.
  EXPECT_THAT(listener_->ConnectToSelf(absl::Milliseconds(50)),
              StatusIs(absl::StatusCode::kUnavailable));
  listener_->Start([this](int fd) {
    MutexLock lock(&mutex_);
    accepted_.push_back(fd);
    changed_.SignalAll();
  });
  WaitForAccepted(1);  // as anybody's
  EXPECT_EQ(listener_->stats().accepted, 1);
}

// No descriptor from `limit` on can be had while this lives.
class DescriptorLimit {
 public:
  explicit DescriptorLimit(rlim_t limit) {
    getrlimit(RLIMIT_NOFILE, &before_);
    rlimit tight = before_;
    tight.rlim_cur = limit;
    setrlimit(RLIMIT_NOFILE, &tight);
  }
  ~DescriptorLimit() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_ = {};
};

constexpr int kDescriptors = 1000;  // more than any test has open

// Takes every descriptor that is left below that.
class AllDescriptors {
 public:
  AllDescriptors() {
    const auto take = [] { return open("/dev/null", O_RDONLY); };
    for (int fd = take(); fd >= 0; fd = take()) taken_.push_back(fd);
  }
  ~AllDescriptors() {
    for (const int fd : taken_) close(fd);
  }

 private:
  const DescriptorLimit limit_{kDescriptors};
  std::vector<int> taken_;
};

int CountOpenDescriptors() {
  int count = 0;
  for (int fd = 0; fd < kDescriptors; ++fd) count += fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
  return count;
}

TEST_F(ListenerTest, ClosesConnectionsWhenDescriptorsRunOutAndRecovers) {
  Start({});
  std::vector<int> sockets;
  for (int i = 0; i < 5; ++i) sockets.push_back(Socket());
  {
    const AllDescriptors none_left;
    for (const int fd : sockets) ConnectFrom(fd, "127.0.0.1");
    for (const int fd : sockets) EXPECT_TRUE(IsClosed(fd));
  }
  EXPECT_EQ(listener_->stats().shed[static_cast<size_t>(ShedReason::kNoFileDescriptors)], 5);
  Connect();
  WaitForAccepted(1);
}

// As when another thread takes the reserve in the moment in which it is free.
TEST_F(ListenerTest, GetsALostReserveBack) {
  Start({});
  const int early = Socket(), late = Socket();
  const int open_before = CountOpenDescriptors();
  {
    const DescriptorLimit nothing(3);  // what poll needs
    ConnectFrom(early, "127.0.0.1");
    while (CountOpenDescriptors() == open_before) std::this_thread::yield();
  }
  WaitForAccepted(1);  // taken when there was a descriptor again
  while (CountOpenDescriptors() < open_before + 1) std::this_thread::yield();
  const AllDescriptors none_left;
  ConnectFrom(late, "127.0.0.1");
  EXPECT_TRUE(IsClosed(late));
}

TEST(HostPortTest, ParsesNamesAndBothFamilies) {
  const auto parsed = [](const char* text) {
    auto result = ParseHostPort(text);
    EXPECT_OK(result);
    return *result;
  };
  EXPECT_EQ(parsed("localhost:80").host, "localhost");
  EXPECT_EQ(parsed("127.0.0.1:0").port, 0);
  EXPECT_EQ(parsed("[::1]:8443").host, "::1");
  for (const char* bad :
       {"", "host", ":80", "host:", "host:x", "host:65536", "host:-1", "::1:80"}) {
    EXPECT_THAT(ParseHostPort(bad), StatusIs(absl::StatusCode::kInvalidArgument)) << bad;
  }
}

TEST(HostPortTest, KnowsLoopback) {
  for (const char* host : {"127.0.0.1", "127.9.8.7", "::1", "localhost"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (const char* host : {"0.0.0.0", "10.0.0.1", "::", "128.0.0.1", "127.evil.com"}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

}  // namespace
}  // namespace headstart
