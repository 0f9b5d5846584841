// Checks one response stream and puts the KV that it carries where the caller wants it, one copy
// from gRPC's buffers.
//
// Nothing in the stream is trusted. Every departure from the wire format
// (proto/headstart/v1/prefill.proto) or from what the caller expects is DATA_LOSS: order, gaps,
// duplicates, sizes, totals, checksums, token hash. No memory is taken for a size that was not
// checked first. After an error the destination holds anything and is of no use.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "client/kv_assembly.h"
#include "client/response_decoder.h"
#include "grpcpp/support/byte_buffer.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

enum class StreamKind : uint8_t {
  kPrefill,   // accepted, manifest, chunks, completed
  kDetached,  // of Prefill with detached KV: the same without chunks
  kFetch,     // of FetchKv: manifest, chunks, completed
};

class KvReceiver {
 public:
  // `assembly` brings the streams of one prompt together and outlives this object.
  KvReceiver(StreamKind kind, KvAssembly* assembly);

  // Takes the next message of the stream.
  absl::Status OnMessage(grpc::ByteBuffer& message);

  // The stream ended with status OK.
  absl::Status OnEnd() const;

  // A stream of kFetch broke: its chunks from num_chunks() on come on another one, from the
  // manifest on.
  void OnResume();

  const v1::Accepted& accepted() const { return accepted_; }
  bool completed() const { return state_ == State::kCompleted; }
  // Taken from the stream.
  int64_t num_chunks() const { return num_chunks_; }
  int64_t kv_bytes() const { return kv_bytes_; }

 private:
  enum class State : uint8_t { kAwaitAccepted, kAwaitManifest, kChunks, kCompleted };

  absl::Status OnEvent(v1::Accepted& accepted);
  absl::Status OnEvent(v1::KvManifest& manifest);
  absl::Status OnEvent(KvChunkView& chunk);
  absl::Status OnEvent(v1::CheckedCompletion& completion);
  absl::Status CheckChunk(const KvChunkView& chunk) const;
  absl::Status CheckTokens(const KvChunkView& chunk, const KvRange& range) const;
  absl::Status TakeData(const KvChunkView& chunk, const KvRange& range);
  // Of a chunk whose layer is one of the part's.
  KvRange RangeOf(const KvChunkView& chunk) const;

  const StreamKind kind_;
  KvAssembly& assembly_;
  State state_;
  v1::Accepted accepted_;
  std::vector<int64_t> next_token_;  // by layer: chunks of the stream come in token order
  int64_t num_chunks_ = 0;
  int64_t kv_bytes_ = 0;
};

}  // namespace headstart
