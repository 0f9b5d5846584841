#include "tests/server/http_client.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace headstart::testing {
namespace {

HttpReply Parse(const std::string& text) {
  HttpReply reply;
  const size_t end = text.find("\r\n\r\n");
  if (end == std::string::npos || text.size() < 12) return reply;
  if (!absl::SimpleAtoi(text.substr(9, 3), &reply.status)) return reply;
  reply.head = text.substr(0, end + 2);
  reply.body = text.substr(end + 4);
  return reply;
}

HttpReply ExchangeWith(int fd, const sockaddr* address, socklen_t length,
                       const std::string& request) {
  if (connect(fd, address, length) == 0) return ExchangeOn(fd, request);
  close(fd);
  return {};
}

}  // namespace

std::string HttpReply::Header(const std::string& name) const {
  for (absl::string_view line : absl::StrSplit(head, "\r\n")) {
    if (absl::StartsWithIgnoreCase(line, name + ": ")) {
      return std::string(line.substr(name.size() + 2));
    }
  }
  return "";
}

std::string HttpHead(const std::string& method, const std::string& path, const std::string& more) {
  return absl::StrCat(method, " ", path, " HTTP/1.1\r\nHost: test\r\n", more, "\r\n");
}

HttpReply ExchangeOn(int fd, const std::string& request) {
  std::string received;
  char buffer[65536];
  send(fd, request.data(), request.size(), MSG_NOSIGNAL);
  for (ssize_t n = read(fd, buffer, sizeof(buffer)); n > 0; n = read(fd, buffer, sizeof(buffer))) {
    received.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return Parse(received);
}

HttpReply Exchange(int port, const std::string& request) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return ExchangeWith(socket(AF_INET, SOCK_STREAM, 0), reinterpret_cast<sockaddr*>(&address),
                      sizeof(address), request);
}

HttpReply Exchange(const std::string& socket_path, const std::string& request) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, socket_path.c_str(), sizeof(address.sun_path) - 1);
  return ExchangeWith(socket(AF_UNIX, SOCK_STREAM, 0), reinterpret_cast<sockaddr*>(&address),
                      sizeof(address), request);
}

}  // namespace headstart::testing
