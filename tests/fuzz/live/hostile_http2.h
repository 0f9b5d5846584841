// The frames of a client of gRPC, legal and illegal ones.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/fuzz/live/hostile_message.h"
#include "tests/server/raw_http2.h"

namespace headstart::testing {

// Messages for a method, as they are on the wire before gRPC's length prefix.
struct HostileCall {
  std::string path;
  std::vector<std::string> messages;
};

// One connection that does a step at a time. With `mischief` 0 its frames keep to the rules.
class HostileConnection {
 public:
  HostileConnection(Random* random, int port, int64_t mischief);

  // Opens a stream with this call; what it has to send is sent by later steps.
  void Open(const HostileCall& call);
  // One more thing: a part of a message, a frame of another kind, a look at what came.
  void Step();
  // Sends what its calls have left, and listens until nothing comes any more.
  void Finish();

 private:
  struct Stream {
    uint32_t id = 0;
    std::string unsent;
  };

  bool Mischief() { return random_.Percent(mischief_); }
  // A stream of this connection; with mischief any number.
  uint32_t AnyStream();
  void Send(uint8_t type, uint8_t flags, uint32_t stream, const std::string& payload);
  void Greet();
  // The header block in one frame or several; with mischief with others between.
  void SendHeaders(uint32_t stream, const std::string& block);
  void SendData();
  void SendSettings();
  void SendWindowUpdate();
  void SendReset();
  void SendPing();
  // A frame that servers do not get from clients, or that lies about itself.
  void SendStrangeFrame();
  // Looks at what comes until nothing does within `patience`. Answers SETTINGS and PING, and gives
  // the server room to send, unless there is mischief.
  void Listen(absl::Duration patience);

  Random& random_;
  const int64_t mischief_;
  RawHttp2 wire_;
  bool alive_ = true;  // the server still takes what is sent
  uint32_t next_stream_ = 1;
  std::vector<Stream> streams_;
};

}  // namespace headstart::testing
