// Checks the response stream of one prompt and puts its KV where the caller wants it, one copy from
// gRPC's buffers.
//
// Nothing in the stream is trusted. Every departure from the wire format
// (proto/headstart/v1/prefill.proto) or from what the caller expects is DATA_LOSS: order, gaps,
// duplicates, sizes, totals, checksums, token hash. No memory is taken for a size that was not
// checked first. After an error the destination holds anything and is of no use.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kv_destination.h"
#include "client/response_decoder.h"
#include "grpcpp/support/byte_buffer.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// What the caller knows beforehand. Zero and empty: anything will do.
struct KvExpectation {
  std::string request_id;
  std::string model;
  std::string model_hash;
  std::string token_hash;  // 32 bytes
  int64_t num_tokens = 0;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  v1::KvDtype dtype = v1::KV_DTYPE_UNSPECIFIED;
  bool dense = false;  // the request forbade sparse attention
};

struct KvReceiverOptions {
  KvExpectation expected;
  // A manifest that promises more is refused with RESOURCE_EXHAUSTED.
  int64_t max_kv_bytes = int64_t{64} << 30;

  // The callbacks run on the thread that reads the stream, which stands still meanwhile. An error
  // ends the call with it.
  std::function<absl::Status(const v1::Accepted&)> on_accepted;
  // Gives the memory for the KV, after the manifest was checked. Empty: the KV is checked and
  // dropped.
  std::function<absl::StatusOr<KvDestination>(const v1::KvManifest&, const KvShape&)> on_manifest;
  // KV bytes so far, and in all.
  std::function<void(int64_t, int64_t)> on_progress;
  // A layer is complete: all heads, all tokens.
  std::function<absl::Status(int64_t layer)> on_layer;
};

class KvReceiver {
 public:
  explicit KvReceiver(KvReceiverOptions options);

  // Takes the next message of the stream.
  absl::Status OnMessage(grpc::ByteBuffer& message);

  // The stream ended with status OK.
  absl::Status OnEnd() const;

  const v1::Accepted& accepted() const { return accepted_; }
  // With layer_density once the stream is complete.
  const v1::KvManifest& manifest() const { return manifest_; }
  const v1::Completed& completed() const { return completed_; }
  const KvShape& shape() const { return shape_; }
  int64_t num_chunks() const { return num_chunks_; }
  int64_t kv_bytes() const { return kv_bytes_; }

 private:
  enum class State : uint8_t { kAwaitAccepted, kAwaitManifest, kChunks, kCompleted };

  absl::Status OnEvent(v1::Accepted& accepted);
  absl::Status OnEvent(v1::KvManifest& manifest);
  absl::Status OnEvent(KvChunkView& chunk);
  absl::Status OnEvent(v1::Completed& completed);
  absl::Status CheckChunk(const KvChunkView& chunk) const;
  absl::Status TakeData(const KvChunkView& chunk);
  absl::Status Advance(const KvChunkView& chunk);

  const KvReceiverOptions options_;
  State state_ = State::kAwaitAccepted;
  v1::Accepted accepted_;
  v1::KvManifest manifest_;
  v1::Completed completed_;
  KvShape shape_;
  KvDestination destination_;         // without layers: drop
  std::vector<uint32_t> next_token_;  // [layer][kv_head]
  std::vector<int64_t> layer_bytes_;  // received
  int64_t num_chunks_ = 0;
  int64_t kv_bytes_ = 0;
};

// Bytes of an element; 0 for a value that names no type.
int64_t KvDtypeBytes(v1::KvDtype dtype);

}  // namespace headstart
