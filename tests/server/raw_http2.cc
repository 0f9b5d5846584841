#include "tests/server/raw_http2.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/instant.h"

namespace headstart::testing {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr size_t kFrameHeaderBytes = 9;

std::string BigEndian(uint32_t number, int bytes) {
  std::string out;
  for (int i = bytes - 1; i >= 0; --i) out.push_back(static_cast<char>(number >> (8 * i)));
  return out;
}

// HPACK: a literal that is not indexed, with a new name; both shorter than 127 bytes.
std::string Header(const std::string& name, const std::string& value) {
  return absl::StrCat(std::string(1, '\0'), BigEndian(static_cast<uint32_t>(name.size()), 1), name,
                      BigEndian(static_cast<uint32_t>(value.size()), 1), value);
}

}  // namespace

uint32_t Frame::Number(size_t offset) const {
  uint32_t number = 0;
  for (size_t i = offset; i < offset + 4; ++i) {
    number = number << 8 | static_cast<unsigned char>(payload.at(i));
  }
  return number;
}

std::string Encode(const Frame& frame) {
  return absl::StrCat(BigEndian(static_cast<uint32_t>(frame.payload.size()), 3),
                      BigEndian(static_cast<uint32_t>(frame.type), 1), BigEndian(frame.flags, 1),
                      BigEndian(frame.stream, 4), frame.payload);
}

std::string Framed(const std::string& message, char compressed) {
  return absl::StrCat(std::string(1, compressed),
                      BigEndian(static_cast<uint32_t>(message.size()), 4), message);
}

RawHttp2::RawHttp2(int port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  HEADSTART_CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
}

RawHttp2::~RawHttp2() { close(fd_); }

bool RawHttp2::Send(const std::string& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t count = send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (count <= 0) return false;
    sent += static_cast<size_t>(count);
  }
  return true;
}

void RawHttp2::Handshake() {
  Send(kPreface);
  Send({FrameType::kSettings, 0, 0, ""});
  Send({FrameType::kSettings, kAck, 0, ""});
}

void RawHttp2::OpenCall(uint32_t stream, const std::string& path, const std::string& timeout) {
  std::string headers =
      absl::StrCat(Header(":method", "POST"), Header(":scheme", "http"), Header(":path", path),
                   Header(":authority", "test"), Header("te", "trailers"),
                   Header("content-type", "application/grpc"));
  if (!timeout.empty()) headers += Header("grpc-timeout", timeout);
  Send({FrameType::kHeaders, kEndHeaders, stream, headers});
}

bool RawHttp2::Fill(size_t bytes, Instant deadline) {
  char buffer[65536];
  while (received_.size() < bytes && !closed_) {
    const auto left_ms = absl::ToInt64Milliseconds(deadline - Instant::Now());
    pollfd waiting = {fd_, POLLIN, 0};
    if (poll(&waiting, 1, static_cast<int>(std::max<int64_t>(left_ms, 0))) == 0) return false;
    const ssize_t count = read(fd_, buffer, sizeof(buffer));
    closed_ = count <= 0;
    if (count > 0) received_.append(buffer, static_cast<size_t>(count));
  }
  return received_.size() >= bytes;
}

std::optional<Frame> RawHttp2::Read(absl::Duration limit) {
  const Instant deadline = Instant::Now() + limit;
  if (!Fill(kFrameHeaderBytes, deadline)) return std::nullopt;
  Frame header;
  header.payload = received_.substr(0, kFrameHeaderBytes);
  const size_t length = header.Number(0) >> 8;
  if (!Fill(kFrameHeaderBytes + length, deadline)) return std::nullopt;
  Frame frame;
  frame.type = static_cast<FrameType>(header.payload[3]);
  frame.flags = static_cast<uint8_t>(header.payload[4]);
  frame.stream = header.Number(5);
  frame.payload = received_.substr(kFrameHeaderBytes, length);
  received_.erase(0, kFrameHeaderBytes + length);
  return frame;
}

bool RawHttp2::IsClosedWithin(absl::Duration limit) {
  const Instant deadline = Instant::Now() + limit;
  while (!closed_ && Instant::Now() < deadline) {
    Fill(received_.size() + 1, deadline);
  }
  return closed_;
}

}  // namespace headstart::testing
