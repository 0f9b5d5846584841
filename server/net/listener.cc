#include "server/net/listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// How often closed connections are counted out when nothing else happens.
constexpr int kSweepMs = 1000;
// Accepted in one go before the loop looks at Stop again.
constexpr int kAcceptBurst = 256;

// Rest after an accept that failed although a connection waits.
constexpr int kRetryMs = 10;

bool OutOfDescriptors(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

int OpenReserve() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

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

}  // namespace

absl::StatusOr<std::unique_ptr<Listener>> Listener::Create(const HostPort& address,
                                                           const ListenerLimits& limits) {
  HEADSTART_ASSIGN_OR_RETURN(const int listen_fd, ListenOn(address));
  const int wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd < 0) {
    close(listen_fd);
    return ErrnoError("eventfd");
  }
  return std::unique_ptr<Listener>(new Listener(listen_fd, wake_fd, limits));
}

Listener::Listener(int listen_fd, int wake_fd, const ListenerLimits& limits)
    : listen_fd_(listen_fd),
      wake_fd_(wake_fd),
      reserve_fd_(OpenReserve()),
      local_(LocalEndpoint(listen_fd)),
      limits_(limits) {}

Listener::~Listener() {
  Stop();
  close(wake_fd_);
  if (reserve_fd_ >= 0) close(reserve_fd_);
}

void Listener::Start(Handler handler) {
  handler_ = std::move(handler);
  thread_ = std::thread([this] { Loop(); });
}

void Listener::Stop() {
  if (listen_fd_ < 0) return;
  eventfd_write(wake_fd_, 1);
  if (thread_.joinable()) thread_.join();
  close(listen_fd_);
  listen_fd_ = -1;
}

ListenerStats Listener::stats() {
  MutexLock lock(&mutex_);
  Sweep();
  ListenerStats stats = stats_;
  stats.open = static_cast<int64_t>(connections_.size());
  return stats;
}

void Listener::Loop() {
  pollfd fds[] = {{listen_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
  while (true) {
    poll(fds, 2, kSweepMs);
    if (fds[1].revents != 0) return;
    if (fds[0].revents != 0) AcceptAll();
    if (reserve_fd_ < 0) reserve_fd_ = OpenReserve();  // somebody was faster once
    MutexLock lock(&mutex_);
    Sweep();
  }
}

void Listener::AcceptAll() {
  for (int i = 0; i < kAcceptBurst && AcceptOne(); ++i) {
  }
}

bool Listener::AcceptOne() {
  Endpoint peer;
  const int fd = Accept(&peer);
  if (fd >= 0) {
    Admit(fd, peer);
    return true;
  }
  if (OutOfDescriptors(errno)) return AcceptWithReserve();
  // Everything else is about that one connection, which is gone.
  return errno != EAGAIN && errno != EWOULDBLOCK;
}

int Listener::Accept(Endpoint* peer) const {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  const int fd = accept4(listen_fd_, reinterpret_cast<sockaddr*>(&address), &length,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) *peer = ToEndpoint(address);
  return fd;
}

// Takes the connection with the descriptor that was kept for this, and closes it: else it would sit
// in the queue and its client would wait for nothing. It stays when there are descriptors again.
// Another thread may be faster to take the reserve, and a lack of kernel memory leaves none: then
// it is tried again, after a rest.
bool Listener::AcceptWithReserve() {
  if (reserve_fd_ >= 0) close(reserve_fd_);
  Endpoint peer;
  const int fd = Accept(&peer);
  const bool failed = fd < 0 && errno != EAGAIN && errno != EWOULDBLOCK;
  reserve_fd_ = OpenReserve();
  if (fd >= 0 && reserve_fd_ >= 0) {
    Admit(fd, peer);
  } else if (fd >= 0) {
    Shed(ShedReason::kNoFileDescriptors);  // before its client can know
    close(fd);
    reserve_fd_ = OpenReserve();
  } else if (failed) {
    pollfd wake = {wake_fd_, POLLIN, 0};
    poll(&wake, 1, kRetryMs);
  }
  return fd >= 0;
}

void Listener::Admit(int fd, const Endpoint& peer) {
  const bool own = TakeOwn(peer);
  if (!own && !Register(fd, peer)) {
    close(fd);
    return;
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  handler_(fd, own);
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
  connections_[fd] = {info.st_dev, info.st_ino, peer.ip};
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

void Listener::Remove(std::unordered_map<int, Connection>::iterator connection) {
  const auto peer = by_peer_.find(connection->second.peer_ip);
  if (--peer->second == 0) by_peer_.erase(peer);
  connections_.erase(connection);
}

bool Listener::TakeOwn(const Endpoint& peer) {
  MutexLock lock(&mutex_);
  return std::erase(own_, peer) > 0;
}

absl::StatusOr<int> Listener::ConnectToSelf(absl::Duration timeout) {
  const std::string ip = ReachableIp(local_);
  sockaddr_storage address;
  const socklen_t length = ToSockaddr(ip, 0, &address);
  const int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return ErrnoError("socket");
  auto close_fd = absl::MakeCleanup([fd] { close(fd); });
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) return ErrnoError("bind");
  const Endpoint source = LocalEndpoint(fd);
  {
    MutexLock lock(&mutex_);
    own_.push_back(source);
  }
  // Bounds connect() too.
  const timeval limit = absl::ToTimeval(timeout);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  ToSockaddr(ip, local_.port, &address);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) {
    const absl::Status error = ErrnoError("connect to the own listener");
    TakeOwn(source);
    return error;
  }
  std::move(close_fd).Cancel();
  return fd;
}

}  // namespace headstart
