// Correct response streams for made-up KV, and the ways to damage them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

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
      16;  // prefill chunk: all layers of it come before the next; multiple of chunk_tokens
  uint32_t chunk_kv_heads = 2;  // heads of a chunk
  v1::KvDtype dtype = v1::KV_DTYPE_BF16;
};

KvShape ShapeOf(const KvStreamSpec& spec);
v1::PrefillRequest RequestFor(const KvStreamSpec& spec);

// Different bytes everywhere: [layer][K, V][kv_heads][num_tokens][head_dim].
std::vector<std::byte> MakeKv(const KvStreamSpec& spec);

// The stream that ships `kv`: accepted, manifest, chunks, completed.
using KvStream = std::vector<v1::PrefillResponse>;
KvStream MakeStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv);

// CRC-32C bit by bit, independent of the client's.
uint32_t SlowCrc32c(const std::string& bytes);
// Sets the checksum that belongs to the message as it is now.
void Seal(v1::KvChunk* chunk);
void Seal(v1::Completed* completed);

// What gRPC would hand over, in slices of `slice_bytes`.
grpc::ByteBuffer ToByteBuffer(const std::string& bytes, size_t slice_bytes);

}  // namespace headstart::testing
