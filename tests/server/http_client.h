// A client of the admin port that sends what it is told to, byte by byte.
#pragma once

#include <string>

namespace headstart::testing {

struct HttpReply {
  int status = 0;  // 0: closed without an answer
  std::string head;
  std::string body;

  // Of a header line; empty when there is none.
  std::string Header(const std::string& name) const;
};

// "METHOD path HTTP/1.1" and a Host line; `more`: whole header lines.
std::string HttpHead(const std::string& method, const std::string& path,
                     const std::string& more = "");

// Sends `request` over a connected socket, which it takes, and reads until the server closes.
HttpReply ExchangeOn(int fd, const std::string& request);
// The same with a new connection: to 127.0.0.1:port, or to a Unix socket.
HttpReply Exchange(int port, const std::string& request);
HttpReply Exchange(const std::string& socket_path, const std::string& request);

}  // namespace headstart::testing
