// Addresses and listening sockets.
#pragma once

#include <sys/socket.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headstart {

// An open file; closed with this.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.Release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    Descriptor old(std::exchange(fd_, other.Release()));
    return *this;
  }
  ~Descriptor();

  int get() const { return fd_; }  // -1: none
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

struct HostPort {
  std::string host;  // a name or an address, without brackets
  int port = 0;
};

// "host:port" or "[v6 address]:port". INVALID_ARGUMENT names the text.
absl::StatusOr<HostPort> ParseHostPort(const std::string& address);

// True for addresses of this machine only: 127.0.0.0/8, ::1, the name localhost.
bool IsLoopback(const std::string& host);

// Sockets that listen, one for each address of the host that this machine has, all on one port.
// [::] takes IPv4 too. UNAVAILABLE when the port is taken or not allowed; the message names the
// address.
absl::StatusOr<std::vector<Descriptor>> ListenOn(const HostPort& address);

// A Unix socket that listens, for processes of this user only. One that nobody listens on any more
// is replaced. UNAVAILABLE names the path.
absl::StatusOr<Descriptor> ListenOnPath(const std::string& path);

// A socket address as text; IPv4 inside IPv6 as IPv4.
struct Endpoint {
  std::string ip;
  int port = 0;

  friend bool operator==(const Endpoint&, const Endpoint&) = default;
};
Endpoint ToEndpoint(const sockaddr_storage& address);

// The local end of a bound or connected socket.
Endpoint LocalEndpoint(int fd);

// Raises the soft limit of open files to the hard one; returns what it is then.
int64_t RaiseFileLimit();

}  // namespace headstart
