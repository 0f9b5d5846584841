#include "tests/e2e/tcp_proxy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "kernels/base/check.h"

namespace headstart::testing {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

bool SendAll(int fd, const char* bytes, int64_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, bytes, static_cast<size_t>(size), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes += sent;
    size -= sent;
  }
  return true;
}

// Waits until one of the descriptors can be read; the first comes first.
int WaitForInput(const std::vector<int>& fds) {
  std::vector<pollfd> polled;
  for (const int fd : fds) polled.push_back({fd, POLLIN, 0});
  HEADSTART_CHECK(poll(polled.data(), polled.size(), -1) > 0);
  for (const pollfd& p : polled) {
    if (p.revents != 0) return p.fd;
  }
  return -1;
}

}  // namespace

TcpProxy::TcpProxy(int server_port, Harm harm) : server_port_(server_port), harm_(harm) {
  HEADSTART_CHECK(pipe(stop_) == 0);
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  HEADSTART_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  HEADSTART_CHECK(listen(listener_, 16) == 0);
  HEADSTART_CHECK(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { Run(); });
}

TcpProxy::~TcpProxy() {
  close(stop_[1]);
  thread_.join();
  close(stop_[0]);
  close(listener_);
}

void TcpProxy::Run() {
  while (WaitForInput({stop_[0], listener_}) == listener_) {
    const int client = accept(listener_, nullptr, nullptr);
    HEADSTART_CHECK(client >= 0);
    Serve(client);
    close(client);
  }
}

void TcpProxy::Serve(int client) {
  const int server = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Loopback(server_port_);
  HEADSTART_CHECK(connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) ==
                  0);
  std::vector<char> buffer(64 << 10);
  int64_t position = 0;
  for (;;) {
    const int ready = WaitForInput({stop_[0], client, server});
    if (ready == stop_[0]) break;
    const ssize_t size = recv(ready, buffer.data(), buffer.size(), 0);
    if (size <= 0) break;
    if (ready == client) {
      if (!SendAll(server, buffer.data(), size)) break;
      continue;
    }
    const int64_t passed = Spoil(position, buffer.data(), size);
    position += passed;
    bytes_from_server_ += passed;
    if (!SendAll(client, buffer.data(), passed) || passed < size) break;
  }
  close(server);
}

int64_t TcpProxy::Spoil(int64_t position, char* bytes, int64_t size) const {
  const int64_t flip = harm_.flip_at - position;
  if (harm_.flip_at >= 0 && flip >= 0 && flip < size)
    bytes[flip] = static_cast<char>(bytes[flip] ^ 1);
  return harm_.cut_at < 0 ? size : std::clamp<int64_t>(harm_.cut_at - position, 0, size);
}

}  // namespace headstart::testing
