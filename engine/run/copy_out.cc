#include "engine/run/copy_out.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {

absl::Status CopyOut::Take(int32_t layer, absl::Span<const OutgoingPiece> pieces,
                           const std::optional<HostCopy>& flags) {
  Taking taking{layer, flags};
  for (const OutgoingPiece& piece : pieces) {
    if (piece.result->status.ok()) HEADSTART_RETURN_IF_ERROR(TakePiece(piece, taking));
  }
  return Start(taking);
}

absl::Status CopyOut::TakePiece(const OutgoingPiece& outgoing, Taking& taking) {
  Piece& piece = *outgoing.piece;
  const uint32_t* not_finite =
      outgoing.flag < 0 ? nullptr : static_cast<const uint32_t*>(taking.flags->to) + outgoing.flag;
  const bool as_fp8 = !piece.chunks.empty() && piece.shipment->geometry().dtype == DType::kF8E4M3;
  taking.next.arrivals.push_back({&piece, outgoing.result, not_finite, {}});
  for (size_t begin = 0; begin < piece.chunks.size();) {
    Run run{begin, piece.chunks.size()};
    const std::byte* staged = nullptr;
    if (as_fp8) {
      run = StagedRun(piece.chunks, begin);
      HEADSTART_ASSIGN_OR_RETURN(staged, Stage(taking.layer, run, piece));
      if (staged == nullptr) {
        HEADSTART_RETURN_IF_ERROR(Start(taking));
        HEADSTART_RETURN_IF_ERROR(PublishOldest());
        taking.next.arrivals.push_back({&piece, outgoing.result, not_finite, {}});
        continue;
      }
      ++taking.next.staged_runs;
    }
    AddChunks(run, staged, piece, taking);
    begin = run.end;
  }
  return absl::OkStatus();
}

CopyOut::Run CopyOut::StagedRun(absl::Span<const TokenRange> chunks, size_t begin) const {
  int64_t pages = 0;
  size_t end = begin;
  while (end < chunks.size() && pages + chunks[end].num_pages() <= staging_.max_run()) {
    pages += chunks[end++].num_pages();
  }
  return {begin, end};
}

absl::StatusOr<const std::byte*> CopyOut::Stage(int32_t layer, const Run& run, const Piece& piece) {
  std::vector<KvPageTokens> pages;
  for (size_t i = run.begin; i < run.end; ++i) {
    const TokenRange& tokens = piece.chunks[i];
    for (int64_t page = tokens.first_page(); page < NumBlocks(tokens.end()); ++page) {
      const int64_t count = std::min(kBlockTokens, tokens.end() - page * kBlockTokens);
      pages.push_back({piece.pages[page], static_cast<int32_t>(count)});
    }
  }
  return staging_.Stage(kv_.Layer(layer), pages);
}

void CopyOut::AddChunks(const Run& run, const std::byte* staged, Piece& piece,
                        Taking& taking) const {
  const int64_t page_bytes = piece.shipment->geometry().page_bytes();
  const auto* pages = static_cast<const std::byte*>(kv_.Layer(taking.layer).pages);
  const size_t first_chunk = static_cast<size_t>(taking.layer) * piece.chunks.size();
  for (size_t i = run.begin; i < run.end; ++i) {
    const TokenRange tokens = piece.chunks[i];
    auto memory = std::make_shared<const HostChunk>(std::move(piece.host[first_chunk + i]));
    for (int64_t p = 0; p < tokens.num_pages(); ++p) {
      const std::byte* from = pages + piece.pages[tokens.first_page() + p] * page_bytes;
      if (staged != nullptr) from = std::exchange(staged, staged + page_bytes);
      taking.copies.push_back({from, memory->data() + p * page_bytes, page_bytes});
    }
    taking.next.arrivals.back().chunks.push_back({taking.layer, tokens, std::move(memory)});
  }
}

absl::Status CopyOut::Start(Taking& taking) {
  std::vector<HostCopy> copies = std::exchange(taking.copies, {});
  Pending next = std::exchange(taking.next, {});
  next.layer = taking.layer;
  // With every part of a layer: nothing of it is published before it is known to be finite.
  if (taking.flags.has_value()) copies.push_back(*taking.flags);
  if (copies.empty()) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(next.copy, backend_.CopyOut(copies));
  pending_.push_back(std::move(next));
  return absl::OkStatus();
}

absl::Status CopyOut::Publish(size_t most_left) {
  while (!pending_.empty() && (pending_.size() > most_left || pending_.front().copy->Ready())) {
    HEADSTART_RETURN_IF_ERROR(PublishOldest());
  }
  return absl::OkStatus();
}

absl::Status CopyOut::PublishOldest() {
  Pending done = std::move(pending_.front());
  pending_.pop_front();
  const absl::Status arrived = done.copy->Wait();
  for (int64_t i = 0; i < done.staged_runs; ++i) staging_.GiveBack();
  HEADSTART_RETURN_IF_ERROR(arrived);
  for (Arrival& arrival : done.arrivals) {
    const Piece& piece = *arrival.piece;
    absl::Status& status = arrival.result->status;
    if (status.ok() && arrival.not_finite != nullptr && *arrival.not_finite != 0) {
      status = NonFiniteError(absl::StrCat("KV of layer ", done.layer, ", tokens from ",
                                           piece.first_position, " on, is not finite"));
    }
    if (!status.ok()) continue;
    for (KvChunk& chunk : arrival.chunks) piece.shipment->Publish(std::move(chunk));
  }
  return absl::OkStatus();
}

void CopyOut::Abandon() {
  for (Pending& pending : pending_) pending.copy->Wait().IgnoreError();
  pending_.clear();
  staging_.Clear();
}

}  // namespace headstart
