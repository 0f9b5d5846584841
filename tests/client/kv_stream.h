// Correct response streams for made-up KV, and the ways to damage them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/kv_assembly.h"
#include "client/kv_destination.h"
#include "grpcpp/support/byte_buffer.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart::testing {

struct KvStreamSpec {
  uint32_t num_layers = 3;
  uint32_t num_kv_heads = 2;
  uint32_t head_dim = 4;
  uint32_t num_tokens = 21;
  uint32_t block_tokens = 4;
  uint32_t chunk_tokens = 8;  // multiple of block_tokens
  uint32_t pass_tokens =
      16;  // the server's piece: all layers of it come before the next; multiple of chunk_tokens
  uint32_t skip_tokens = 0;
  v1::KvDtype dtype = v1::KV_DTYPE_BF16;
};

v1::PrefillRequest RequestFor(const KvStreamSpec& spec);

// Different bytes everywhere: [layer][K, V][kv_heads][num_tokens][head_dim] of the whole prompt.
std::vector<std::byte> MakeKv(const KvStreamSpec& spec);

// Of a page of the wire, where the dtype is fp8. Different everywhere.
float ScaleOf(const KvStreamSpec& spec, int64_t layer, int64_t page, int64_t plane, int64_t head);

// What comes of a part, without its stripe.
KvShape ShapeOf(const KvStreamSpec& spec, const v1::KvPart& part = {});
// The same of MakeKv's bytes: [layer][K, V][kv_heads][tokens][head_dim].
std::vector<std::byte> PartOf(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                              const v1::KvPart& part = {});

using KvStream = std::vector<v1::PrefillResponse>;
// Of Prefill: accepted, manifest, chunks, completed.
KvStream MakeStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv);
// Of Prefill with detached KV: accepted, manifest, completed.
KvStream MakeDetachedStream(const KvStreamSpec& spec);
// Of FetchKv: manifest, chunks, completed.
KvStream MakeFetchStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                         const v1::KvPart& part);
// 16 bytes, as in the stream of detached KV.
std::string FetchId();

// CRC-32C bit by bit, independent of the client's.
uint32_t SlowCrc32c(const std::string& bytes);
// Sets the checksum that belongs to the message as it is now.
void Seal(v1::KvChunk* chunk);
void Seal(v1::CheckedCompletion* completion);

v1::Completed CompletedIn(const v1::PrefillResponse& response);
// Changes the completion, and seals it.
void EditCompleted(v1::PrefillResponse* response, const std::function<void(v1::Completed&)>& edit);

// The streams of FetchKv of one prompt, read in turns: one message of each at a time.
absl::Status ReceiveInTurns(const std::vector<KvStream>& streams, KvAssembly* assembly);

// What gRPC would hand over, in slices of `slice_bytes`.
grpc::ByteBuffer ToByteBuffer(const std::string& bytes, size_t slice_bytes);

}  // namespace headstart::testing
