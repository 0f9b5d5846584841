#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "tests/engine/simulation/client.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {

Fetcher::Fetcher(SimulatedEngine* engine, RequestBook* book, const ReaderPlan& plan, bool needed,
                 std::function<void()> done)
    : engine_(*engine), book_(*book), plan_(plan), needed_(needed), done_(std::move(done)) {
  const SchedulerOptions& options = engine_.options().scheduler;
  const KvGeometry& geometry = options.geometry;
  const int64_t head_bytes = geometry.token_bytes() / geometry.heads.num_kv_heads;
  int64_t in_layers = 0;
  for (int64_t begin = 0; begin < book_.num_tokens(); begin += options.piece_tokens) {
    const int64_t count = std::min(options.piece_tokens, book_.num_tokens() - begin);
    for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
      if (!plan_.part.HasLayer(layer)) continue;
      for (const TokenRange& tokens :
           CutIntoChunks(begin, count, book_.skip_tokens, geometry.chunk_pages)) {
        if (in_layers++ % plan_.part.stripe_count != plan_.part.stripe_index) continue;
        expected_.emplace_back(layer, tokens);
        kv_bytes_ += tokens.count * plan_.part.head_count * head_bytes;
      }
    }
  }
}

// ---- streams

void Fetcher::GoAway() {
  if (needed_ && !std::exchange(away_, true)) ++book_.readers_away;
}

void Fetcher::ComeBack() {
  if (!std::exchange(away_, false)) return;
  --book_.readers_away;
  book_.reader_back = engine_.timeline().now();
}

void Fetcher::ComeLater() {
  GoAway();
  if (plan_.start.has_value()) engine_.timeline().After(*plan_.start, [this] { Fetch(); });
}

void Fetcher::Fetch() {
  if (num_streams_ > 0) ++engine_.model().seen().resumed_streams;
  auto reader = engine_.Fetch(book_, "owner", plan_.part, received_);
  engine_.Tell(book_.id, ": fetch from chunk ", received_, ": ", Words(reader.status()));
  if (reader.ok()) return Follow(*std::move(reader));
  if (ReasonOf(reader.status()) != ErrorReason::kUnknownFetchId ||
      book_.shipment->Open(std::nullopt, 0).ok()) {
    engine_.model().Violate(Invariant::kAnswers, absl::StrCat(book_.id, ": fetch was answered ",
                                                              Words(reader.status())));
  }
}

void Fetcher::Follow(std::unique_ptr<ShipmentReader> reader) {
  ComeBack();
  ++num_streams_;
  sending_ = false;
  reader_ = std::move(reader);
  reader_->WakeWith([this] { engine_.timeline().After(absl::ZeroDuration(), [this] { Pump(); }); });
  Pump();
}

void Fetcher::Pump() {
  if (reader_ == nullptr || sending_) return;
  if (plan_.rest_at == received_) return GoAway();
  for (;;) {
    ShipmentReader::Event event = reader_->Next();
    if (std::holds_alternative<ShipmentReader::Started>(event)) continue;
    if (std::holds_alternative<ShipmentReader::Waiting>(event)) {
      return Acknowledge(received_);  // or compute could wait for that
    }
    if (const auto* ended = std::get_if<ShipmentReader::Ended>(&event)) return Ended(*ended);
    return Send(std::get<ShipmentReader::Chunk>(std::move(event)));
  }
}

void Fetcher::Send(ShipmentReader::Chunk chunk) {
  const auto fits = [&] {
    if (chunk.index != received_ || received_ >= std::ssize(expected_)) return false;
    const auto& [layer, tokens] = expected_[static_cast<size_t>(received_)];
    return chunk.chunk.layer == layer && chunk.chunk.tokens.begin == tokens.begin &&
           chunk.chunk.tokens.count == tokens.count;
  };
  if (!fits()) {
    engine_.model().Violate(
        Invariant::kParts,
        absl::StrCat(book_.id, ": chunk ", chunk.index, " is layer ", chunk.chunk.layer,
                     ", tokens from ", chunk.chunk.tokens.begin, ", after ", received_));
  }
  sending_ = true;
  ++book_.on_wire[chunk.chunk.memory.get()];
  if (engine_.mutation() == Mutation::kAckUnsent) Acknowledge(received_ + 1);
  engine_.timeline().After(plan_.wire, [this, stream = num_streams_,
                                        sent = std::move(chunk.chunk)]() mutable {
    const KvChunk arrived = engine_.mutation() == Mutation::kKeepSentChunk ? sent : std::move(sent);
    Sent(arrived);
    if (stream == num_streams_ && reader_ != nullptr) Arrived();
  });
  if (!broke_ && plan_.break_at == received_) Break();
}

// The chunk is off the wire, whoever still listens.
void Fetcher::Sent(const KvChunk& chunk) {
  const auto content = [&](int64_t page) { return book_.contents[static_cast<size_t>(page)]; };
  if (ReadStamp(*chunk.memory) != StampOf(chunk, content)) {
    engine_.model().Violate(Invariant::kContent,
                            absl::StrCat(book_.id, ": other bytes on the wire than its own"));
  }
  const auto on_wire = book_.on_wire.find(chunk.memory.get());
  if (--on_wire->second == 0) book_.on_wire.erase(on_wire);
}

void Fetcher::Arrived() {
  sending_ = false;
  ++received_;
  if (received_ % plan_.ack_every == 0) Acknowledge(received_);
  Pump();
}

void Fetcher::Acknowledge(int64_t num_chunks) {
  const absl::Status unsent = reader_->Acknowledge(reader_->num_chunks() + 1);
  const absl::Status answer = reader_->Acknowledge(num_chunks);
  if (!answer.ok() || !absl::IsInvalidArgument(unsent)) {
    engine_.model().Violate(
        Invariant::kAnswers,
        absl::StrCat(book_.id, ": acks were answered ", Words(unsent), " and ", Words(answer)));
  }
  if (book_.detached()) engine_.Renew(book_, "owner").IgnoreError();
}

void Fetcher::Break() {
  engine_.Tell(book_.id, ": a stream breaks at chunk ", received_);
  broke_ = true;
  reader_.reset();
  GoAway();
  if (plan_.pause.has_value()) engine_.timeline().After(*plan_.pause, [this] { Fetch(); });
}

void Fetcher::Ended(const ShipmentReader::Ended& ended) {
  engine_.Tell(book_.id, ": a stream ended with ", Words(ended.status));
  const absl::Status closed = book_.shipment->Open(std::nullopt, 0).status();
  if (ended.status != closed) {
    engine_.model().Violate(Invariant::kAnswers,
                            absl::StrCat(book_.id, ": a stream ended with ", Words(ended.status)));
  }
  if (ended.status.ok() &&
      (received_ != std::ssize(expected_) || reader_->num_chunks() != received_ ||
       reader_->kv_bytes() != kv_bytes_ ||
       ended.result->first_token.id != static_cast<int32_t>(book_.key))) {
    engine_.model().Violate(Invariant::kParts,
                            absl::StrCat(book_.id, ": ended after ", received_, " chunks of ",
                                         expected_.size(), ", ", reader_->kv_bytes(), " bytes"));
  }
  if (!ended.status.ok()) return reader_.reset();
  ++engine_.model().seen().whole_parts;
  Acknowledge(received_);
  reader_.reset();
  done_();
}

void Fetcher::CheckOver() {
  if (reader_ == nullptr || plan_.rest_at == received_) return;
  engine_.model().Violate(Invariant::kAnswers, absl::StrCat(book_.id, ": a stream has no end"));
}

}  // namespace headstart::simulation
