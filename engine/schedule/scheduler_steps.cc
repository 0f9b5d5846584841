// Scheduler: what runs.
#include <algorithm>
#include <utility>

#include "engine/schedule/scheduler.h"
#include "kernels/base/check.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

std::vector<PieceShape> ShapesOf(const Step& step) {
  std::vector<PieceShape> shapes;
  for (const Piece& piece : step.pieces) {
    if (piece.num_tokens() == 0) continue;
    shapes.push_back({piece.num_tokens(), piece.first_position, piece.attention});
  }
  return shapes;
}

absl::Duration TimeOf(const StepResult& result) {
  double seconds = 0;
  for (const PieceResult& piece : result) {
    seconds = std::max(seconds, piece.result.compute_seconds);
  }
  return absl::Seconds(seconds);
}

}  // namespace

// ---- order

Rank Scheduler::RankOf(const Entry& entry, Instant now) const {
  const Instant until = entry.in_step ? entry.stepped_at : now;
  return {LevelAt(entry.request.priority, entry.waits_since, options_.ageing, until),
          entry.latest_start, entry.key};
}

std::vector<std::pair<Rank, Scheduler::Entry*>> Scheduler::Waiting(Instant now) const {
  std::vector<std::pair<Rank, Entry*>> waiting;
  for (const auto& [key, entry] : entries_) {
    if (entry->waits_for_compute()) waiting.emplace_back(RankOf(*entry, now), entry.get());
  }
  std::sort(waiting.begin(), waiting.end(),
            [](const auto& a, const auto& b) { return a.first.Before(b.first); });
  return waiting;
}

// ---- a step

std::optional<Step> Scheduler::Next(Instant now) {
  HEADSTART_CHECK(!step_.runs);
  std::optional<Step> step = MakeStep(std::nullopt, now);
  if (!step.has_value()) return step;
  step_ = Begin(*step, now);
  return step;
}

std::optional<Step> Scheduler::NextUrgent(const Step& running, Instant now) {
  std::optional<Rank> first;
  for (const Piece& piece : running.pieces) {
    const Rank rank = RankOf(*entries_.at(piece.request), now);
    if (!first.has_value() || rank.Before(*first)) first = rank;
  }
  std::optional<Step> step = MakeStep(first, now);
  if (!step.has_value()) return step;
  step->urgent = true;
  urgent_step_ = Begin(*step, now);
  return step;
}

Scheduler::RunningStep Scheduler::Begin(const Step& step, Instant now) const {
  return {true, now, costs_.Predict(ShapesOf(step)).value_or(absl::ZeroDuration())};
}

std::optional<Step> Scheduler::MakeStep(const std::optional<Rank>& before, Instant now) {
  const bool urgent = before.has_value();
  Step step;
  int64_t num_tokens = 0;
  auto start = Overtaking::kAnybody, room = Overtaking::kAnybody;
  const auto allows = [](Overtaking who, bool is_short) {
    return who == Overtaking::kAnybody || (who == Overtaking::kShort && is_short);
  };
  for (const auto& [rank, waiting] : Waiting(now)) {
    Entry* const entry = waiting;
    if (urgent && !rank.Before(*before)) break;
    const auto fits = [&](int64_t ready) {
      const int64_t rows = NextPass(*entry, ready).num_computed();
      if (WillBeFound(*entry, ready) || (urgent && !IsShort(*entry, ready))) return false;
      return rows == 0 || num_tokens + rows <= options_.batch_tokens ||
             (!urgent && num_tokens == 0);
    };
    const auto others = now < entry->latest_start ? Overtaking::kShort : Overtaking::kNobody;
    const auto lacks_room = [&](int64_t ready) {
      const int64_t needed = RoomFor(*entry, NextPass(*entry, ready));
      if (needed == 0 || !entry->reserved.empty()) return false;
      if (allows(room, IsShort(*entry, ready)) && needed <= host_.free_chunks()) return false;
      WaitForRoom(*entry, now);
      // Else it waits for its own readers.
      const int64_t possible = host_.num_chunks() - reserved_chunks_ - host_.held(entry->key);
      if (needed <= possible) room = std::max(room, others);
      return true;
    };
    if (entry->slot >= 0) {
      prefixes_.Extend(*entry, /*begins=*/false);
    } else {
      LookForPrefix(*entry);
      // Whoever can't run takes no pages: they would be lost for the prefix cache.
      if (!fits(entry->hint) || lacks_room(entry->hint)) continue;
      if (!allows(start, IsShort(*entry, entry->hint)) || !GiveDevice(*entry)) {
        start = std::max(start, others);
        EndRoomWait(*entry, now);
        continue;
      }
    }
    SkipEmptyPasses(*entry);
    if (!fits(entry->ready) || lacks_room(entry->ready)) continue;
    const Pass pass = NextPass(*entry, entry->ready);
    num_tokens += pass.num_computed();
    step.pieces.push_back(MakePiece(*entry, pass, now));
  }
  if (step.pieces.empty()) return std::nullopt;
  return step;
}

void Scheduler::LookForPrefix(Entry& entry) {
  // What was there stays there until something is evicted.
  const int64_t evicted = pages_.evicted();
  if (evicted != std::exchange(entry.hint_evicted, evicted)) entry.hint = 0;
  entry.hint = prefixes_.Count(entry.request, entry.hint);
}

bool Scheduler::GiveDevice(Entry& entry) {
  if (free_slots_.empty()) return false;
  prefixes_.Extend(entry, /*begins=*/true);
  const int64_t missing = NumBlocks(entry.num_tokens()) - entry.pages.size();
  absl::StatusOr<PageRefs> pages = pages_.Take(missing);
  if (!pages.ok()) {
    entry.pages = PageRefs();
    entry.ready = 0;
    entry.result.cached_tokens = 0;
    entry.state = nullptr;
    return false;
  }
  entry.pages.Append(*std::move(pages));
  entry.slot = free_slots_.back();
  free_slots_.pop_back();
  return true;
}

Scheduler::Pass Scheduler::NextPass(const Entry& entry, int64_t ready) const {
  const int64_t end = std::min(entry.position + options_.piece_tokens, entry.num_tokens());
  return {entry.position, std::clamp(ready, entry.position, end), end};
}

void Scheduler::SkipEmptyPasses(Entry& entry) {
  Pass pass = NextPass(entry, entry.ready);
  while (pass.num_computed() == 0 && ChunksOf(entry, pass).empty()) {
    entry.position = pass.end;
    pass = NextPass(entry, entry.ready);
  }
}

bool Scheduler::IsShort(const Entry& entry, int64_t ready) const {
  return entry.num_tokens() - ready <= options_.batch_tokens;
}

bool Scheduler::WillBeFound(const Entry& entry, int64_t ready) const {
  const PageHash* name = prefixes_.NextName(entry.request, entry.num_computed, ready);
  return name != nullptr && in_computation_.contains(*name);
}

std::vector<TokenRange> Scheduler::ChunksOf(const Entry& entry, const Pass& pass) const {
  return CutIntoChunks(pass.begin, pass.end - pass.begin, entry.request.skip_tokens,
                       options_.geometry.chunk_pages);
}

int64_t Scheduler::RoomFor(const Entry& entry, const Pass& pass) const {
  return static_cast<int64_t>(ChunksOf(entry, pass).size()) * options_.geometry.num_layers;
}

void Scheduler::WaitForRoom(Entry& entry, Instant now) {
  if (entry.waits_for_room_since.has_value()) return;
  entry.waits_for_room_since = now;
  ++load_.waiting_for_room;
}

void Scheduler::EndRoomWait(Entry& entry, Instant now) {
  if (!entry.waits_for_room_since.has_value()) return;
  if (!entry.queued) {
    entry.result.room_wait_seconds += absl::ToDoubleSeconds(now - *entry.waits_for_room_since);
  }
  entry.waits_for_room_since.reset();
  --load_.waiting_for_room;
}

std::vector<HostChunk> Scheduler::TakeRoom(Entry& entry, int64_t count) {
  if (entry.reserved.empty()) return host_.Take(count, entry.key);
  std::vector<HostChunk> room;
  for (int64_t i = 0; i < count; ++i) {
    room.push_back(std::move(entry.reserved.back()));
    entry.reserved.pop_back();
  }
  return room;
}

// What the pass does, for those who look at it later.
void Scheduler::NotePass(const Pass& pass, Instant now, std::vector<PieceRun>& runs) {
  if (pass.compute_begin > pass.begin) {
    runs.push_back({pass.begin, pass.compute_begin - pass.begin, /*from_cache=*/true, now});
  }
  if (pass.num_computed() > 0) {
    runs.push_back({pass.compute_begin, pass.num_computed(), /*from_cache=*/false, now});
  }
}

Piece Scheduler::MakePiece(Entry& entry, const Pass& pass, Instant now) {
  EndRoomWait(entry, now);
  if (std::exchange(entry.queued, false)) {
    --load_.queued_requests;
    load_.queued_tokens -= entry.num_tokens();
    entry.result.started_at = now;
    entry.shipment->Start();
  }
  entry.in_step = true;
  entry.stepped_at = now;
  Piece piece;
  piece.request = entry.key;
  piece.slot = entry.slot;
  piece.token_ids =
      absl::MakeConstSpan(entry.request.token_ids).subspan(pass.compute_begin, pass.num_computed());
  piece.first_position = pass.compute_begin;
  piece.prompt_tokens = entry.num_tokens();
  piece.ends_prompt = pass.end == piece.prompt_tokens;
  piece.pages = entry.pages.pages();
  if (pass.num_computed() > 0) {
    piece.starts_slot = std::exchange(entry.slot_is_stale, false);
    piece.state = entry.state;
  }
  piece.attention = entry.request.attention.enabled ? &entry.request.attention : nullptr;
  const absl::Span<const PageHash> names =
      prefixes_.KeptNames(entry.request, pass.compute_begin, pass.end);
  in_computation_.insert(names.begin(), names.end());
  piece.keep_state = !names.empty() && !entry.request.prefix.any_page;
  piece.sampling = &entry.request.sampling;
  piece.chunks = ChunksOf(entry, pass);
  piece.host = TakeRoom(entry, std::ssize(piece.chunks) * options_.geometry.num_layers);
  piece.shipment = entry.shipment;
  piece.cancelled = &entry.cancelled;
  NotePass(pass, now, entry.result.pieces);
  ++load_.pieces;
  return piece;
}

// ---- its end

void Scheduler::Finish(const Step& step, StepResult result, Instant now) {
  HEADSTART_CHECK(result.size() == step.pieces.size());
  LearnFrom(step, result, now);
  ++load_.steps;
  if (step.urgent) {
    ++load_.urgent_steps;
    step_.began += TimeOf(result);
    urgent_step_ = {};
  } else {
    step_ = {};
  }
  for (size_t i = 0; i < result.size(); ++i) {
    const Piece& piece = step.pieces[i];
    const auto found = entries_.find(piece.request);
    HEADSTART_CHECK(found != entries_.end() && found->second->in_step);
    Entry& entry = *found->second;
    entry.in_step = false;
    entry.held_since = entry.waits_since = now;
    const Pass pass = NextPass(entry, entry.ready);
    for (const PageHash& name : prefixes_.KeptNames(entry.request, pass.compute_begin, pass.end)) {
      in_computation_.erase(name);
    }
    if (entry.ended) {
      Remove(found);
    } else if (!result[i].status.ok()) {
      End(found->first, result[i].status);
    } else {
      Advance(entry, pass, piece, result[i], now);
    }
  }
}

void Scheduler::LearnFrom(const Step& step, const StepResult& result, Instant now) {
  const std::vector<PieceShape> shapes = ShapesOf(step);
  for (const PieceResult& piece : result) {
    if (!piece.status.ok()) return;
  }
  if (shapes.empty()) return;
  costs_.Learn(shapes, TimeOf(result));
  learned_at_ = now;
}

void Scheduler::Advance(Entry& entry, const Pass& pass, const Piece& piece, PieceResult& result,
                        Instant now) {
  prefixes_.Publish(entry, pass.compute_begin, pass.end, result.state);
  entry.position = pass.end;
  entry.ready = std::max(entry.ready, pass.end);
  entry.num_computed += pass.num_computed();
  PrefillResult& sum = entry.result;
  sum.selection_seconds += result.result.selection_seconds;
  sum.attention_seconds += result.result.attention_seconds;
  sum.compute_seconds += result.result.compute_seconds;
  for (PieceRun& run : sum.pieces) {
    if (run.end < run.begin) run.end = now;
  }
  if (piece.ends_prompt) Complete(entry, std::move(result.result), now);
}

void Scheduler::Complete(Entry& entry, PrefillResult last, Instant now) {
  PrefillResult& sum = entry.result;
  sum.first_token = last.first_token;
  sum.layer_density = std::move(last.layer_density);
  sum.layer_executed_blocks = std::move(last.layer_executed_blocks);
  sum.layer_causal_blocks = std::move(last.layer_causal_blocks);
  sum.layer_predicted_blocks = std::move(last.layer_predicted_blocks);
  sum.layer_head_budget = std::move(last.layer_head_budget);
  sum.executed_blocks = last.executed_blocks;
  sum.causal_blocks = last.causal_blocks;
  sum.dense_fallbacks = last.dense_fallbacks;
  sum.computed_at = now;
  sum.page_hashes = prefixes_.TrueNames(entry);
  sum.gave_way_seconds =
      absl::ToDoubleSeconds(now - sum.started_at) - sum.compute_seconds - sum.room_wait_seconds;
  LearnFrom(entry);
  load_.prompt_tokens += entry.num_tokens();
  load_.cached_tokens += sum.cached_tokens;
  entry.computed = true;
  FreeDevice(entry);
  entry.shipment->Complete(std::move(sum));
  if (!entry.detached()) return;
  entry.expiry = now + entry.lease;
  ++load_.leases;
  load_.lease_tokens += entry.num_tokens();
}

void Scheduler::LearnFrom(const Entry& entry) {
  const PrefillResult& result = entry.result;
  if (entry.request.attention.enabled && result.causal_blocks > 0) {
    costs_.LearnDensity(
        entry.request.attention, entry.num_tokens(),
        static_cast<double>(result.executed_blocks) / static_cast<double>(result.causal_blocks));
  }
  if (result.predicted_ttft.has_value() && result.room_wait_seconds == 0) {
    const absl::Duration actual = result.computed_at - result.accepted_at;
    costs_.LearnError(*result.predicted_ttft, actual);
    interruptions_.Learn(entry.num_tokens() - result.cached_tokens, *entry.foreseen, actual);
  }
}

}  // namespace headstart
