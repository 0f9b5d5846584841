#include "server/net/socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

constexpr int kBacklog = 1024;
constexpr int kMaxPort = 65535;

constexpr int kFreePortTries = 20;

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::Status ListenError(absl::string_view where, absl::string_view problem) {
  return absl::UnavailableError(absl::StrCat("can't listen on ", where, ": ", problem));
}

absl::Status ListenErrno(absl::string_view where) {
  return ListenError(where, std::generic_category().message(errno));
}

std::string AsText(const HostPort& address) {
  return absl::StrCat(address.host, ":", address.port);
}

void SetPort(sockaddr* address, int port) {
  const auto wire = htons(static_cast<uint16_t>(port));
  if (address->sa_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(address)->sin6_port = wire;
  } else {
    reinterpret_cast<sockaddr_in*>(address)->sin_port = wire;
  }
}

// Binds and listens; none, with errno, on failure.
Descriptor TryListen(const addrinfo& info) {
  Descriptor fd(socket(info.ai_family, info.ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) return fd;
  // Reuse of an address in TIME_WAIT, never SO_REUSEPORT: two servers on one port must not go
  // unnoticed.
  const int on = 1, off = 0;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (info.ai_family == AF_INET6) {
    setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
  }
  if (bind(fd.get(), info.ai_addr, info.ai_addrlen) == 0 && listen(fd.get(), kBacklog) == 0) {
    return fd;
  }
  const int error = errno;
  fd = Descriptor();
  errno = error;
  return fd;
}

// A name may stand for addresses of a family that this machine does not have.
bool IsAbsent(int error) { return error == EADDRNOTAVAIL || error == EAFNOSUPPORT; }

// A host may be listed twice.
bool Contains(const std::vector<Descriptor>& fds, const addrinfo& info) {
  sockaddr_storage address = {};
  std::memcpy(&address, info.ai_addr, info.ai_addrlen);
  const std::string ip = ToEndpoint(address).ip;
  return std::any_of(fds.begin(), fds.end(),
                     [&ip](const Descriptor& fd) { return LocalEndpoint(fd.get()).ip == ip; });
}

// Every address on one port; port 0 takes what the first one gets. Empty, with errno, when one of
// them can't be had.
std::vector<Descriptor> ListenOnAll(const addrinfo* infos, int port) {
  std::vector<Descriptor> fds;
  int error = EADDRNOTAVAIL;
  for (const addrinfo* info = infos; info != nullptr; info = info->ai_next) {
    if (Contains(fds, *info)) continue;
    SetPort(info->ai_addr, fds.empty() ? port : LocalEndpoint(fds.front().get()).port);
    Descriptor fd = TryListen(*info);
    if (fd.get() >= 0) {
      fds.push_back(std::move(fd));
    } else if (error = errno; !IsAbsent(error)) {
      fds.clear();
      break;
    }
  }
  errno = error;
  return fds;
}

// The address of a Unix socket; nothing when the path is too long for one.
std::optional<sockaddr_un> UnixAddress(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) return std::nullopt;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

// A socket's file that a process which ended has left.
bool IsStale(const std::string& path, const sockaddr_un& address) {
  struct stat info = {};
  if (lstat(path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode)) return false;
  const Descriptor probe(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  return connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 &&
         errno == ECONNREFUSED;
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<HostPort> ParseHostPort(const std::string& address) {
  const size_t colon = address.rfind(':');
  HostPort out;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &out.port) ||
      out.port < 0 || out.port > kMaxPort) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", address, "\" is not host:port with a port of 0 to ", kMaxPort));
  }
  out.host = address.substr(0, colon);
  const bool bracketed = absl::StartsWith(out.host, "[") && absl::EndsWith(out.host, "]");
  if (bracketed) out.host = out.host.substr(1, out.host.size() - 2);
  if (out.host.empty() || (!bracketed && absl::StrContains(out.host, ":"))) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", address, "\" is not host:port or [address]:port"));
  }
  return out;
}

bool IsLoopback(const std::string& host) {
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  return host == "::1" || host == "localhost";
}

absl::StatusOr<std::vector<Descriptor>> ListenOn(const HostPort& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* infos = nullptr;
  const int error =
      getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &infos);
  if (error != 0) return ListenError(AsText(address), gai_strerror(error));
  const AddressList owner(infos, freeaddrinfo);
  std::vector<Descriptor> fds = ListenOnAll(infos, address.port);
  // A port that was free for the first address may be taken for another one.
  for (int i = 0; address.port == 0 && fds.empty() && errno == EADDRINUSE && i < kFreePortTries;
       ++i) {
    fds = ListenOnAll(infos, 0);
  }
  if (fds.empty()) return ListenErrno(AsText(address));
  return fds;
}

absl::StatusOr<Descriptor> ListenOnPath(const std::string& path) {
  const std::optional<sockaddr_un> address = UnixAddress(path);
  if (!address.has_value()) return ListenError(path, "the path is too long for a socket");
  if (IsStale(path, *address)) unlink(path.c_str());
  Descriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) return ListenErrno(path);
  fchmod(fd.get(), S_IRUSR | S_IWUSR);  // the file gets this mode in bind: never open to others
  if (bind(fd.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof(*address)) != 0 ||
      listen(fd.get(), kBacklog) != 0) {
    return ListenErrno(path);
  }
  return fd;
}

Endpoint ToEndpoint(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof(text));
    return {text, ntohs(v4.sin_port)};
  }
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
    inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof(text));
  } else {
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof(text));
  }
  return {text, ntohs(v6.sin6_port)};
}

Endpoint LocalEndpoint(int fd) {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  return ToEndpoint(address);
}

int64_t RaiseFileLimit() {
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  getrlimit(RLIMIT_NOFILE, &limit);
  return static_cast<int64_t>(limit.rlim_cur);
}

}  // namespace headstart
