#include "tests/client/kv_stream.h"

#include <algorithm>
#include <bit>

#include "client/checksum.h"
#include "client/kv_receiver.h"

namespace headstart::testing {
namespace {

// The lowest `num_bytes` bytes of a number.
std::string LittleEndian(uint64_t number, int num_bytes) {
  std::string bytes;
  for (int i = 0; i < num_bytes; ++i) bytes += static_cast<char>(number >> 8 * i);
  return bytes;
}

std::string LittleEndian(float number) { return LittleEndian(std::bit_cast<uint32_t>(number), 4); }

uint32_t TokenId(uint32_t position) { return position * 7 % 1000; }

v1::KvManifest MakeManifest(const KvStreamSpec& spec) {
  v1::KvManifest manifest;
  manifest.set_model("tiny");
  manifest.set_model_hash("aa");
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < spec.num_tokens; ++i) ids.push_back(TokenId(i));
  manifest.set_token_hash(TokenHash(ids));
  manifest.set_num_tokens(spec.num_tokens);
  v1::KvLayout& layout = *manifest.mutable_layout();
  layout.set_num_layers(spec.num_layers);
  layout.set_num_kv_heads(spec.num_kv_heads);
  layout.set_head_dim(spec.head_dim);
  layout.set_dtype(spec.dtype);
  layout.set_block_tokens(spec.block_tokens);
  manifest.mutable_attention()->set_algorithm(v1::AttentionProvenance::ALGORITHM_DENSE);
  return manifest;
}

// Appends K or V of the chunk's heads and tokens to its data.
void AppendPlane(const KvShape& shape, const std::byte* plane, v1::KvChunk* chunk) {
  for (uint32_t h = 0; h < chunk->kv_head_count(); ++h) {
    const int64_t row = (chunk->kv_head_begin() + h) * shape.num_tokens + chunk->token_begin();
    chunk->mutable_data()->append(reinterpret_cast<const char*>(plane + row * shape.row_bytes()),
                                  chunk->token_count() * shape.row_bytes());
  }
}

// All chunks of one layer in one pass.
void AppendLayer(const KvStreamSpec& spec, const std::vector<std::byte>& kv, uint32_t layer,
                 uint32_t pass, KvStream* stream) {
  const KvShape shape = ShapeOf(spec);
  const std::byte* k = kv.data() + 2 * layer * shape.plane_bytes();
  const uint32_t end = std::min(pass + spec.pass_tokens, spec.num_tokens);
  for (uint32_t token = pass; token < end; token += spec.chunk_tokens) {
    for (uint32_t head = 0; head < spec.num_kv_heads; head += spec.chunk_kv_heads) {
      v1::KvChunk& chunk = *stream->emplace_back().mutable_chunk();
      chunk.set_index(static_cast<uint32_t>(stream->size()) - 3);
      chunk.set_layer(layer);
      chunk.set_token_begin(token);
      chunk.set_token_count(std::min(spec.chunk_tokens, end - token));
      chunk.set_kv_head_begin(head);
      chunk.set_kv_head_count(std::min(spec.chunk_kv_heads, spec.num_kv_heads - head));
      AppendPlane(shape, k, &chunk);
      AppendPlane(shape, k + shape.plane_bytes(), &chunk);
      Seal(&chunk);
    }
  }
}

}  // namespace

KvShape ShapeOf(const KvStreamSpec& spec) {
  return {.num_layers = spec.num_layers,
          .num_kv_heads = spec.num_kv_heads,
          .head_dim = spec.head_dim,
          .num_tokens = spec.num_tokens,
          .element_bytes = KvDtypeBytes(spec.dtype)};
}

v1::PrefillRequest RequestFor(const KvStreamSpec& spec) {
  v1::PrefillRequest request;
  request.set_request_id("r-1");
  for (uint32_t i = 0; i < spec.num_tokens; ++i) request.add_token_ids(TokenId(i));
  return request;
}

std::vector<std::byte> MakeKv(const KvStreamSpec& spec) {
  std::vector<std::byte> kv(ShapeOf(spec).total_bytes());
  uint32_t state = 1;
  for (std::byte& byte : kv) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<std::byte>(state >> 24);
  }
  return kv;
}

KvStream MakeStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv) {
  KvStream stream(2);
  stream[0].mutable_accepted()->set_request_id("r-1");
  *stream[1].mutable_manifest() = MakeManifest(spec);
  for (uint32_t pass = 0; pass < spec.num_tokens; pass += spec.pass_tokens) {
    for (uint32_t layer = 0; layer < spec.num_layers; ++layer)
      AppendLayer(spec, kv, layer, pass, &stream);
  }
  v1::Completed completed;
  completed.set_num_chunks(static_cast<uint32_t>(stream.size()) - 2);
  completed.set_kv_bytes(kv.size());
  completed.mutable_first_token()->set_id(42);
  completed.mutable_first_token()->set_logprob(-0.5f);
  *completed.mutable_manifest() = MakeManifest(spec);
  for (uint32_t i = 0; i < spec.num_layers; ++i)
    completed.mutable_manifest()->add_layer_density(1.0f);
  completed.mutable_statistics()->set_executed_blocks(90);
  completed.mutable_statistics()->set_causal_blocks(uint64_t{1} << 40);
  completed.mutable_statistics()->set_dense_fallbacks(2);
  Seal(&completed);
  *stream.emplace_back().mutable_completed() = completed;
  return stream;
}

uint32_t SlowCrc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffffu;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

void Seal(v1::KvChunk* chunk) {
  std::string bytes;
  for (const uint32_t field :
       {chunk->index(), chunk->layer(), chunk->token_begin(), chunk->token_count(),
        chunk->kv_head_begin(), chunk->kv_head_count()}) {
    bytes += LittleEndian(field, 4);
  }
  chunk->set_crc32c(SlowCrc32c(bytes + chunk->data()));
}

void Seal(v1::Completed* completed) {
  const v1::PrefillStatistics& statistics = completed->statistics();
  std::string bytes =
      LittleEndian(completed->first_token().id(), 4) +
      LittleEndian(completed->first_token().logprob()) + LittleEndian(completed->num_chunks(), 4) +
      LittleEndian(statistics.dense_fallbacks(), 4) + LittleEndian(completed->kv_bytes(), 8) +
      LittleEndian(statistics.executed_blocks(), 8) + LittleEndian(statistics.causal_blocks(), 8);
  for (const float density : completed->manifest().layer_density()) bytes += LittleEndian(density);
  completed->set_crc32c(SlowCrc32c(bytes));
}

grpc::ByteBuffer ToByteBuffer(const std::string& bytes, size_t slice_bytes) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += slice_bytes)
    slices.emplace_back(bytes.substr(at, slice_bytes));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace headstart::testing
