#include "tests/fuzz/live/hostile_http2.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/fuzz/live/hpack.h"

namespace headstart::testing {
namespace {

// RFC 9113, section 6.
constexpr uint8_t kDataFrame = 0, kHeadersFrame = 1, kPriorityFrame = 2, kResetFrame = 3,
                  kSettingsFrame = 4, kPushFrame = 5, kPingFrame = 6, kGoAwayFrame = 7,
                  kWindowFrame = 8, kContinuationFrame = 9;
constexpr uint8_t kPaddedFlag = 8, kPriorityFlag = 32;
constexpr uint32_t kNumbers32[] = {0, 1, 2, 16383, 16384, 65535, 65536, 0x7fffffff, 0xffffffff};

std::string BigEndian(uint64_t number, int bytes) {
  std::string out;
  for (int i = bytes - 1; i >= 0; --i) out.push_back(static_cast<char>(number >> (8 * i)));
  return out;
}

}  // namespace

HostileConnection::HostileConnection(Random* random, int port, int64_t mischief)
    : random_(*random), mischief_(mischief), wire_(port) {
  Greet();
}

void HostileConnection::Send(uint8_t type, uint8_t flags, uint32_t stream,
                             const std::string& payload) {
  if (!alive_) return;
  alive_ = wire_.Send(Frame{static_cast<FrameType>(type), flags, stream, payload});
}

void HostileConnection::Greet() {
  std::string preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
  if (random_.Percent(mischief_ / 4)) preface = SpoilBytes(random_, 70, preface);
  alive_ = wire_.Send(preface);
  if (Mischief()) return SendSettings();
  Send(kSettingsFrame, 0, 0, "");
}

uint32_t HostileConnection::AnyStream() {
  if (Mischief()) return OneOf(random_, kNumbers32);
  if (streams_.empty()) return 1;
  return streams_[random_.Between(0, std::ssize(streams_) - 1)].id;
}

void HostileConnection::Open(const HostileCall& call) {
  const uint32_t stream = Mischief() ? AnyStream() : std::exchange(next_stream_, next_stream_ + 2);
  SendHeaders(stream,
              HpackBlock(random_, mischief_, HostileHeaders(random_, mischief_, call.path)));
  std::string unsent;
  for (const std::string& message : call.messages) {
    const uint64_t length =
        Mischief() ? message.size() + random_.Between(-3, 1 << 20) : message.size();
    const int64_t compressed = Mischief() ? random_.Between(0, 255) : 0;
    absl::StrAppend(&unsent, BigEndian(static_cast<uint64_t>(compressed), 1), BigEndian(length, 4),
                    message);
  }
  streams_.push_back({stream, std::move(unsent)});
}

void HostileConnection::SendHeaders(uint32_t stream, const std::string& block) {
  std::string left = block;
  uint8_t flags = Mischief() ? static_cast<uint8_t>(random_.Between(0, 255)) : 0;
  std::string front;
  if ((flags & kPaddedFlag) != 0) front += BigEndian(random_.Between(0, 255), 1);
  if ((flags & kPriorityFlag) != 0) front += BigEndian(random_.Between(0, 1ll << 40), 5);
  for (uint8_t type = kHeadersFrame;; type = kContinuationFrame) {
    const int64_t most = std::min<int64_t>(std::ssize(left), 16000);
    const auto size = static_cast<size_t>(random_.Percent(70) ? most : random_.Between(0, most));
    const bool last = size == left.size();
    if (last && !Mischief()) flags |= kEndHeaders;
    Send(type, flags, stream, front + left.substr(0, size));
    left.erase(0, size);
    if (last) break;
    if (random_.Percent(mischief_ / 2)) SendPing();
    flags = 0;
    front.clear();
  }
  // More of them than anybody needs.
  for (int64_t i = random_.Percent(mischief_ / 4) ? random_.Between(1, 100) : 0; i > 0; --i) {
    Send(kContinuationFrame, 0, stream, std::string(static_cast<size_t>(random_.Between(0, 9)), 0));
  }
}

void HostileConnection::SendData() {
  if (streams_.empty()) return;
  const size_t at = random_.Between(0, std::ssize(streams_) - 1);
  Stream& stream = streams_[at];
  const int64_t most = std::min<int64_t>(std::ssize(stream.unsent), 16384 - 256);
  const auto size = static_cast<size_t>(random_.Percent(60) ? most : random_.Between(0, most));
  uint8_t flags = 0;
  std::string payload = stream.unsent.substr(0, size);
  if (random_.Percent(10)) {
    const int64_t padding = random_.Between(0, 255);
    const int64_t said = Mischief() ? random_.Between(0, 255) : padding;
    payload = absl::StrCat(BigEndian(said, 1), payload, std::string(padding, '\0'));
    flags |= kPaddedFlag;
  }
  stream.unsent.erase(0, size);
  const bool ends = stream.unsent.empty() && random_.Percent(80);
  if (ends) flags |= kEndStream;
  Send(kDataFrame, flags, Mischief() ? AnyStream() : stream.id, payload);
  if (ends && !Mischief()) streams_.erase(streams_.begin() + static_cast<int64_t>(at));
}

void HostileConnection::SendSettings() {
  std::string payload;
  for (int64_t i = random_.Between(0, 8); i > 0; --i) {
    const int64_t id = random_.Between(0, 9);
    const uint32_t legal = id == 2 ? 0 : id == 5 ? 16384 : 65535;
    payload += BigEndian(id, 2) + BigEndian(Mischief() ? OneOf(random_, kNumbers32) : legal, 4);
  }
  if (Mischief()) payload = SpoilBytes(random_, 50, payload);
  Send(kSettingsFrame, Mischief() ? kAck : 0, Mischief() ? AnyStream() : 0, payload);
}

void HostileConnection::SendWindowUpdate() {
  const uint32_t more = Mischief() ? OneOf(random_, kNumbers32) : random_.Between(1, 1 << 20);
  Send(kWindowFrame, 0, random_.Percent(40) ? 0 : AnyStream(),
       BigEndian(more, random_.Percent(mischief_ / 4) ? 3 : 4));
}

void HostileConnection::SendReset() {
  Send(kResetFrame, 0, AnyStream(), BigEndian(Mischief() ? OneOf(random_, kNumbers32) : 8, 4));
}

void HostileConnection::SendPing() {
  Send(kPingFrame, Mischief() ? random_.Between(0, 1) : 0, Mischief() ? AnyStream() : 0,
       std::string(Mischief() ? random_.Between(0, 20) : 8, 'p'));
}

void HostileConnection::SendStrangeFrame() {
  const std::string bytes(static_cast<size_t>(random_.Between(0, 40)), '\x03');
  constexpr uint8_t kKinds[] = {kPriorityFrame,     kPushFrame, kGoAwayFrame,
                                kContinuationFrame, 10,         0xee};
  std::string frame = Encode({static_cast<FrameType>(OneOf(random_, kKinds)),
                              static_cast<uint8_t>(random_.Between(0, 255)), AnyStream(), bytes});
  // Longer than is allowed, or than what follows; or cut.
  if (random_.Percent(10)) frame.replace(0, 3, BigEndian(random_.Between(0, 0xffffff), 3));
  if (random_.Percent(10)) frame.resize(random_.Between(0, std::ssize(frame)));
  if (alive_) alive_ = wire_.Send(frame);
}

void HostileConnection::Listen(absl::Duration patience) {
  while (const auto frame = wire_.Read(patience)) {
    if ((frame->flags & kAck) != 0 || Mischief()) continue;
    if (frame->type == FrameType::kSettings) Send(kSettingsFrame, kAck, 0, "");
    if (frame->type == FrameType::kPing) Send(kPingFrame, kAck, 0, frame->payload);
    if (frame->type == FrameType::kData && !frame->payload.empty()) {
      Send(kWindowFrame, 0, 0, BigEndian(frame->payload.size(), 4));
      Send(kWindowFrame, 0, frame->stream, BigEndian(frame->payload.size(), 4));
    }
  }
}

void HostileConnection::Finish() {
  for (int steps = 0; steps < 100 && alive_ && !streams_.empty(); ++steps) SendData();
  Listen(absl::Milliseconds(50));
}

void HostileConnection::Step() {
  const int64_t kind = random_.Between(1, 100);
  if (kind <= 50) return SendData();
  if (kind <= 65) return Listen(absl::ZeroDuration());
  if (kind <= 77) return SendWindowUpdate();
  if (kind <= 84) return SendReset();
  if (kind <= 90) return SendSettings();
  if (Mischief()) return SendStrangeFrame();
  if (kind <= 92) return SendPing();
}

}  // namespace headstart::testing
