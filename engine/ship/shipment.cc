#include "engine/ship/shipment.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

absl::Status GoneError(int64_t chunk, absl::string_view why) {
  return MakeError(absl::StatusCode::kOutOfRange, ErrorReason::kKvGone,
                   absl::StrCat("from_chunk: chunk ", chunk, " ", why));
}

// A reader takes every stripe_count-th chunk of its layers.
bool IsInStripe(const KvPart& part, int64_t layer_chunk) {
  return layer_chunk % part.stripe_count == part.stripe_index;
}

}  // namespace

Shipment::Shipment(const KvGeometry& geometry, Keep keep, std::vector<KvPart> announced,
                   std::string manifest)
    : geometry_(geometry), keep_(keep), manifest_(std::move(manifest)) {
  MutexLock lock(&mutex_);
  for (KvPart& part : announced) announced_.push_back({.part = part});
}

// ---- compute

void Shipment::Start() {
  MutexLock lock(&mutex_);
  started_ = true;
  WakeReaders();
}

void Shipment::Publish(KvChunk chunk) {
  MutexLock lock(&mutex_);
  if (!closed_.ok()) return;
  Entry entry{std::move(chunk)};
  const auto place = static_cast<int64_t>(log_.size());
  for (Announced& reader : announced_) {
    if (!reader.part.HasLayer(entry.chunk.layer)) continue;
    if (!IsInStripe(reader.part, reader.seen_chunks++)) continue;
    reader.unacked.push_back(place);
    ++entry.acks_missing;
  }
  log_.push_back(std::move(entry));
  WakeReaders();
}

void Shipment::Complete(PrefillResult result) {
  MutexLock lock(&mutex_);
  if (!closed_.ok() || result_ != nullptr) return;
  result_ = std::make_shared<const PrefillResult>(std::move(result));
  WakeReaders();
}

void Shipment::Close(absl::Status why) {
  Dropped dropped;
  MutexLock lock(&mutex_);
  if (!closed_.ok()) return;
  closed_ = std::move(why);
  for (Entry& entry : log_) dropped.push_back(std::move(entry.chunk.memory));
  for (ShipmentReader* reader : readers_) {
    reader->waiting_ = false;
    if (reader->wake_) reader->wake_();
  }
}

void Shipment::WakeReaders() {
  for (ShipmentReader* reader : readers_) {
    if (!reader->waiting_ || !reader->HasNews()) continue;
    reader->waiting_ = false;
    if (reader->wake_) reader->wake_();
  }
}

// ---- readers

absl::StatusOr<std::unique_ptr<ShipmentReader>> Shipment::Open(std::optional<KvPart> part,
                                                               int64_t from_chunk) {
  if (part.has_value()) HEADSTART_RETURN_IF_ERROR(CheckPart(*part, geometry_));
  std::unique_ptr<ShipmentReader> reader(new ShipmentReader(shared_from_this(), part));
  Dropped dropped;
  MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(closed_);
  while (reader->num_chunks_ < from_chunk) {
    if (!reader->FindNext()) return GoneError(from_chunk, "was not made yet");
    reader->Pass();
  }
  if (reader->FindNext() && log_[reader->place_].chunk.memory == nullptr) {
    return GoneError(from_chunk, "was acknowledged and given back");
  }
  reader->acknowledged_ = from_chunk;
  if (part.has_value()) Acknowledge(*part, from_chunk, dropped);
  readers_.push_back(reader.get());
  return reader;
}

void Shipment::Acknowledge(const KvPart& part, int64_t num_chunks, Dropped& dropped) {
  if (keep_ != Keep::kUntilAcknowledged) return;
  const auto reader = std::find_if(announced_.begin(), announced_.end(),
                                   [&](const Announced& a) { return a.part == part; });
  if (reader == announced_.end()) return;
  for (; reader->acknowledged < num_chunks; ++reader->acknowledged) {
    Entry& entry = log_[static_cast<size_t>(reader->unacked.front())];
    reader->unacked.pop_front();
    if (--entry.acks_missing == 0) dropped.push_back(std::move(entry.chunk.memory));
  }
}

int64_t Shipment::kept_chunks() const {
  MutexLock lock(&mutex_);
  return std::count_if(log_.begin(), log_.end(),
                       [](const Entry& entry) { return entry.chunk.memory != nullptr; });
}

ShipmentReader::~ShipmentReader() {
  MutexLock lock(&shipment_->mutex_);
  std::erase(shipment_->readers_, this);
}

void ShipmentReader::WakeWith(std::function<void()> wake) {
  MutexLock lock(&shipment_->mutex_);
  wake_ = std::move(wake);
}

bool ShipmentReader::computed() const {
  MutexLock lock(&shipment_->mutex_);
  return shipment_->result_ != nullptr;
}

bool ShipmentReader::HasNews() {
  const Shipment& s = *shipment_;
  return !s.closed_.ok() || (s.started_ && !saw_start_) || FindNext() || s.result_ != nullptr;
}

bool ShipmentReader::FindNext() {
  if (!part_.has_value()) return false;
  const std::vector<Shipment::Entry>& log = shipment_->log_;
  for (; place_ < log.size(); ++place_) {
    if (!part_->HasLayer(log[place_].chunk.layer)) continue;
    if (IsInStripe(*part_, layer_chunks_)) return true;
    ++layer_chunks_;
  }
  return false;
}

void ShipmentReader::Pass() {
  kv_bytes_ += geometry().wire_bytes(shipment_->log_[place_].chunk.tokens, part_->head_count);
  ++num_chunks_;
  ++layer_chunks_;
  ++place_;
}

ShipmentReader::Event ShipmentReader::Next() {
  Shipment& s = *shipment_;
  MutexLock lock(&s.mutex_);
  // Who follows the outcome only gets it, whatever became of the KV since.
  const bool wants_kv = part_.has_value() || s.result_ == nullptr;
  if (!s.closed_.ok() && wants_kv) return Ended{s.closed_, nullptr};
  if (s.started_ && !std::exchange(saw_start_, s.started_)) return Started{};
  if (FindNext()) {
    Chunk out{static_cast<uint32_t>(num_chunks_), s.log_[place_].chunk};
    if (out.chunk.memory == nullptr) {
      return Ended{GoneError(num_chunks_, "was acknowledged and given back"), nullptr};
    }
    if (s.keep_ == Shipment::Keep::kUntilTaken) s.log_[place_].chunk.memory = nullptr;
    Pass();
    return out;
  }
  if (s.result_ != nullptr) return Ended{absl::OkStatus(), s.result_};
  waiting_ = true;
  return Waiting{};
}

absl::Status ShipmentReader::Acknowledge(int64_t num_chunks) {
  Shipment::Dropped dropped;
  MutexLock lock(&shipment_->mutex_);
  if (num_chunks < acknowledged_ || num_chunks > num_chunks_) {
    return absl::InvalidArgumentError(absl::StrCat("ack.num_chunks=", num_chunks, " is not in [",
                                                   acknowledged_, ", ", num_chunks_,
                                                   "], what was acknowledged and what was sent"));
  }
  acknowledged_ = num_chunks;
  if (part_.has_value()) shipment_->Acknowledge(*part_, num_chunks, dropped);
  return absl::OkStatus();
}

}  // namespace headstart
