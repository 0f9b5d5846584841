// A bare gRPC loop: a server streams memory in messages of one payload each, clients put it where
// it belongs. Nothing of Headstart is in it but the CRC-32C, so it is the ceiling of every transfer
// that uses gRPC.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/channel_arguments.h"

namespace headstart {

// What one stream carries: bytes [offset, offset + bytes) of the server's memory.
struct StreamRequest {
  int64_t offset = 0;
  int64_t bytes = 0;
  int64_t payload_bytes = 0;  // of a message; the last one may be shorter
  int64_t checksum = 0;       // 1: each message brings the CRC-32C of its payload
};

// In front of each payload.
struct MessageHeader {
  int64_t offset = 0;
  int64_t bytes = 0;
  int64_t crc32c = 0;
};

// Answers every call with the bytes that it asks for. Payloads are not copied: slices refer to
// `source`, which must outlive the server's calls.
class LoopService final : public grpc::CallbackGenericService {
 public:
  explicit LoopService(absl::Span<std::byte> source) : source_(source) {}
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* call) override;

  // The most payload bytes that gRPC held at once: memory that a server can't use again yet.
  int64_t peak_bytes_in_flight() const { return peak_; }

 private:
  friend class PayloadStream;
  grpc::Slice Lend(absl::Span<std::byte> payload);

  const absl::Span<std::byte> source_;
  std::atomic<int64_t> in_flight_{0};
  std::atomic<int64_t> peak_{0};
};

// What a client does with a payload.
enum class Arrival { kDrop, kCopy, kCopyAndCheck };

// How a client waits for messages: gRPC's threads call it, or a thread for each stream polls a
// completion queue of its own.
enum class Waiting { kCallback, kQueue };

struct LoopOptions {
  int connections = 8;
  int streams = 1;  // on each connection
  int64_t payload_bytes = 1 << 20;
  Arrival arrival = Arrival::kCopyAndCheck;
  Waiting waiting = Waiting::kCallback;
};

// Moves the first destination.size() bytes of the server's memory to `destination` over new
// connections, with `arguments` for each. Returns the seconds from the first request until the last
// byte is in its place; connecting is not part of them. DATA_LOSS: a message was wrong.
absl::StatusOr<double> FetchAll(const std::string& target, const LoopOptions& options,
                                const grpc::ChannelArguments& arguments,
                                absl::Span<std::byte> destination);

}  // namespace headstart
