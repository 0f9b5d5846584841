#include "tests/engine/simulation/pretend_runner.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/nonfinite.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {

StepResult PretendRunner::Run(Step& step, UrgentWork* urgent) {
  const Instant start = timeline_.now();
  absl::Duration inside;
  std::vector<Way> ways = Begin(step);
  for (int32_t layer = 0; layer < options_.num_layers; ++layer) {
    RunLayer(ways, layer);
    model_.Check(timeline_.now());
    if (urgent != nullptr && layer + 1 < options_.num_layers) inside += RunUrgent(urgent);
  }
  const absl::Duration took = timeline_.now() - start - inside;
  StepResult results;
  for (Way& way : ways) results.push_back(End(way, took));
  return results;
}

std::vector<PretendRunner::Way> PretendRunner::Begin(Step& step) {
  std::vector<Way> ways;
  for (Piece& piece : step.pieces) {
    Way way;
    way.piece = &piece;
    way.request = model_.Find(piece.request);
    const bool fails = random_.Between(0, 999) < options_.failing_permille;
    if (fails) way.failing_layer = random_.Between(0, options_.num_layers - 1);
    device_.Begin(piece, *way.request);
    if (mutation_ == Mutation::kOverwriteShared && piece.starts_slot && piece.first_position > 0) {
      device_.Clear(piece, *way.request, piece.first_position - kBlockTokens);
    }
    ways.push_back(std::move(way));
  }
  return ways;
}

void PretendRunner::RunLayer(std::vector<Way>& ways, int32_t layer) {
  int64_t blocks = 0;
  bool any = false;
  for (Way& way : ways) {
    if (way.status.ok() && way.piece->cancelled->load()) way.status = CancelledBefore(layer);
    if (!way.status.ok()) continue;
    blocks += NumBlocks(way.piece->num_tokens());
    any = true;
  }
  if (!any) return;
  timeline_.RunUntil(timeline_.now() + options_.layer_time * (1 + blocks));
  for (Way& way : ways) {
    if (way.status.ok() && way.failing_layer == layer) Fail(ways, way);
    if (!way.status.ok()) continue;
    device_.RunLayer(*way.piece, *way.request, layer);
    if (mutation_ == Mutation::kForgetPage && way.piece->num_tokens() > kBlockTokens) {
      device_.Forget(
          way.piece->pages[static_cast<size_t>(way.piece->first_position / kBlockTokens)]);
    }
    PublishLayer(*way.piece, layer, *way.request);
  }
}

absl::Duration PretendRunner::RunUrgent(UrgentWork* urgent) {
  const Instant start = timeline_.now();
  while (std::optional<Step> step = urgent->Next()) {
    StepResult result = Run(*step, nullptr);
    urgent->Finish(*std::move(step), std::move(result));
  }
  return timeline_.now() - start;
}

void PretendRunner::Fail(std::vector<Way>& ways, Way& failing) {
  const int64_t kind = random_.Between(0, 4);
  failing.status = kind == 0   ? absl::InternalError("the device is lost")
                   : kind == 1 ? absl::ResourceExhaustedError("out of memory")
                               : NonFiniteError("KV is not finite");
  for (Way& way : ways) {
    if (kind == 0 && way.status.ok()) way.status = failing.status;
    if (!way.status.ok()) way.request->causes.insert(ReasonOf(way.status));
  }
}

PieceResult PretendRunner::End(Way& way, absl::Duration took) {
  PieceResult result;
  result.status = way.status;
  if (mutation_ == Mutation::kSlowerThanLearned) took /= 4;
  result.result.compute_seconds = absl::ToDoubleSeconds(took);
  result.result.first_token.id = static_cast<int32_t>(way.piece->request);
  if (way.status.ok()) result.state = device_.End(*way.piece);
  if (mutation_ == Mutation::kWrongState && result.state != nullptr) {
    std::swap(result.state, last_state_);
  }
  // What was not used goes back before anyone hears of the end.
  way.piece->host.clear();
  way.request->in_hand = 0;
  return result;
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
    const auto content = [&](int64_t page) { return device_.ContentOf(piece, layer, page); };
    WriteStamp(StampOf(chunk, content), *chunk.memory);
    request.published.push_back(chunk.memory);
    piece.shipment->Publish(std::move(chunk));
    const std::shared_ptr<const HostChunk> alive = memory.lock();
    if (mutation_ == Mutation::kOverwriteChunk && alive != nullptr) WriteStamp(0, *alive);
  }
}

}  // namespace headstart::simulation
