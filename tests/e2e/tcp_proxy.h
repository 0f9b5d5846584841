// Passes TCP connections on to a server, byte by byte, and harms what comes back.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

namespace headstart::testing {

// Positions in what the server sends on one connection; negative: never.
struct Harm {
  int64_t cut_at = -1;   // close both sides before this byte
  int64_t flip_at = -1;  // turn the lowest bit of this byte around
};

// One connection at a time, each harmed alike.
class TcpProxy {
 public:
  TcpProxy(int server_port, Harm harm);
  ~TcpProxy();
  TcpProxy(const TcpProxy&) = delete;
  TcpProxy& operator=(const TcpProxy&) = delete;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  // Passed on to the client, all connections together.
  int64_t bytes_from_server() const { return bytes_from_server_; }

 private:
  void Run();
  void Serve(int client);
  // Applies the harm to bytes [position, position + size) of the server's; how many of them may go
  // on.
  int64_t Spoil(int64_t position, char* bytes, int64_t size) const;

  const int server_port_;
  const Harm harm_;
  int listener_ = -1;
  int stop_[2] = {-1, -1};  // a pipe; readable when it is time to go
  int port_ = 0;
  std::atomic<int64_t> bytes_from_server_{0};
  std::thread thread_;
};

}  // namespace headstart::testing
