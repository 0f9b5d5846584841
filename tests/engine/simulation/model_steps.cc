// Model: who runs, by the policy that the scheduler's header promises.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "tests/engine/simulation/model.h"

namespace headstart::simulation {

Model::Standing Model::StandingOf(const RequestBook& request, Instant now) const {
  const absl::Duration waited = (request.in_step ? request.stepped_at : now) - request.waits_since;
  const auto aged = static_cast<int64_t>(absl::FDivDuration(waited, options_.ageing) + 1e-9);
  return {-(request.priority + aged), request.latest_start, request.key};
}

std::vector<RequestBook*> Model::InOrder(Instant now) const {
  std::vector<RequestBook*> waiting;
  for (RequestBook* request : requests_) {
    if (request->waits_for_compute()) waiting.push_back(request);
  }
  std::sort(waiting.begin(), waiting.end(), [&](const RequestBook* a, const RequestBook* b) {
    return StandingOf(*a, now) < StandingOf(*b, now);
  });
  return waiting;
}

Model::Turn Model::NextTurn(const RequestBook& request, int64_t ready) const {
  const int64_t begin = request.position;
  const int64_t end = std::min(begin + options_.piece_tokens, request.num_tokens());
  return {const_cast<RequestBook*>(&request), begin, std::clamp(ready, begin, end), end};
}

std::vector<TokenRange> Model::ChunksOf(const Turn& turn) const {
  return CutIntoChunks(turn.begin, turn.end - turn.begin, turn.request->skip_tokens,
                       options_.geometry.chunk_pages);
}

bool Model::IsShort(const RequestBook& request, int64_t ready) const {
  return request.num_tokens() - ready <= options_.batch_tokens;
}

bool Model::WaitsForPage(const RequestBook& request, int64_t ready) const {
  const bool may_find = request.prefix.keeps_pages || request.num_computed == 0;
  if (!may_find || ready >= Findable(request)) return false;
  const PageHash& name = request.names[static_cast<size_t>(ready / kBlockTokens)];
  return std::any_of(requests_.begin(), requests_.end(), [&](const RequestBook* other) {
    if (!other->in_step) return false;
    const auto names = KeptNames(*other, other->pass_begin, other->pass_end);
    return std::find(names.begin(), names.end(), name) != names.end();
  });
}

bool Model::CanJoin(const RequestBook& request, int64_t ready, const Making& step) const {
  const bool waits_for_page = WaitsForPage(request, ready);
  seen_.waits_for_page += waits_for_page;
  if (waits_for_page || (step.urgent && !IsShort(request, ready))) return false;
  const int64_t rows = NextTurn(request, ready).rows();
  if (rows == 0 || (step.rows == 0 && !step.urgent)) return true;
  return step.rows + rows <= options_.batch_tokens;
}

std::vector<Model::Turn> Model::ToRun(const Step* running, int64_t free, Instant now) {
  std::optional<Standing> before;
  if (running != nullptr) {
    for (const Piece& piece : running->pieces) {
      const Standing standing = StandingOf(*Find(piece.request), now);
      before = std::min(before.value_or(standing), standing);
    }
  }
  Making step;
  step.urgent = running != nullptr;
  step.free = free;
  step.host_limit = host_.num_chunks();
  for (const RequestBook* request : requests_) {
    if (request->live() && request->reserves) step.host_limit -= CountChunks(*request);
  }
  std::vector<Turn> turns;
  for (RequestBook* request : InOrder(now)) {
    if (before.has_value() && StandingOf(*request, now) > *before) break;
    if (!IsOnDevice(*request, step, now)) continue;
    const std::optional<Turn> turn = TurnOf(*request, step, now);
    if (!turn.has_value()) continue;
    request->in_step = true;
    request->stepped_at = now;
    request->pass_begin = turn->compute_begin;
    request->pass_end = turn->end;
    turns.push_back(*turn);
  }
  return turns;
}

bool Model::IsOnDevice(RequestBook& request, Making& step, Instant now) {
  if (request.on_device()) {
    TakeFound(request, /*begins=*/false);
    return true;
  }
  const int64_t found = CountFound(request, 0);
  if (!CanJoin(request, found, step) || LacksRoom(request, found, step, now)) return false;
  if (step.device.To(IsShort(request, found)) && TakeDevice(request)) return true;
  step.device.Restrict(request, now);
  return false;
}

int64_t Model::RoomFor(const Turn& turn) const {
  if (turn.request->reserves) return 0;
  return std::ssize(ChunksOf(turn)) * options_.geometry.num_layers;
}

bool Model::LacksRoom(const RequestBook& request, int64_t ready, Making& step, Instant now) const {
  const int64_t needed = RoomFor(NextTurn(request, ready));
  if (needed == 0) return false;
  if (step.room.To(IsShort(request, ready)) && needed <= step.free) return false;
  // Whoever can't have it but from its own readers stands in nobody's way.
  if (host_.held(request.key) + needed <= step.host_limit) step.room.Restrict(request, now);
  return true;
}

std::optional<Model::Turn> Model::TurnOf(RequestBook& request, Making& step, Instant now) {
  Turn turn = NextTurn(request, request.ready);
  // Nothing to compute and nothing to ship.
  while (turn.rows() == 0 && ChunksOf(turn).empty()) {
    request.position = turn.end;
    turn = NextTurn(request, request.ready);
  }
  if (!CanJoin(request, request.ready, step)) return std::nullopt;
  if (LacksRoom(request, request.ready, step, now)) return std::nullopt;
  const int64_t needed = RoomFor(turn);
  const bool takes = needed > 0;
  seen_.overtakings += (takes && !step.room.to_all) || (!step.device.to_all && !request.started);
  if (takes) step.free -= needed;
  step.rows += turn.rows();
  return turn;
}

// ---- the scheduler's step

void Model::CheckStep(const Step& step, const Step* running) const {
  int64_t rows = 0;
  std::set<uint64_t> keys;
  for (const Piece& piece : step.pieces) {
    const RequestBook* request = Find(piece.request);
    if (request == nullptr || request->in_step || !keys.insert(piece.request).second) {
      return Violate(Invariant::kBudget, absl::StrCat(piece.request, " runs twice, or is not in"));
    }
    if (!request->waits_for_compute()) {
      return Violate(Invariant::kPieces, absl::StrCat(request->id, " does not wait for compute"));
    }
    rows += piece.num_tokens();
  }
  const bool is_single = running == nullptr && rows <= options_.piece_tokens &&
                         std::count_if(step.pieces.begin(), step.pieces.end(),
                                       [](const Piece& p) { return p.num_tokens() > 0; }) <= 1;
  if (step.pieces.empty() || (rows > options_.batch_tokens && !is_single) ||
      step.urgent != (running != nullptr)) {
    Violate(Invariant::kBudget, absl::StrCat("a step of ", step.pieces.size(), " pieces and ", rows,
                                             " tokens, at most ", options_.batch_tokens));
  }
}

void Model::CheckNobodyForgotten(const std::vector<Turn>& turns, bool urgent) const {
  constexpr int64_t kMostPriority = 2;  // that clients are drawn with
  for (const RequestBook* request : requests_) {
    if (!request->waits_for_compute() || WaitsForPage(*request, request->ready)) continue;
    if (urgent && !IsShort(*request, request->ready)) continue;
    const Instant came_much_later =
        request->waits_since + (kMostPriority - request->priority + 1) * options_.ageing;
    const bool forgotten = std::all_of(turns.begin(), turns.end(), [&](const Turn& turn) {
      return turn.request->waits_since > came_much_later;
    });
    if (forgotten) Violate(Invariant::kOrder, absl::StrCat(request->id, " is forgotten"));
  }
}

void Model::CheckPiece(const Turn& turn, const Piece& piece) const {
  const RequestBook& request = *turn.request;
  const std::vector<TokenRange> chunks = ChunksOf(turn);
  const bool same_chunks =
      std::equal(chunks.begin(), chunks.end(), piece.chunks.begin(), piece.chunks.end(),
                 [](const TokenRange& a, const TokenRange& b) {
                   return a.begin == b.begin && a.count == b.count;
                 });
  const auto ids = absl::MakeConstSpan(request.token_ids).subspan(turn.compute_begin, turn.rows());
  if (piece.first_position != turn.compute_begin || piece.token_ids != ids ||
      piece.prompt_tokens != request.num_tokens() ||
      piece.ends_prompt != (turn.end == request.num_tokens()) || !same_chunks ||
      (piece.attention != nullptr) != request.is_sparse ||
      piece.host.size() != chunks.size() * options_.geometry.num_layers) {
    Violate(Invariant::kPieces,
            absl::StrCat(request.id, ": piece at ", piece.first_position, " of ",
                         piece.num_tokens(), " tokens, ", piece.chunks.size(), " chunks, expected ",
                         turn.rows(), " at ", turn.compute_begin, ", ", chunks.size()));
  }
  if (piece.num_tokens() > 0 && piece.starts_slot != request.slot_is_stale) {
    Violate(Invariant::kPieces, absl::StrCat(request.id, ": the slot is not told what is new"));
  }
  if (absl::MakeConstSpan(request.pages.pages()) != piece.pages ||
      (request.slot >= 0 && request.slot != piece.slot)) {
    Violate(Invariant::kDevice, absl::StrCat(request.id, " is elsewhere on the device"));
  }
}

void Model::Begin(const Turn& turn, const Piece& piece) {
  RequestBook& request = *turn.request;
  request.started = true;
  request.slot = piece.slot;
  if (turn.rows() > 0) request.slot_is_stale = false;
  seen_.copies += turn.rows() == 0;
  request.in_hand = static_cast<int64_t>(piece.host.size());
  if (request.reserves) request.reserved -= request.in_hand;
}

}  // namespace headstart::simulation
