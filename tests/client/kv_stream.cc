#include "tests/client/kv_stream.h"

#include <algorithm>
#include <memory>

#include "client/checksum.h"
#include "client/kv_receiver.h"
#include "client/manifest_check.h"

namespace headstart::testing {
namespace {

// The lowest `num_bytes` bytes of a number.
std::string LittleEndian(uint64_t number, int num_bytes) {
  std::string bytes;
  for (int i = 0; i < num_bytes; ++i) bytes += static_cast<char>(number >> 8 * i);
  return bytes;
}

uint32_t TokenId(uint32_t position) { return position * 7 % 1000; }

v1::KvManifest MakeManifest(const KvStreamSpec& spec) {
  v1::KvManifest manifest;
  manifest.set_model("tiny");
  manifest.set_model_hash("aa");
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < spec.num_tokens; ++i) ids.push_back(TokenId(i));
  manifest.set_token_hash(TokenHash(ids));
  manifest.set_num_tokens(spec.num_tokens);
  manifest.set_skip_tokens(spec.skip_tokens);
  v1::KvLayout& layout = *manifest.mutable_layout();
  layout.set_num_layers(spec.num_layers);
  layout.set_num_kv_heads(spec.num_kv_heads);
  layout.set_head_dim(spec.head_dim);
  layout.set_dtype(spec.dtype);
  layout.set_block_tokens(spec.block_tokens);
  manifest.mutable_attention()->set_algorithm(v1::AttentionProvenance::ALGORITHM_DENSE);
  return manifest;
}

// A part with its counts filled in.
v1::KvPart Whole(const KvStreamSpec& spec, v1::KvPart part) {
  if (part.layer_count() == 0) part.set_layer_count(spec.num_layers - part.layer_begin());
  if (part.kv_head_count() == 0) part.set_kv_head_count(spec.num_kv_heads - part.kv_head_begin());
  if (part.stripe_count() == 0) part.set_stripe_count(1);
  return part;
}

// K or V of a head of a layer, all tokens of the prompt.
std::string HeadBytes(const KvStreamSpec& spec, const std::vector<std::byte>& kv, uint32_t layer,
                      uint32_t plane, uint32_t head) {
  const size_t bytes = size_t{spec.num_tokens} * spec.head_dim * KvDtypeBytes(spec.dtype);
  const size_t row = (size_t{layer} * 2 + plane) * spec.num_kv_heads + head;
  return {reinterpret_cast<const char*>(kv.data()) + row * bytes, bytes};
}

// The chunk's data: page after page, of each K then V.
std::string ChunkBytes(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                       const v1::KvChunk& chunk) {
  const size_t row = size_t{spec.head_dim} * KvDtypeBytes(spec.dtype);
  const uint32_t chunk_end = chunk.token_begin() + chunk.token_count();
  std::string data;
  for (uint32_t begin = chunk.token_begin(); begin < chunk_end;) {
    const uint32_t end = std::min((begin / spec.block_tokens + 1) * spec.block_tokens, chunk_end);
    if (spec.dtype == v1::KV_DTYPE_FP8_E4M3) {
      for (const uint32_t plane : {0, 1}) {
        for (uint32_t h = 0; h < chunk.kv_head_count(); ++h) {
          const float scale = ScaleOf(spec, chunk.layer(), begin / spec.block_tokens, plane,
                                      chunk.kv_head_begin() + h);
          data.append(reinterpret_cast<const char*>(&scale), sizeof(scale));
        }
      }
    }
    for (const uint32_t plane : {0, 1}) {
      for (uint32_t h = 0; h < chunk.kv_head_count(); ++h) {
        data += HeadBytes(spec, kv, chunk.layer(), plane, chunk.kv_head_begin() + h)
                    .substr(begin * row, (end - begin) * row);
      }
    }
    begin = end;
  }
  return data;
}

// Layer and tokens of all chunks of a part, in the order in which they become ready, without data.
std::vector<v1::KvChunk> ChunksInOrder(const KvStreamSpec& spec, const v1::KvPart& part) {
  std::vector<v1::KvChunk> chunks;
  for (uint32_t pass = 0; pass < spec.num_tokens; pass += spec.pass_tokens) {
    const uint32_t pass_end = std::min(pass + spec.pass_tokens, spec.num_tokens);
    for (uint32_t layer = part.layer_begin(); layer < part.layer_begin() + part.layer_count();
         ++layer) {
      for (uint32_t token = pass; token < pass_end; token += spec.chunk_tokens) {
        const uint32_t end = std::min(token + spec.chunk_tokens, pass_end);
        if (end <= spec.skip_tokens) continue;
        v1::KvChunk& chunk = chunks.emplace_back();
        chunk.set_layer(layer);
        chunk.set_token_begin(std::max(token, spec.skip_tokens));
        chunk.set_token_count(end - chunk.token_begin());
        chunk.set_kv_head_begin(part.kv_head_begin());
        chunk.set_kv_head_count(part.kv_head_count());
      }
    }
  }
  return chunks;
}

// Chunks of the part, and the completion that counts them.
void AppendKv(const KvStreamSpec& spec, const std::vector<std::byte>& kv, v1::KvPart part,
              KvStream* stream) {
  part = Whole(spec, part);
  const std::vector<v1::KvChunk> all = ChunksInOrder(spec, part);
  uint32_t index = 0;
  uint64_t bytes = 0;
  for (size_t i = part.stripe_index(); i < all.size(); i += part.stripe_count()) {
    v1::KvChunk& chunk = *stream->emplace_back().mutable_chunk();
    chunk = all[i];
    chunk.set_index(index++);
    chunk.set_data(ChunkBytes(spec, kv, chunk));
    Seal(&chunk);
    bytes += chunk.data().size();
  }
  v1::PrefillResponse& last = stream->emplace_back();
  last.mutable_completed();
  EditCompleted(&last, [&](v1::Completed& completed) {
    completed.set_num_chunks(index);
    completed.set_kv_bytes(bytes);
    completed.mutable_first_token()->set_id(42);
    completed.mutable_first_token()->set_logprob(-0.5f);
    *completed.mutable_manifest() = MakeManifest(spec);
    for (uint32_t i = 0; i < spec.num_layers; ++i)
      completed.mutable_manifest()->add_layer_density(1.0f);
    completed.mutable_statistics()->set_executed_blocks(90);
    completed.mutable_statistics()->set_causal_blocks(uint64_t{1} << 40);
    completed.mutable_statistics()->set_dense_fallbacks(2);
  });
}

}  // namespace

float ScaleOf(const KvStreamSpec& spec, int64_t layer, int64_t page, int64_t plane, int64_t head) {
  const int64_t pages = (spec.num_tokens - 1) / spec.block_tokens + 1;
  const int64_t place = ((layer * pages + page) * 2 + plane) * spec.num_kv_heads + head;
  return 0.37f + 0.11f * static_cast<float>(place);
}

KvShape ShapeOf(const KvStreamSpec& spec, const v1::KvPart& part) {
  return {.num_layers = Whole(spec, part).layer_count(),
          .num_kv_heads = Whole(spec, part).kv_head_count(),
          .head_dim = spec.head_dim,
          .num_tokens = spec.num_tokens - spec.skip_tokens,
          .element_bytes = KvDtypeBytes(spec.dtype),
          .token_begin = spec.skip_tokens,
          .block_tokens = spec.block_tokens};
}

v1::PrefillRequest RequestFor(const KvStreamSpec& spec) {
  v1::PrefillRequest request;
  request.set_request_id("r-1");
  for (uint32_t i = 0; i < spec.num_tokens; ++i) request.add_token_ids(TokenId(i));
  request.set_skip_tokens(spec.skip_tokens);
  return request;
}

std::vector<std::byte> MakeKv(const KvStreamSpec& spec) {
  std::vector<std::byte> kv(size_t{spec.num_layers} * 2 * spec.num_kv_heads * spec.num_tokens *
                            spec.head_dim * KvDtypeBytes(spec.dtype));
  uint32_t state = 1;
  for (std::byte& byte : kv) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<std::byte>(state >> 24);
  }
  return kv;
}

std::vector<std::byte> PartOf(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                              const v1::KvPart& part) {
  const v1::KvPart whole = Whole(spec, part);
  std::vector<std::byte> bytes;
  for (uint32_t l = 0; l < whole.layer_count(); ++l) {
    for (const uint32_t plane : {0, 1}) {
      for (uint32_t h = 0; h < whole.kv_head_count(); ++h) {
        const std::string head =
            HeadBytes(spec, kv, whole.layer_begin() + l, plane, whole.kv_head_begin() + h)
                .substr(size_t{spec.skip_tokens} * spec.head_dim * KvDtypeBytes(spec.dtype));
        const auto* data = reinterpret_cast<const std::byte*>(head.data());
        bytes.insert(bytes.end(), data, data + head.size());
      }
    }
  }
  return bytes;
}

KvStream MakeStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv) {
  KvStream stream(2);
  stream[0].mutable_accepted()->set_request_id("r-1");
  *stream[1].mutable_manifest() = MakeManifest(spec);
  AppendKv(spec, kv, {}, &stream);
  return stream;
}

std::string FetchId() { return "0123456789abcdef"; }

KvStream MakeDetachedStream(const KvStreamSpec& spec) {
  KvStreamSpec nothing = spec;
  nothing.skip_tokens = spec.num_tokens;
  KvStream stream(2);
  stream[0].mutable_accepted()->set_request_id("r-1");
  stream[0].mutable_accepted()->set_fetch_id(FetchId());
  *stream[1].mutable_manifest() = MakeManifest(spec);
  AppendKv(nothing, {}, {}, &stream);
  EditCompleted(&stream.back(), [&](v1::Completed& completed) {
    completed.mutable_manifest()->set_skip_tokens(spec.skip_tokens);
  });
  return stream;
}

KvStream MakeFetchStream(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                         const v1::KvPart& part) {
  KvStream stream(1);
  *stream[0].mutable_manifest() = MakeManifest(spec);
  AppendKv(spec, kv, part, &stream);
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

void Seal(v1::CheckedCompletion* completion) {
  completion->set_crc32c(SlowCrc32c(completion->completed()));
}

v1::Completed CompletedIn(const v1::PrefillResponse& response) {
  v1::Completed completed;
  completed.ParseFromString(response.completed().completed());
  return completed;
}

void EditCompleted(v1::PrefillResponse* response, const std::function<void(v1::Completed&)>& edit) {
  v1::Completed completed = CompletedIn(*response);
  edit(completed);
  response->mutable_completed()->set_completed(completed.SerializeAsString());
  Seal(response->mutable_completed());
}

absl::Status ReceiveInTurns(const std::vector<KvStream>& streams, KvAssembly* assembly) {
  std::vector<std::unique_ptr<KvReceiver>> receivers;
  size_t longest = 0;
  for (const KvStream& stream : streams) {
    receivers.push_back(std::make_unique<KvReceiver>(StreamKind::kFetch, assembly));
    longest = std::max(longest, stream.size());
  }
  for (size_t m = 0; m < longest; ++m) {
    for (size_t i = 0; i < streams.size(); ++i) {
      if (m >= streams[i].size()) continue;
      grpc::ByteBuffer message = ToByteBuffer(streams[i][m].SerializeAsString(), 10000);
      if (absl::Status status = receivers[i]->OnMessage(message); !status.ok()) return status;
    }
  }
  return assembly->CheckWhole();
}

grpc::ByteBuffer ToByteBuffer(const std::string& bytes, size_t slice_bytes) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += slice_bytes)
    slices.emplace_back(bytes.substr(at, slice_bytes));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace headstart::testing
