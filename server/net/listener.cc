#include "server/net/listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// How often closed connections are counted out when nothing else happens.
constexpr int kSweepMs = 1000;
// How often open connections are looked at: what a flood brings meanwhile must be bearable.
constexpr int kWatchMs = 100;
// Accepted in one go before the loop looks at Stop again.
constexpr int kAcceptBurst = 256;

// Rest after an accept that failed although a connection waits.
constexpr int kRetryMs = 10;

bool OutOfDescriptors(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

Descriptor OpenReserve() { return Descriptor(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

// A connected socket, or -1 with errno.
int Accept(int listen_fd, Endpoint* peer) {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  const int fd = accept4(listen_fd, reinterpret_cast<sockaddr*>(&address), &length,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) *peer = ToEndpoint(address);
  return fd;
}

absl::Status ErrnoError(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::generic_category().message(errno)));
}

// Where a connection to `local` goes when that is a wildcard.
std::string ReachableIp(const Endpoint& local) {
  return local.ip == "0.0.0.0" || local.ip == "::" ? "127.0.0.1" : local.ip;
}

socklen_t ToSockaddr(const std::string& ip, int port, sockaddr_storage* out) {
  *out = {};
  auto* v4 = reinterpret_cast<sockaddr_in*>(out);
  if (inet_pton(AF_INET, ip.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
    return sizeof(sockaddr_in);
  }
  auto* v6 = reinterpret_cast<sockaddr_in6*>(out);
  inet_pton(AF_INET6, ip.c_str(), &v6->sin6_addr);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = htons(static_cast<uint16_t>(port));
  return sizeof(sockaddr_in6);
}

// Sends a secret from one end to the other. Both know it only when they are of one connection.
absl::Status ProveConnected(const OwnConnection& ends, absl::Duration timeout) {
  std::array<char, 16> secret, arrived;
  if (getrandom(secret.data(), secret.size(), 0) != static_cast<ssize_t>(secret.size()) ||
      send(ends.client.get(), secret.data(), secret.size(), MSG_NOSIGNAL) !=
          static_cast<ssize_t>(secret.size())) {
    return ErrnoError("sending to the own listener");
  }
  pollfd waiting = {ends.server.get(), POLLIN, 0};
  poll(&waiting, 1, static_cast<int>(absl::ToInt64Milliseconds(timeout)));
  const ssize_t count = recv(ends.server.get(), arrived.data(), arrived.size(), MSG_WAITALL);
  if (count == static_cast<ssize_t>(secret.size()) && arrived == secret) return absl::OkStatus();
  return absl::UnavailableError("the own listener took another connection than ours");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Listener>> Listener::Create(const HostPort& address,
                                                           const ListenerLimits& limits,
                                                           ConnectionLedger* ledger) {
  HEADSTART_ASSIGN_OR_RETURN(std::vector<Descriptor> sockets, ListenOn(address));
  return Create(std::move(sockets), limits, ledger);
}

absl::StatusOr<std::unique_ptr<Listener>> Listener::Create(std::vector<Descriptor> sockets,
                                                           const ListenerLimits& limits,
                                                           ConnectionLedger* ledger) {
  Descriptor wake(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (wake.get() < 0) return ErrnoError("eventfd");
  return std::unique_ptr<Listener>(
      new Listener(std::move(sockets), std::move(wake), limits, ledger));
}

Listener::Listener(std::vector<Descriptor> sockets, Descriptor wake, const ListenerLimits& limits,
                   ConnectionLedger* ledger)
    : sockets_(std::move(sockets)),
      wake_(std::move(wake)),
      reserve_(OpenReserve()),
      local_(LocalEndpoint(sockets_.front().get())),
      limits_(limits),
      ledger_(ledger) {}

Listener::~Listener() { Stop(); }

void Listener::Start(Handler handler) {
  handler_ = std::move(handler);
  thread_ = std::thread([this] { Loop(); });
}

void Listener::Stop() {
  if (sockets_.empty()) return;
  eventfd_write(wake_.get(), 1);
  if (thread_.joinable()) thread_.join();
  sockets_.clear();
}

ListenerStats Listener::stats() {
  MutexLock lock(&mutex_);
  Sweep();
  ListenerStats stats = stats_;
  stats.open = static_cast<int64_t>(connections_.size());
  return stats;
}

void Listener::Loop() {
  std::vector<pollfd> fds = {{wake_.get(), POLLIN, 0}};
  for (const Descriptor& socket : sockets_) fds.push_back({socket.get(), POLLIN, 0});
  while (true) {
    poll(fds.data(), fds.size(), WatchMs());
    if (fds[0].revents != 0) return;
    for (size_t i = 1; i < fds.size(); ++i) {
      if (fds[i].revents != 0) AcceptAll(fds[i].fd);
    }
    if (reserve_.get() < 0) reserve_ = OpenReserve();  // somebody was faster once
    MutexLock lock(&mutex_);
    Sweep();
    if (ledger_ != nullptr) Watch();
  }
}

int Listener::WatchMs() {
  MutexLock lock(&mutex_);
  return ledger_ == nullptr || connections_.empty() ? kSweepMs : kWatchMs;
}

void Listener::AcceptAll(int listen_fd) {
  for (int i = 0; i < kAcceptBurst && AcceptOne(listen_fd); ++i) {
  }
}

bool Listener::AcceptOne(int listen_fd) {
  Endpoint peer;
  const int fd = Accept(listen_fd, &peer);
  if (fd >= 0) {
    Admit(fd, peer);
    return true;
  }
  if (OutOfDescriptors(errno)) return AcceptWithReserve(listen_fd);
  // Everything else is about that one connection, which is gone.
  return errno != EAGAIN && errno != EWOULDBLOCK;
}

// Takes the connection with the descriptor that was kept for this, and closes it: else it would sit
// in the queue and its client would wait for nothing. It stays when there are descriptors again.
// Another thread may be faster to take the reserve, and a lack of kernel memory leaves none: then
// it is tried again, after a rest.
bool Listener::AcceptWithReserve(int listen_fd) {
  reserve_ = Descriptor();
  Endpoint peer;
  const int fd = Accept(listen_fd, &peer);
  const bool failed = fd < 0 && errno != EAGAIN && errno != EWOULDBLOCK;
  reserve_ = OpenReserve();
  if (fd >= 0 && reserve_.get() >= 0) {
    Admit(fd, peer);
  } else if (fd >= 0) {
    Shed(ShedReason::kNoFileDescriptors);  // before its client can know
    close(fd);
    reserve_ = OpenReserve();
  } else if (failed) {
    pollfd wake = {wake_.get(), POLLIN, 0};
    poll(&wake, 1, kRetryMs);
  }
  return fd >= 0;
}

void Listener::Admit(int fd, const Endpoint& peer) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  if (GiveToSelf(fd, peer)) return;
  if (Register(fd, peer)) {
    handler_(fd);
  } else {
    close(fd);
  }
}

bool Listener::Register(int fd, const Endpoint& peer) {
  struct stat info = {};
  fstat(fd, &info);
  MutexLock lock(&mutex_);
  // Whoever had this descriptor before has closed it.
  if (auto old = connections_.find(fd); old != connections_.end()) Remove(old);
  const auto full = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return static_cast<int64_t>(connections_.size()) >= limits_.max_connections;
  };
  const auto peer_full = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return by_peer_[peer.ip] >= limits_.max_connections_per_peer;
  };
  if (full() || peer_full()) Sweep();
  if (full() || peer_full()) {
    const ShedReason reason =
        full() ? ShedReason::kMaxConnections : ShedReason::kMaxConnectionsPerPeer;
    ++stats_.shed[static_cast<size_t>(reason)];
    if (by_peer_[peer.ip] == 0) by_peer_.erase(peer.ip);
    return false;
  }
  ++stats_.accepted;
  ++by_peer_[peer.ip];
  const bool v6 = peer.ip.find(':') != std::string::npos;
  const std::string name = absl::StrCat(v6 ? "[" : "", peer.ip, v6 ? "]:" : ":", peer.port);
  if (ledger_ != nullptr && !ledger_->Open(name)) {
    Sweep();  // the one before from that port has gone
    ledger_->Open(name);
  }
  connections_[fd] = {info.st_dev, info.st_ino, peer.ip, name};
  return true;
}

void Listener::Shed(ShedReason reason) {
  MutexLock lock(&mutex_);
  ++stats_.shed[static_cast<size_t>(reason)];
}

void Listener::Sweep() {
  for (auto it = connections_.begin(); it != connections_.end();) {
    const auto connection = it++;
    struct stat info = {};
    const bool open = fstat(connection->first, &info) == 0 &&
                      info.st_ino == connection->second.inode &&
                      info.st_dev == connection->second.device;
    if (!open) Remove(connection);
  }
}

void Listener::Watch() {
  const Instant now = Instant::Now();
  std::pair<int, Connection*> worst = {-1, nullptr};
  int64_t most = 0, total = 0;
  for (auto& [fd, connection] : connections_) {
    const std::optional<Traffic> traffic = TrafficOf(fd);
    if (connection.cut || !traffic.has_value()) continue;
    const ConnectionLedger::Finding finding = ledger_->Check(connection.name, *traffic, now);
    if (finding.cut.has_value()) {
      Cut(fd, &connection, *finding.cut);
      continue;
    }
    total += finding.unaccounted;
    if (finding.unaccounted > most) worst = {fd, &connection};
    most = std::max(most, finding.unaccounted);
  }
  if (total > ledger_->budget().total_bytes) {
    Cut(worst.first, worst.second, CutReason::kUnaccountedBytes);
  }
}

// The descriptor is gRPC's, which sees an end and closes it: with a reset, since the other side may
// be waiting for room to send more.
void Listener::Cut(int fd, Connection* connection, CutReason reason) {
  const linger reset = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  ++stats_.cut[static_cast<size_t>(reason)];  // before its client can know
  connection->cut = true;
  shutdown(fd, SHUT_RDWR);
}

void Listener::Remove(std::unordered_map<int, Connection>::iterator connection) {
  const auto peer = by_peer_.find(connection->second.peer_ip);
  if (--peer->second == 0) by_peer_.erase(peer);
  if (ledger_ != nullptr) ledger_->Close(connection->second.name);
  connections_.erase(connection);
}

bool Listener::GiveToSelf(int fd, const Endpoint& peer) {
  MutexLock lock(&mutex_);
  const auto found = std::find_if(expected_.begin(), expected_.end(),
                                  [&peer](const Expected* e) { return e->source == peer; });
  if (found == expected_.end()) return false;
  (*found)->accepted.set_value(Descriptor(fd));
  expected_.erase(found);
  return true;
}

absl::Status Listener::ConnectExpected(int fd, Expected* expected, absl::Duration timeout) {
  {
    MutexLock lock(&mutex_);
    expected_.push_back(expected);
  }
  // Bounds connect().
  const timeval limit = absl::ToTimeval(timeout);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  sockaddr_storage address;
  const socklen_t length = ToSockaddr(expected->source.ip, local_.port, &address);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) {
    return ErrnoError("connect to the own listener");
  }
  return absl::OkStatus();
}

absl::StatusOr<OwnConnection> Listener::ConnectToSelf(absl::Duration timeout) {
  sockaddr_storage address;
  const socklen_t length = ToSockaddr(ReachableIp(local_), 0, &address);
  OwnConnection ends;
  ends.client = Descriptor(socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int fd = ends.client.get();
  if (fd < 0) return ErrnoError("socket");
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) return ErrnoError("bind");
  Expected expected{LocalEndpoint(fd), {}};
  std::future<Descriptor> accepted = expected.accepted.get_future();
  // Nothing is expected any more before the source address can be another's.
  const auto forget = absl::MakeCleanup([&] {
    MutexLock lock(&mutex_);
    expected_.remove(&expected);
  });
  HEADSTART_RETURN_IF_ERROR(ConnectExpected(fd, &expected, timeout));
  if (accepted.wait_for(absl::ToChronoMilliseconds(timeout)) != std::future_status::ready) {
    return absl::UnavailableError("the own listener takes no connection");
  }
  ends.server = accepted.get();
  HEADSTART_RETURN_IF_ERROR(ProveConnected(ends, timeout));
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  return ends;
}

}  // namespace headstart
