#include "engine/run/copy_out.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {

absl::StatusOr<std::unique_ptr<CopyOut>> CopyOut::Create(const KvGeometry& geometry,
                                                         int32_t num_slots, const KvCache& kv,
                                                         Backend& backend) {
  const int64_t bytes = int64_t{num_slots} * geometry.num_layers * int64_t{sizeof(uint32_t)};
  HEADSTART_ASSIGN_OR_RETURN(HostBuffer flags, backend.AllocateHost(bytes));
  return std::unique_ptr<CopyOut>(new CopyOut(geometry, kv, backend, std::move(flags)));
}

absl::Status CopyOut::Take(int32_t layer, Piece& piece, size_t index, const RequestSlot& slot) {
  if (piece.chunks.empty()) return absl::OkStatus();
  const int64_t page_bytes = geometry_.page_bytes();
  const auto* pages = static_cast<const std::byte*>(kv_.Layer(layer).pages);
  Pending next{nullptr, index, piece.first_position, piece.shipment, {}, nullptr};
  std::vector<HostCopy> copies;
  const size_t first_chunk = static_cast<size_t>(layer) * piece.chunks.size();
  for (size_t i = 0; i < piece.chunks.size(); ++i) {
    const TokenRange tokens = piece.chunks[i];
    auto memory = std::make_shared<const HostChunk>(std::move(piece.host[first_chunk + i]));
    const int64_t first_page = tokens.begin / kBlockTokens;
    for (int64_t page = first_page; page < NumBlocks(tokens.begin + tokens.count); ++page) {
      copies.push_back({pages + piece.pages[page] * page_bytes,
                        memory->data() + (page - first_page) * page_bytes, page_bytes});
    }
    next.chunks.push_back({layer, tokens, std::move(memory)});
  }
  auto* flag = reinterpret_cast<uint32_t*>(flags_.get()) +
               int64_t{piece.slot} * geometry_.num_layers + layer;
  copies.push_back({slot.not_finite(layer), flag, sizeof(uint32_t)});
  next.not_finite = flag;
  HEADSTART_ASSIGN_OR_RETURN(next.copy, backend_.CopyOut(copies));
  pending_.push_back(std::move(next));
  return absl::OkStatus();
}

absl::Status CopyOut::Publish(size_t most_left, StepResult& results) {
  while (!pending_.empty() && (pending_.size() > most_left || pending_.front().copy->Ready())) {
    Pending done = std::move(pending_.front());
    pending_.pop_front();
    HEADSTART_RETURN_IF_ERROR(done.copy->Wait());
    absl::Status& status = results[done.index].status;
    if (status.ok() && *done.not_finite != 0) {
      status = NonFiniteError(absl::StrCat("KV of layer ", done.chunks[0].layer, ", tokens from ",
                                           done.first_position, " on, is not finite"));
    }
    if (!status.ok()) continue;
    for (KvChunk& chunk : done.chunks) done.shipment->Publish(std::move(chunk));
  }
  return absl::OkStatus();
}

void CopyOut::Abandon() {
  for (Pending& pending : pending_) pending.copy->Wait().IgnoreError();
  pending_.clear();
}

}  // namespace headstart
