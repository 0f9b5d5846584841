#include "client/kv_receiver.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/checksum.h"
#include "client/manifest_check.h"

namespace headstart {
namespace {

absl::Status ChunkError(const KvChunkView& chunk, absl::string_view what) {
  return absl::DataLossError(absl::StrCat("chunk ", chunk.index, " (layer ", chunk.layer,
                                          ", tokens from ", chunk.token_begin, "): ", what));
}

KvRange RangeOf(const KvChunkView& chunk) {
  return {.layer = chunk.layer,
          .head_begin = chunk.kv_head_begin,
          .head_count = chunk.kv_head_count,
          .token_begin = chunk.token_begin,
          .token_count = chunk.token_count};
}

}  // namespace

int64_t KvDtypeBytes(v1::KvDtype dtype) {
  switch (dtype) {
    case v1::KV_DTYPE_BF16:
    case v1::KV_DTYPE_F16:
      return 2;
    case v1::KV_DTYPE_F32:
      return 4;
    default:
      return 0;
  }
}

KvReceiver::KvReceiver(KvReceiverOptions options) : options_(std::move(options)) {}

absl::Status KvReceiver::OnMessage(grpc::ByteBuffer& message) {
  absl::StatusOr<ResponseEvent> event = DecodeResponse(message);
  if (!event.ok()) return event.status();
  return std::visit([this](auto& known) { return OnEvent(known); }, *event);
}

absl::Status KvReceiver::OnEvent(v1::Accepted& accepted) {
  if (state_ != State::kAwaitAccepted) return absl::DataLossError("`accepted` came twice");
  const std::string& expected = options_.expected.request_id;
  if (!expected.empty() && accepted.request_id() != expected) {
    return absl::DataLossError(
        absl::StrCat("accepted: request_id=", accepted.request_id(), ", expected ", expected));
  }
  accepted_ = std::move(accepted);
  state_ = State::kAwaitManifest;
  return options_.on_accepted ? options_.on_accepted(accepted_) : absl::OkStatus();
}

absl::Status KvReceiver::OnEvent(v1::KvManifest& manifest) {
  if (state_ != State::kAwaitManifest) return absl::DataLossError("`manifest` came out of order");
  absl::StatusOr<KvShape> shape = CheckedShape(manifest, options_.max_kv_bytes);
  if (!shape.ok()) return shape.status();
  if (absl::Status status = CheckExpectation(manifest, options_.expected); !status.ok())
    return status;
  shape_ = *shape;
  manifest_ = std::move(manifest);
  if (options_.on_manifest) {
    absl::StatusOr<KvDestination> destination = options_.on_manifest(manifest_, shape_);
    if (!destination.ok()) return destination.status();
    destination_ = *std::move(destination);
    if (absl::Status status = CheckDestination(destination_, shape_); !status.ok()) return status;
  }
  next_token_.assign(shape_.num_layers * shape_.num_kv_heads, 0);
  layer_bytes_.assign(shape_.num_layers, 0);
  state_ = State::kChunks;
  return absl::OkStatus();
}

absl::Status KvReceiver::OnEvent(KvChunkView& chunk) {
  if (state_ != State::kChunks) return ChunkError(chunk, "came out of order");
  if (absl::Status status = CheckChunk(chunk); !status.ok()) return status;
  if (absl::Status status = TakeData(chunk); !status.ok()) return status;
  return Advance(chunk);
}

// Everything but the checksum; what passes can be written.
absl::Status KvReceiver::CheckChunk(const KvChunkView& chunk) const {
  if (chunk.index != num_chunks_)
    return ChunkError(chunk, absl::StrCat("expected index ", num_chunks_));
  if (chunk.layer >= shape_.num_layers)
    return ChunkError(chunk, absl::StrCat("only ", shape_.num_layers, " layers"));
  const KvRange range = RangeOf(chunk);
  const int64_t token_end = range.token_begin + range.token_count;
  const int64_t head_end = range.head_begin + range.head_count;
  if (range.head_count == 0 || head_end > shape_.num_kv_heads) {
    return ChunkError(chunk, absl::StrCat("heads [", range.head_begin, ", ", head_end, ") of ",
                                          shape_.num_kv_heads));
  }
  const int64_t block = manifest_.layout().block_tokens();
  const bool ends_block = token_end % block == 0 || token_end == shape_.num_tokens;
  if (range.token_count == 0 || token_end > shape_.num_tokens || range.token_begin % block != 0 ||
      !ends_block) {
    return ChunkError(chunk, absl::StrCat("ends at token ", token_end, " of ", shape_.num_tokens,
                                          ", not in blocks of ", block));
  }
  const uint32_t* next = next_token_.data() + range.layer * shape_.num_kv_heads;
  for (int64_t h = range.head_begin; h < head_end; ++h) {
    if (next[h] != chunk.token_begin)
      return ChunkError(chunk, absl::StrCat("head ", h, " goes on at token ", next[h]));
  }
  const int64_t bytes = 2 * range.head_count * range.token_count * shape_.row_bytes();
  if (chunk.data_bytes() != bytes) {
    return ChunkError(chunk, absl::StrCat("data has ", chunk.data_bytes(), " bytes, not ", bytes));
  }
  return absl::OkStatus();
}

// Copies and sums up piece by piece, while a piece is in the cache.
absl::Status KvReceiver::TakeData(const KvChunkView& chunk) {
  uint32_t crc = ChunkHeaderCrc32c({chunk.index, chunk.layer, chunk.token_begin, chunk.token_count,
                                    chunk.kv_head_begin, chunk.kv_head_count});
  ChunkScatter scatter(destination_, shape_, RangeOf(chunk));
  for (const absl::string_view piece : chunk.data) {
    crc = ExtendCrc32c(crc, piece);
    if (!destination_.layers.empty()) scatter.Write(piece);
  }
  if (crc == chunk.crc32c) return absl::OkStatus();
  return ChunkError(chunk,
                    absl::StrFormat("crc32c is %08x, the sender's was %08x", crc, chunk.crc32c));
}

absl::Status KvReceiver::Advance(const KvChunkView& chunk) {
  const KvRange range = RangeOf(chunk);
  uint32_t* next = next_token_.data() + range.layer * shape_.num_kv_heads;
  std::fill_n(next + range.head_begin, range.head_count, chunk.token_begin + chunk.token_count);
  const int64_t bytes = chunk.data_bytes();
  layer_bytes_[range.layer] += bytes;
  kv_bytes_ += bytes;
  ++num_chunks_;
  if (options_.on_progress) options_.on_progress(kv_bytes_, shape_.total_bytes());
  const bool layer_complete = layer_bytes_[range.layer] == 2 * shape_.plane_bytes();
  return layer_complete && options_.on_layer ? options_.on_layer(range.layer) : absl::OkStatus();
}

absl::Status KvReceiver::OnEvent(v1::Completed& completed) {
  if (state_ != State::kChunks) return absl::DataLossError("`completed` came out of order");
  if (kv_bytes_ != shape_.total_bytes()) {
    return absl::DataLossError(
        absl::StrCat("completed after ", kv_bytes_, " of ", shape_.total_bytes(), " KV bytes"));
  }
  if (completed.num_chunks() != num_chunks_ ||
      completed.kv_bytes() != static_cast<uint64_t>(kv_bytes_)) {
    return absl::DataLossError(absl::StrCat("completed: ", completed.num_chunks(), " chunks, ",
                                            completed.kv_bytes(), " bytes; received ", num_chunks_,
                                            " and ", kv_bytes_));
  }
  if (!completed.has_first_token()) return absl::DataLossError("completed: no first_token");
  if (absl::Status status = CheckFinalManifest(manifest_, completed.manifest()); !status.ok())
    return status;
  if (const uint32_t crc = ExpectedCrc32c(completed); crc != completed.crc32c()) {
    return absl::DataLossError(absl::StrFormat("completed: crc32c is %08x, the sender's was %08x",
                                               crc, completed.crc32c()));
  }
  manifest_ = completed.manifest();
  completed_ = std::move(completed);
  state_ = State::kCompleted;
  return absl::OkStatus();
}

absl::Status KvReceiver::OnEnd() const {
  if (state_ == State::kCompleted) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the stream ended without `completed`, after ", num_chunks_, " chunks"));
}

}  // namespace headstart
