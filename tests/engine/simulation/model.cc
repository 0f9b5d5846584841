#include "tests/engine/simulation/model.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

namespace headstart::simulation {
const char* InvariantName(Invariant invariant) {
  constexpr const char* kNames[] = {"kDevice",   "kHost",    "kOneEnd",   "kPieces",
                                    "kParts",    "kExpired", "kBusy",     "kOrder",
                                    "kProgress", "kAnswers", "kGivenBack"};
  return kNames[static_cast<size_t>(invariant)];
}

void Model::Violate(Invariant invariant, std::string what) {
  if (!violation_.has_value()) violation_ = Violation{invariant, std::move(what)};
}

RequestBook* Model::Find(uint64_t key) const {
  for (RequestBook* request : requests_) {
    if (request->key == key) return request;
  }
  return nullptr;
}

bool Model::InFlight(const std::string& id) const {
  return std::any_of(requests_.begin(), requests_.end(), [&](const RequestBook* request) {
    return request->id == id && (request->live() || request->in_step);
  });
}

int64_t Model::CountChunks(const RequestBook& request, int64_t begin, int64_t end) const {
  int64_t chunks = 0;
  for (int64_t first = begin; first < end; first += options_.piece_tokens) {
    const int64_t count = std::min(options_.piece_tokens, end - first);
    chunks += static_cast<int64_t>(
        CutIntoChunks(first, count, request.skip_tokens, options_.geometry.chunk_pages).size());
  }
  return chunks * options_.geometry.num_layers;
}

int64_t Model::NextChunks(const RequestBook& request) const {
  const int64_t begin = request.next_position;
  return CountChunks(request, begin, std::min(begin + options_.piece_tokens, request.num_tokens));
}

void Model::GiveCauseToAll(ErrorReason cause) {
  for (RequestBook* request : requests_) request->causes.insert(cause);
}

// ---- what happens

void Model::Accepted(RequestBook* request) {
  request->outcome = *request->shipment->Open(std::nullopt, 0);
  if (request->reserves) request->reserved = CountChunks(*request, 0, request->num_tokens);
  requests_.push_back(request);
  ++num_accepted_;
}

void Model::AcceptedTooLate(RequestBook* request) {
  RequestBook* last = requests_.empty() ? nullptr : requests_.back();
  Accepted(request);
  // Two that differ in nothing else.
  if (last != nullptr && last->waits_for_compute() && last->next_position == 0 &&
      last->reserves == request->reserves && NextChunks(*last) == NextChunks(*request) &&
      NumBlocks(last->num_tokens) == NumBlocks(request->num_tokens)) {
    std::swap(requests_.back(), requests_[requests_.size() - 2]);
  }
}

void Model::Stepped(const Step& step, absl::Time now) {
  if (step.pieces.size() != 1) return Violate(Invariant::kPieces, "not one piece in a step");
  const Piece& piece = step.pieces[0];
  RequestBook* request = Find(piece.request);
  if (request == nullptr || !request->waits_for_compute()) {
    return Violate(Invariant::kPieces, "a step of a request that does not wait for compute");
  }
  const auto num_chunks = static_cast<int64_t>(piece.host.size());
  const int64_t free = host_.free_chunks() + (request->reserves ? 0 : num_chunks);
  const RequestBook* next = NextToRun(free);
  CheckPiece(*request, piece);
  if (next != request) {
    Violate(Invariant::kOrder, absl::StrCat(request->id, " runs, it was the turn of ",
                                            next == nullptr ? "nobody" : next->id));
  }
  request->slot = piece.slot;
  request->pages.assign(piece.pages.begin(), piece.pages.end());
  request->in_step = true;
  request->in_hand = num_chunks;
  if (request->reserves) request->reserved -= num_chunks;
  progress_ = now;
}

void Model::CheckPiece(const RequestBook& request, const Piece& piece) {
  const int64_t begin = request.next_position;
  const int64_t count = std::min(options_.piece_tokens, request.num_tokens - begin);
  const std::vector<TokenRange> chunks =
      CutIntoChunks(begin, count, request.skip_tokens, options_.geometry.chunk_pages);
  const bool same_chunks =
      std::equal(chunks.begin(), chunks.end(), piece.chunks.begin(), piece.chunks.end(),
                 [](const TokenRange& a, const TokenRange& b) {
                   return a.begin == b.begin && a.count == b.count;
                 });
  if (piece.first_position != begin || piece.num_tokens() != count ||
      piece.prompt_tokens != request.num_tokens ||
      piece.ends_prompt != (begin + count == request.num_tokens) || !same_chunks ||
      piece.host.size() != chunks.size() * options_.geometry.num_layers) {
    Violate(Invariant::kPieces,
            absl::StrCat(request.id, ": piece at ", piece.first_position, " of ",
                         piece.num_tokens(), " tokens, expected ", count, " at ", begin));
  }
  if (request.slot >= 0 &&
      (request.slot != piece.slot || !std::equal(request.pages.begin(), request.pages.end(),
                                                 piece.pages.begin(), piece.pages.end()))) {
    Violate(Invariant::kDevice, absl::StrCat(request.id, " is elsewhere on the device now"));
  }
}

void Model::Finished(const Step& step, const StepResult& result, absl::Time now) {
  RequestBook* request = Find(step.pieces[0].request);
  if (request == nullptr) return;
  request->in_step = false;
  progress_ = now;
  const bool ended = !request->shipment->Open(std::nullopt, 0).ok();
  if (!ended && result[0].status.ok()) {
    request->next_position += step.pieces[0].num_tokens();
    request->computed = request->next_position == request->num_tokens;
    seen_.computed += request->computed;
  }
  if (!ended && !request->computed) return;
  LeaveDevice(*request);
  if (request->computed && request->detached()) request->expiry = now + request->lease;
}

void Model::LeaveDevice(RequestBook& request) {
  request.on_device = false;
  request.slot = -1;
  request.pages.clear();
}

const RequestBook* Model::NextToRun(int64_t free) {
  int64_t slots = options_.num_slots, pages = pages_.num_pages(), room = host_.num_chunks();
  for (const RequestBook* request : requests_) {
    if (request->on_device) --slots, pages -= NumBlocks(request->num_tokens);
    if (request->live() && request->reserves) {
      room -= CountChunks(*request, 0, request->num_tokens);
    }
  }
  bool may_start = true, may_take_room = true;
  for (RequestBook* request : requests_) {
    if (!request->waits_for_compute()) continue;
    if (!request->on_device) {
      const int64_t blocks = NumBlocks(request->num_tokens);
      may_start = may_start && slots > 0 && blocks <= pages;
      if (!may_start) continue;
      request->on_device = true;
      --slots;
      pages -= blocks;
    }
    const int64_t needed = NextChunks(*request);
    if (request->reserves || needed == 0) return request;
    if (may_take_room && needed <= free) return request;
    if (host_.held(request->key) + needed <= room) may_take_room = false;
  }
  return nullptr;
}

}  // namespace headstart::simulation
