#include "server/rpc/chunk_frame.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <isa-l/crc.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <memory>

#include "headstart/v1/prefill.pb.h"

namespace headstart {
namespace {

using ::google::protobuf::internal::WireFormatLite;
using ::google::protobuf::io::CodedOutputStream;

static_assert(std::endian::native == std::endian::little,
              "numbers are summed as they lie in memory");
static_assert(sizeof(ChunkHeader) == 24, "six uint32 without padding");

// ISA-L's function leaves both inversions to the caller and takes bytes that it only reads as
// mutable.
uint32_t ExtendInverted(uint32_t crc, absl::Span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const size_t count = std::min<size_t>(bytes.size(), INT_MAX);
    auto* begin = const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(bytes.data()));
    crc = crc32_iscsi(begin, static_cast<int>(count), crc);
    bytes.remove_prefix(count);
  }
  return crc;
}

// Adds a run, to the last one if it goes on there.
void Append(ByteRun run, std::vector<ByteRun>& runs) {
  if (run.empty()) return;
  if (!runs.empty() && runs.back().data() + runs.back().size() == run.data()) {
    runs.back() = ByteRun(runs.back().data(), runs.back().size() + run.size());
  } else {
    runs.push_back(run);
  }
}

using SharedMemory = std::shared_ptr<const HostChunk>;

// A slice that keeps `memory` as long as it lives.
grpc::Slice Refer(ByteRun run, const SharedMemory& memory) {
  return grpc::Slice(
      const_cast<std::byte*>(run.data()), run.size(),
      [](void* held) { delete static_cast<SharedMemory*>(held); }, new SharedMemory(memory));
}

constexpr uint32_t LengthDelimitedTag(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}

}  // namespace

std::vector<ByteRun> ChunkRuns(const std::byte* memory, const TokenRange& tokens,
                               const KvPart& part, const KvGeometry& geometry) {
  const int64_t row_bytes = int64_t{geometry.heads.head_dim} * DTypeBytes(geometry.dtype);
  const int64_t head_bytes = kBlockTokens * row_bytes;
  const int64_t plane_bytes = geometry.heads.num_kv_heads * head_bytes;
  const int64_t scales_of_head =
      geometry.scale_bytes() / (int64_t{2} * geometry.heads.num_kv_heads);
  const int64_t scales_of_plane = geometry.scale_bytes() / 2;
  const int64_t end = tokens.end();
  std::vector<ByteRun> runs;
  const std::byte* page = memory;
  for (int64_t first = tokens.first_page() * kBlockTokens; first < end;
       first += kBlockTokens, page += geometry.page_bytes()) {
    const int64_t row = std::max(tokens.begin, first) - first;
    const int64_t num_rows = std::min(end, first + kBlockTokens) - first - row;
    for (const std::byte* scales : {page, page + scales_of_plane}) {  // K, V
      Append({scales + part.head_begin * scales_of_head,
              static_cast<size_t>(part.head_count * scales_of_head)},
             runs);
    }
    const std::byte* const keys = page + geometry.scale_bytes();
    for (const std::byte* plane : {keys, keys + plane_bytes}) {
      for (int32_t head = part.head_begin; head < part.head_begin + part.head_count; ++head) {
        Append({plane + head * head_bytes + row * row_bytes,
                static_cast<size_t>(num_rows * row_bytes)},
               runs);
      }
    }
  }
  return runs;
}

uint32_t ChunkCrc32c(const ChunkHeader& header, absl::Span<const ByteRun> data) {
  const auto* header_bytes = reinterpret_cast<const std::byte*>(&header);
  uint32_t crc = ExtendInverted(~0u, {header_bytes, sizeof(header)});
  for (const ByteRun& run : data) crc = ExtendInverted(crc, run);
  return ~crc;
}

uint32_t Crc32c(absl::string_view bytes) {
  return ~ExtendInverted(~0u, {reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()});
}

std::string ChunkFramePrefix(const ChunkHeader& header, uint32_t crc32c, int64_t data_bytes) {
  v1::KvChunk fields;
  fields.set_index(header.index);
  fields.set_layer(header.layer);
  fields.set_token_begin(header.token_begin);
  fields.set_token_count(header.token_count);
  fields.set_kv_head_begin(header.kv_head_begin);
  fields.set_kv_head_count(header.kv_head_count);
  fields.set_crc32c(crc32c);

  constexpr uint32_t kDataTag = LengthDelimitedTag(v1::KvChunk::kDataFieldNumber);
  const uint64_t chunk_bytes = fields.ByteSizeLong() + CodedOutputStream::VarintSize32(kDataTag) +
                               CodedOutputStream::VarintSize64(data_bytes) + data_bytes;
  std::string prefix;
  google::protobuf::io::StringOutputStream stream(&prefix);
  {
    CodedOutputStream out(&stream);  // writes to `prefix` when it goes
    out.WriteTag(LengthDelimitedTag(v1::PrefillResponse::kChunkFieldNumber));
    out.WriteVarint64(chunk_bytes);
    fields.SerializeToCodedStream(&out);
    out.WriteTag(kDataTag);
    out.WriteVarint64(data_bytes);
  }
  return prefix;
}

StreamMessage ChunkMessage(const ShipmentReader::Chunk& chunk, const KvPart& part,
                           const KvGeometry& geometry) {
  const TokenRange& tokens = chunk.chunk.tokens;
  ChunkHeader header;
  header.index = chunk.index;
  header.layer = static_cast<uint32_t>(chunk.chunk.layer);
  header.token_begin = static_cast<uint32_t>(tokens.begin);
  header.token_count = static_cast<uint32_t>(tokens.count);
  header.kv_head_begin = static_cast<uint32_t>(part.head_begin);
  header.kv_head_count = static_cast<uint32_t>(part.head_count);
  const std::vector<ByteRun> runs = ChunkRuns(chunk.chunk.memory->data(), tokens, part, geometry);
  StreamMessage message;
  for (const ByteRun& run : runs) message.kv_bytes += static_cast<int64_t>(run.size());
  const uint32_t crc32c = ChunkCrc32c(header, runs);
  std::vector<grpc::Slice> slices = {
      grpc::Slice(ChunkFramePrefix(header, crc32c, message.kv_bytes))};
  for (const ByteRun& run : runs) slices.push_back(Refer(run, chunk.chunk.memory));
  message.bytes = grpc::ByteBuffer(slices.data(), slices.size());
  return message;
}

}  // namespace headstart
