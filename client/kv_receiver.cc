#include "client/kv_receiver.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/checksum.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Bytes are summed up and copied in pieces that stay in a core's own cache between the two.
constexpr size_t kPieceBytes = 16 << 10;

absl::Status ChunkError(const KvChunkView& chunk, absl::string_view what) {
  return absl::DataLossError(absl::StrCat("chunk ", chunk.index, " (layer ", chunk.layer,
                                          ", tokens from ", chunk.token_begin, "): ", what));
}

}  // namespace

KvReceiver::KvReceiver(StreamKind kind, KvAssembly* assembly)
    : kind_(kind),
      assembly_(*assembly),
      state_(kind == StreamKind::kFetch ? State::kAwaitManifest : State::kAwaitAccepted) {}

absl::Status KvReceiver::OnMessage(grpc::ByteBuffer& message) {
  HEADSTART_ASSIGN_OR_RETURN(ResponseEvent event, DecodeResponse(message));
  return std::visit([this](auto& known) { return OnEvent(known); }, event);
}

void KvReceiver::OnResume() { state_ = State::kAwaitManifest; }

absl::Status KvReceiver::OnEvent(v1::Accepted& accepted) {
  if (state_ != State::kAwaitAccepted) return absl::DataLossError("`accepted` came out of order");
  const KvReceiverOptions& options = assembly_.options();
  const std::string& expected = options.expected.request_id;
  if (!expected.empty() && accepted.request_id() != expected) {
    return absl::DataLossError(
        absl::StrCat("accepted: request_id=", accepted.request_id(), ", expected ", expected));
  }
  if (kind_ == StreamKind::kDetached && accepted.fetch_id().size() != 16) {
    return absl::DataLossError(
        absl::StrCat("accepted: fetch_id has ", accepted.fetch_id().size(), " bytes, not 16"));
  }
  accepted_ = std::move(accepted);
  state_ = State::kAwaitManifest;
  return options.on_accepted ? options.on_accepted(accepted_) : absl::OkStatus();
}

absl::Status KvReceiver::OnEvent(v1::KvManifest& manifest) {
  if (state_ != State::kAwaitManifest) return absl::DataLossError("`manifest` came out of order");
  HEADSTART_RETURN_IF_ERROR(assembly_.OnManifest(manifest));
  next_token_.resize(assembly_.shape().num_layers, assembly_.shape().token_begin);
  state_ = State::kChunks;
  return absl::OkStatus();
}

absl::Status KvReceiver::OnEvent(KvChunkView& chunk) {
  if (state_ != State::kChunks || kind_ == StreamKind::kDetached)
    return ChunkError(chunk, "came out of order");
  HEADSTART_RETURN_IF_ERROR(CheckChunk(chunk));
  const KvRange range = RangeOf(chunk);
  if (absl::Status status = assembly_.Claim(range); !status.ok())
    return ChunkError(chunk, status.message());
  HEADSTART_RETURN_IF_ERROR(TakeData(chunk, range));
  next_token_[range.layer] = range.token_end();
  kv_bytes_ += chunk.data_bytes();
  ++num_chunks_;
  return assembly_.Commit(range);
}

KvRange KvReceiver::RangeOf(const KvChunkView& chunk) const {
  return {.layer = chunk.layer - assembly_.part().layer_begin(),
          .token_begin = chunk.token_begin,
          .token_count = chunk.token_count};
}

// Everything but the checksum; what passes can be written.
absl::Status KvReceiver::CheckChunk(const KvChunkView& chunk) const {
  const v1::KvPart& part = assembly_.part();
  if (chunk.index != num_chunks_)
    return ChunkError(chunk, absl::StrCat("expected index ", num_chunks_));
  if (chunk.layer < part.layer_begin() || chunk.layer - part.layer_begin() >= part.layer_count()) {
    return ChunkError(chunk, absl::StrCat("only ", part.layer_count(), " layers from ",
                                          part.layer_begin(), " on"));
  }
  if (chunk.kv_head_begin != part.kv_head_begin() || chunk.kv_head_count != part.kv_head_count()) {
    return ChunkError(
        chunk, absl::StrCat(chunk.kv_head_count, " heads from ", chunk.kv_head_begin, " on, not ",
                            part.kv_head_count(), " from ", part.kv_head_begin(), " on"));
  }
  const KvRange range = RangeOf(chunk);
  HEADSTART_RETURN_IF_ERROR(CheckTokens(chunk, range));
  const int64_t bytes = RangeBytes(assembly_.shape(), range);
  if (chunk.data_bytes() == bytes) return absl::OkStatus();
  return ChunkError(chunk, absl::StrCat("data has ", chunk.data_bytes(), " bytes, not ", bytes));
}

absl::Status KvReceiver::CheckTokens(const KvChunkView& chunk, const KvRange& range) const {
  const KvShape& shape = assembly_.shape();
  const int64_t begin = range.token_begin, end = range.token_end();
  const auto is_border = [&shape](int64_t token) { return token % shape.block_tokens == 0; };
  if (range.token_count == 0 || end > shape.token_end() ||
      !(is_border(begin) || begin == shape.token_begin) ||
      !(is_border(end) || end == shape.token_end())) {
    return ChunkError(chunk,
                      absl::StrCat("ends at token ", end, "; tokens ", shape.token_begin, " to ",
                                   shape.token_end(), " come, in blocks of ", shape.block_tokens));
  }
  const int64_t next = next_token_[range.layer];
  if (begin >= next) return absl::OkStatus();
  return ChunkError(chunk, absl::StrCat("goes back behind token ", next));
}

absl::Status KvReceiver::TakeData(const KvChunkView& chunk, const KvRange& range) {
  const KvDestination& destination = assembly_.destination();
  const bool drop = destination.layers.empty();
  uint32_t crc = ChunkHeaderCrc32c({chunk.index, chunk.layer, chunk.token_begin, chunk.token_count,
                                    chunk.kv_head_begin, chunk.kv_head_count});
  ChunkScatter scatter(destination, assembly_.shape(), range);
  for (absl::string_view bytes : chunk.data) {
    for (; !bytes.empty(); bytes.remove_prefix(std::min(bytes.size(), kPieceBytes))) {
      const absl::string_view piece = bytes.substr(0, kPieceBytes);
      crc = ExtendCrc32c(crc, piece);
      if (!drop) scatter.Write(piece);
    }
  }
  if (crc == chunk.crc32c) return absl::OkStatus();
  return ChunkError(chunk,
                    absl::StrFormat("crc32c is %08x, the sender's was %08x", crc, chunk.crc32c));
}

absl::Status KvReceiver::OnEvent(v1::CheckedCompletion& completion) {
  if (state_ != State::kChunks) return absl::DataLossError("`completed` came out of order");
  if (const uint32_t crc = ExtendCrc32c(0, completion.completed()); crc != completion.crc32c()) {
    return absl::DataLossError(absl::StrFormat("completed: crc32c is %08x, the sender's was %08x",
                                               crc, completion.crc32c()));
  }
  v1::Completed completed;
  if (!completed.ParseFromString(completion.completed()))
    return absl::DataLossError("completed: the bytes are no `Completed`");
  if (completed.num_chunks() != num_chunks_ ||
      completed.kv_bytes() != static_cast<uint64_t>(kv_bytes_)) {
    return absl::DataLossError(absl::StrCat("completed: ", completed.num_chunks(), " chunks, ",
                                            completed.kv_bytes(), " bytes; received ", num_chunks_,
                                            " and ", kv_bytes_));
  }
  HEADSTART_RETURN_IF_ERROR(assembly_.OnCompleted(std::move(completed)));
  state_ = State::kCompleted;
  return absl::OkStatus();
}

absl::Status KvReceiver::OnEnd() const {
  if (completed()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the stream ended without `completed`, after ", num_chunks_, " chunks"));
}

}  // namespace headstart
