#include "server/rpc/chunk_frame.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <isa-l/crc.h>

#include <algorithm>
#include <bit>
#include <climits>

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

template <typename T>
uint32_t ExtendInvertedBy(uint32_t crc, T number) {
  return ExtendInverted(crc, {reinterpret_cast<const std::byte*>(&number), sizeof(number)});
}

constexpr uint32_t LengthDelimitedTag(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}

}  // namespace

uint32_t ChunkCrc32c(const ChunkHeader& header, absl::Span<const std::byte> data) {
  const auto* header_bytes = reinterpret_cast<const std::byte*>(&header);
  return ~ExtendInverted(ExtendInverted(~0u, {header_bytes, sizeof(header)}), data);
}

uint32_t CompletedCrc32c(const v1::Completed& completed) {
  const v1::PrefillStatistics& statistics = completed.statistics();
  uint32_t crc = ExtendInvertedBy<uint32_t>(~0u, completed.first_token().id());
  crc = ExtendInvertedBy<float>(crc, completed.first_token().logprob());
  crc = ExtendInvertedBy<uint32_t>(crc, completed.num_chunks());
  crc = ExtendInvertedBy<uint32_t>(crc, statistics.dense_fallbacks());
  crc = ExtendInvertedBy<uint64_t>(crc, completed.kv_bytes());
  crc = ExtendInvertedBy<uint64_t>(crc, statistics.executed_blocks());
  crc = ExtendInvertedBy<uint64_t>(crc, statistics.causal_blocks());
  for (const float density : completed.manifest().layer_density()) {
    crc = ExtendInvertedBy<float>(crc, density);
  }
  return ~crc;
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

}  // namespace headstart
