// Decodes the messages of a response stream without copying the KV bytes in them. The bytes are not
// trusted.
#pragma once

#include <cstdint>
#include <variant>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "grpcpp/support/byte_buffer.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// A KvChunk whose data still lies where gRPC received it.
struct KvChunkView {
  uint32_t index = 0;
  uint32_t layer = 0;
  uint32_t token_begin = 0;
  uint32_t token_count = 0;
  uint32_t kv_head_begin = 0;
  uint32_t kv_head_count = 0;
  uint32_t crc32c = 0;
  // Pieces of `data`, in order; they live as long as the message they were decoded from.
  absl::InlinedVector<absl::string_view, 64> data;

  int64_t data_bytes() const {
    int64_t bytes = 0;
    for (const absl::string_view piece : data) bytes += static_cast<int64_t>(piece.size());
    return bytes;
  }
};

using ResponseEvent =
    std::variant<v1::Accepted, v1::KvManifest, KvChunkView, v1::CheckedCompletion>;

// Decodes one serialised PrefillResponse. Unknown fields are skipped. DATA_LOSS when the bytes are
// no such message, or one without exactly one event that is known here. `message` is only read
// (gRPC's reader has no const form).
absl::StatusOr<ResponseEvent> DecodeResponse(grpc::ByteBuffer& message);

}  // namespace headstart
