#include "tests/engine/simulation/model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/schedule/rank.h"
#include "kernels/base/instant.h"

namespace headstart::simulation {

const char* InvariantName(Invariant invariant) {
  constexpr const char* kNames[] = {"kDevice",  "kHost",     "kOneEnd",   "kPieces",  "kParts",
                                    "kContent", "kShared",   "kBudget",   "kExpired", "kBusy",
                                    "kOrder",   "kProgress", "kEstimate", "kAnswers", "kGivenBack"};
  return kNames[static_cast<size_t>(invariant)];
}

void Model::Violate(Invariant invariant, std::string what) const {
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
    return request->id == id && request->live();
  });
}

int64_t Model::CountChunks(const RequestBook& request) const {
  int64_t chunks = 0;
  for (int64_t begin = 0; begin < request.num_tokens(); begin += options_.piece_tokens) {
    const int64_t count = std::min(options_.piece_tokens, request.num_tokens() - begin);
    chunks += static_cast<int64_t>(
        CutIntoChunks(begin, count, request.skip_tokens, options_.geometry.chunk_pages).size());
  }
  return chunks * options_.geometry.num_layers;
}

void Model::GiveCauseToAll(ErrorReason cause) {
  for (RequestBook* request : requests_) request->causes.insert(cause);
}

// ---- what happens

void Model::CheckEstimate(RequestBook& request, const Estimate& estimate, Instant now) const {
  int64_t requests = 0, tokens = 0;
  request.ahead.insert(request.key);
  for (const RequestBook* other : requests_) {
    if (!other->live() || other->computed) continue;
    if (StandingOf(*other, now) > StandingOf(request, now)) continue;
    request.ahead.insert(other->key);
    ++requests;
    tokens += other->num_tokens();
  }
  const int64_t found = CountFound(request, 0);
  if (estimate.requests_ahead != requests || estimate.tokens_ahead != tokens ||
      estimate.cached_tokens != found) {
    const bool same_order = estimate.requests_ahead == requests && estimate.tokens_ahead == tokens;
    Violate(same_order ? Invariant::kAnswers : Invariant::kOrder,
            absl::StrCat(request.id, ": ", estimate.requests_ahead, " requests of ",
                         estimate.tokens_ahead, " tokens ahead, ", estimate.cached_tokens,
                         " found; there are ", requests, ", ", tokens, ", ", found));
  }
}

void Model::Accepted(RequestBook* request) {
  request->outcome = *request->shipment->Open(std::nullopt, 0);
  if (request->reserves) request->reserved = CountChunks(*request);
  DescribeContents(*request);
  requests_.push_back(request);
  ++num_accepted_;
}

void Model::Asked(const Step* step, const Step* running, Instant now) {
  int64_t free = host_.free_chunks();
  if (step != nullptr) {
    CheckStep(*step, running);
    if (violation_.has_value()) return;
    for (const Piece& piece : step->pieces) {
      if (!Find(piece.request)->reserves) free += static_cast<int64_t>(piece.host.size());
    }
  }
  const std::vector<Turn> turns = ToRun(running, free, now);
  const size_t num_pieces = step == nullptr ? 0 : step->pieces.size();
  for (size_t i = 0; i < std::max(turns.size(), num_pieces); ++i) {
    const std::string turn = i < turns.size() ? turns[i].request->id : "nobody";
    const std::string runs = i < num_pieces ? Find(step->pieces[i].request)->id : "nobody";
    if (turn == runs) continue;
    Violate(step == nullptr && running == nullptr ? Invariant::kBusy : Invariant::kOrder,
            absl::StrCat(runs, " runs, it was the turn of ", turn));
    return;
  }
  if (pages_.free_pages() != own_pages_.free_pages()) {
    Violate(Invariant::kOrder, "pages were given to others than those whose turn it was");
  }
  if (step == nullptr) return;
  if (calm_) CheckNobodyForgotten(turns, step->urgent);
  for (size_t i = 0; i < turns.size(); ++i) {
    CheckPiece(turns[i], step->pieces[i]);
    Begin(turns[i], step->pieces[i]);
  }
  counts_.pieces += std::ssize(turns);
  seen_.urgent_steps += step->urgent;
  seen_.batches += turns.size() > 1;
  progress_ = now;
}

void Model::Finished(const Step& step, const StepResult& result, Instant now) {
  progress_ = now;
  ++counts_.steps;
  counts_.urgent_steps += step.urgent;
  CountOthersTime(step, absl::Seconds(result[0].result.compute_seconds));
  for (size_t i = 0; i < step.pieces.size(); ++i) {
    RequestBook* request = Find(step.pieces[i].request);
    if (request != nullptr) End(*request, result[i].status.ok(), now);
  }
}

void Model::CountOthersTime(const Step& step, absl::Duration took) {
  for (RequestBook* request : requests_) {
    if (request->computed) continue;
    int64_t rows = 0, others = 0;
    for (const Piece& piece : step.pieces) {
      rows += piece.num_tokens();
      if (!request->ahead.contains(piece.request)) others += piece.num_tokens();
    }
    // Copying what was found is not predicted.
    request->others_time += rows == 0 ? took : took * others / rows;
  }
}

void Model::End(RequestBook& request, bool ok, Instant now) {
  request.in_step = false;
  request.waits_since = now;
  const bool ended = !request.shipment->Open(std::nullopt, 0).ok();
  if (!ended && ok) {
    Publish(request);
    request.position = request.pass_end;
    request.ready = std::max(request.ready, request.pass_end);
    request.num_computed += request.pass_end - request.pass_begin;
    request.computed = request.position == request.num_tokens();
  }
  if (!ended && !request.computed) return;
  LeaveDevice(request);
  if (!request.computed) return;
  ++seen_.computed;
  seen_.computed_tokens += request.num_tokens();
  seen_.cached_tokens += request.num_found;
  counts_.prompt_tokens += request.num_tokens();
  counts_.cached_tokens += request.num_found;
  if (request.detached()) request.expiry = now + request.lease;
}

}  // namespace headstart::simulation
