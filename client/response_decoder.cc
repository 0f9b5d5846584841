#include "client/response_decoder.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "grpcpp/support/proto_buffer_reader.h"

namespace headstart {
namespace {

using google::protobuf::io::CodedInputStream;

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

constexpr uint32_t Tag(int field, WireType type) {
  return static_cast<uint32_t>(field) << 3 | type;
}

// Skips a field of a later version of the format.
bool SkipField(CodedInputStream& in, uint32_t tag) {
  uint64_t varint;
  int length;
  switch (tag & 7) {
    case kVarint:
      return in.ReadVarint64(&varint);
    case kFixed64:
      return in.Skip(8);
    case kLengthDelimited:
      return in.ReadVarintSizeAsInt(&length) && in.Skip(length);
    case kFixed32:
      return in.Skip(4);
    default:
      return false;
  }
}

bool ReadPieces(CodedInputStream& in, KvChunkView* chunk) {
  int length;
  if (!in.ReadVarintSizeAsInt(&length)) return false;
  chunk->data.clear();  // of a repeated field the last one counts, as everywhere in protobuf
  while (length > 0) {
    const void* bytes;
    int size;
    if (!in.GetDirectBufferPointer(&bytes, &size)) return false;
    size = std::min(size, length);
    chunk->data.emplace_back(static_cast<const char*>(bytes), size);
    if (!in.Skip(size)) return false;
    length -= size;
  }
  return true;
}

bool ReadChunkField(CodedInputStream& in, uint32_t tag, KvChunkView* chunk) {
  using Chunk = v1::KvChunk;
  switch (tag) {
    case Tag(Chunk::kIndexFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->index);
    case Tag(Chunk::kLayerFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->layer);
    case Tag(Chunk::kTokenBeginFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->token_begin);
    case Tag(Chunk::kTokenCountFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->token_count);
    case Tag(Chunk::kKvHeadBeginFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->kv_head_begin);
    case Tag(Chunk::kKvHeadCountFieldNumber, kVarint):
      return in.ReadVarint32(&chunk->kv_head_count);
    case Tag(Chunk::kCrc32CFieldNumber, kFixed32):
      return in.ReadLittleEndian32(&chunk->crc32c);
    case Tag(Chunk::kDataFieldNumber, kLengthDelimited):
      return ReadPieces(in, chunk);
    default:
      return SkipField(in, tag);
  }
}

bool ReadEvent(CodedInputStream& in, KvChunkView* chunk) {
  while (const uint32_t tag = in.ReadTag()) {
    if (!ReadChunkField(in, tag, chunk)) return false;
  }
  return in.ConsumedEntireMessage();
}

bool ReadEvent(CodedInputStream& in, google::protobuf::Message* message) {
  return message->MergeFromCodedStream(&in) && in.ConsumedEntireMessage();
}

// Reads the length-delimited message of type T that follows.
template <typename T>
bool ReadNested(CodedInputStream& in, ResponseEvent* event) {
  int length;
  if (!in.ReadVarintSizeAsInt(&length)) return false;
  const CodedInputStream::Limit limit = in.PushLimit(length);
  if (!ReadEvent(in, &event->emplace<T>()) || in.BytesUntilLimit() != 0) return false;
  in.PopLimit(limit);
  return true;
}

// Reads one field of PrefillResponse; counts it when it is an event.
bool ReadResponseField(CodedInputStream& in, uint32_t tag, ResponseEvent* event, int* num_events) {
  using Response = v1::PrefillResponse;
  ++*num_events;
  switch (tag) {
    case Tag(Response::kAcceptedFieldNumber, kLengthDelimited):
      return ReadNested<v1::Accepted>(in, event);
    case Tag(Response::kManifestFieldNumber, kLengthDelimited):
      return ReadNested<v1::KvManifest>(in, event);
    case Tag(Response::kChunkFieldNumber, kLengthDelimited):
      return ReadNested<KvChunkView>(in, event);
    case Tag(Response::kCompletedFieldNumber, kLengthDelimited):
      return ReadNested<v1::CheckedCompletion>(in, event);
    default:
      --*num_events;
      return SkipField(in, tag);
  }
}

}  // namespace

absl::StatusOr<ResponseEvent> DecodeResponse(grpc::ByteBuffer& message) {
  grpc::ProtoBufferReader reader(&message);
  CodedInputStream in(&reader);
  ResponseEvent event;
  int num_events = 0;
  while (const uint32_t tag = in.ReadTag()) {
    if (!ReadResponseField(in, tag, &event, &num_events)) {
      return absl::DataLossError("a message of the stream is no PrefillResponse");
    }
  }
  if (!in.ConsumedEntireMessage())
    return absl::DataLossError("a message of the stream is cut short");
  if (num_events != 1) {
    return absl::DataLossError(
        absl::StrCat("a message of the stream holds ", num_events, " known events, not 1"));
  }
  return event;
}

}  // namespace headstart
