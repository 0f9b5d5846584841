// A client that speaks HTTP/2 frame by frame, for what no library would send.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "kernels/base/instant.h"

namespace headstart::testing {

enum class FrameType : uint8_t {
  kData = 0,
  kHeaders = 1,
  kRstStream = 3,
  kSettings = 4,
  kPing = 6,
  kGoAway = 7,
  kWindowUpdate = 8,
  kContinuation = 9,
};
inline constexpr uint8_t kAck = 1;         // of SETTINGS and PING
inline constexpr uint8_t kEndStream = 1;   // of DATA and HEADERS
inline constexpr uint8_t kEndHeaders = 4;  // of HEADERS
inline constexpr uint32_t kEnhanceYourCalm = 11;

struct Frame {
  FrameType type = FrameType::kData;
  uint8_t flags = 0;
  uint32_t stream = 0;
  std::string payload;

  // Big-endian number at the payload's offset.
  uint32_t Number(size_t offset) const;
};

std::string Encode(const Frame& frame);

// A message as gRPC writes it. `compressed`: the byte that says whether it is, 0 or 1.
std::string Framed(const std::string& message, char compressed = 0);

// One TCP connection to 127.0.0.1.
class RawHttp2 {
 public:
  explicit RawHttp2(int port);
  ~RawHttp2();
  RawHttp2(const RawHttp2&) = delete;
  RawHttp2& operator=(const RawHttp2&) = delete;

  // False when the server has closed the connection.
  bool Send(const std::string& bytes);
  bool Send(const Frame& frame) { return Send(Encode(frame)); }

  // Client preface, empty SETTINGS, and the acknowledgement of the server's.
  void Handshake();
  // Opens a call of gRPC on the stream, without a message. `timeout`: as grpc-timeout has it.
  void OpenCall(uint32_t stream, const std::string& path, const std::string& timeout = "");

  // The next frame; none when the connection is closed or nothing comes within `limit`.
  std::optional<Frame> Read(absl::Duration limit);
  // Reads and drops frames, answering nothing, until the server closes. False when `limit` passes.
  bool IsClosedWithin(absl::Duration limit);

 private:
  // False when closed, or at `deadline`.
  bool Fill(size_t bytes, Instant deadline);

  int fd_;
  std::string received_;
  bool closed_ = false;
};

}  // namespace headstart::testing
