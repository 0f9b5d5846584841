#include "tests/engine/simulation/pretend_runner.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "engine/error.h"
#include "kernels/base/nonfinite.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {

StepResult PretendRunner::Run(Step& step) {
  StepResult results;
  for (Piece& piece : step.pieces) {
    const absl::Time start = timeline_.now();
    RequestBook& request = *model_.Find(piece.request);
    PieceResult result;
    result.status = RunLayers(piece, request);
    result.result.compute_seconds = absl::ToDoubleSeconds(timeline_.now() - start);
    result.result.first_token.id = static_cast<int32_t>(piece.request);
    // What was not used goes back before anyone hears of the end.
    piece.host.clear();
    request.in_hand = 0;
    results.push_back(std::move(result));
  }
  return results;
}

absl::Status PretendRunner::RunLayers(Piece& piece, RequestBook& request) {
  const bool fails = random_.Between(0, 999) < 10 * options_.failing_percent;
  const int64_t failing_layer = fails ? random_.Between(0, options_.num_layers - 1) : -1;
  for (int32_t layer = 0; layer < options_.num_layers; ++layer) {
    if (piece.cancelled->load()) return CancelledBefore(layer);
    timeline_.RunUntil(timeline_.now() + options_.layer_time * (1 + NumBlocks(piece.num_tokens())));
    if (layer == failing_layer) return DrawFailure(request);
    PublishLayer(piece, layer, request);
    model_.Check(timeline_.now());
  }
  return absl::OkStatus();
}

absl::Status PretendRunner::DrawFailure(RequestBook& request) {
  absl::Status status;
  switch (random_.Between(0, 4)) {
    case 0:
      status = absl::InternalError("the device is lost");
      break;
    case 1:
      status = absl::ResourceExhaustedError("out of memory");
      break;
    default:
      status = NonFiniteError("KV is not finite");
  }
  request.causes.insert(ReasonOf(status));
  return status;
}

void PretendRunner::PublishLayer(Piece& piece, int32_t layer, RequestBook& request) {
  std::vector<KvChunk> chunks;
  for (size_t i = 0; i < piece.chunks.size(); ++i) {
    HostChunk& memory = piece.host[layer * piece.chunks.size() + i];
    --request.in_hand;
    if (mutation_ == Mutation::kKeepHostChunk && kept_.empty()) {
      kept_.push_back(std::move(memory));
      continue;
    }
    chunks.push_back(
        {layer, piece.chunks[i], std::make_shared<const HostChunk>(std::move(memory))});
  }
  if (chunks.empty()) return;
  if (mutation_ == Mutation::kLeaveOutChunk) chunks.pop_back();
  if (mutation_ == Mutation::kSwapChunks) std::swap(chunks.front(), chunks.back());
  if (mutation_ == Mutation::kPublishTwice && !chunks.empty()) {
    std::vector<HostChunk> memory = host_.Take(1, piece.request);
    if (!memory.empty()) {
      chunks.push_back(
          {layer, chunks.back().tokens, std::make_shared<const HostChunk>(std::move(memory[0]))});
    }
  }
  for (KvChunk& chunk : chunks) {
    const std::weak_ptr<const HostChunk> memory = chunk.memory;
    WriteStamp(StampOf(piece.request, chunk), *chunk.memory);
    request.published.push_back(chunk.memory);
    piece.shipment->Publish(std::move(chunk));
    const std::shared_ptr<const HostChunk> alive = memory.lock();
    if (mutation_ == Mutation::kOverwriteChunk && alive != nullptr) WriteStamp(0, *alive);
  }
}

}  // namespace headstart::simulation
