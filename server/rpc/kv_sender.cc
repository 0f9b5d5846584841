#include "server/rpc/kv_sender.h"

#include <grpcpp/alarm.h>

#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "server/rpc/describe.h"

namespace headstart {
namespace {

// How long an error waits for the write in flight, so that its details reach the client.
constexpr absl::Duration kErrorGrace = absl::Milliseconds(500);

bool IsStall(const absl::Status& status) { return ReasonOf(status) == ErrorReason::kClientStalled; }

}  // namespace

void KvSender::Send(const v1::PrefillResponse& response) { Push({SerializeMessage(response)}); }

void KvSender::Ship(std::unique_ptr<ShipmentReader> reader, const KvPart& part) {
  reader->WakeWith([this] { Wake(); });  // the reader goes in Finish
  part_ = part;
  MutexLock lock(&mutex_);
  reader_ = std::move(reader);
  ready_ = true;
}

void KvSender::Start() {
  {
    MutexLock lock(&mutex_);
    pumping_ = false;
  }
  Pump();
}

absl::Status KvSender::Acknowledge(int64_t num_chunks) {
  MutexLock lock(&mutex_);
  return reader_ == nullptr ? absl::OkStatus() : reader_->Acknowledge(num_chunks);
}

// ---- what comes next

void KvSender::Pump() {
  const std::shared_ptr<KvSender> self = shared_from_this();  // the call may go in Finish
  {
    MutexLock lock(&mutex_);
    if (std::exchange(pumping_, true)) return;
  }
  while (true) {
    Step step = Step::kNone;
    {
      MutexLock lock(&mutex_);
      step = NextStep();
      pumping_ = step != Step::kNone;
    }
    switch (step) {
      case Step::kNone:
        return;
      case Step::kWrite:
        call_.Write(in_flight_.bytes);
        break;
      case Step::kPull:
        Pull();
        break;
      case Step::kFinish:
        return Finish();
    }
  }
}

KvSender::Step KvSender::NextStep() {
  if (!writing_ && !queue_.empty()) {
    in_flight_ = std::move(queue_.front());
    queue_.pop_front();
    writing_ = true;
    write_began_ = Instant::Now();
    if (stall_timer_ == Timer::kNone) Watch(&KvSender::stall_timer_);
    return Step::kWrite;
  }
  // What wakes a reader that was not waiting is the end of the shipment, which may come as late as
  // the last write.
  if (status_.ok() && (woken_ || (!ended_ && ready_ && queue_.empty()))) {
    woken_ = ready_ = false;
    return Step::kPull;
  }
  return ended_ && !writing_ && queue_.empty() ? Step::kFinish : Step::kNone;
}

void KvSender::Pull() {
  ShipmentReader::Event event = reader_->Next();
  if (std::holds_alternative<ShipmentReader::Waiting>(event)) return;
  if (std::holds_alternative<ShipmentReader::Started>(event)) {
    call_.OnComputeStart();
    Send(MakeManifest());
  } else if (const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event)) {
    Push(ChunkMessage(*chunk, part_, reader_->geometry()));
  } else if (auto& end = std::get<ShipmentReader::Ended>(event); end.status.ok()) {
    record_.result = std::move(end.result);
    Push({SerializeMessage(MakeCompletion(*record_.result))}, /*is_last=*/true);
  } else {
    End(std::move(end.status));
  }
}

v1::PrefillResponse KvSender::MakeManifest() {
  manifest_.ParseFromString(reader_->manifest());
  v1::PrefillResponse response;
  *response.mutable_manifest() = manifest_;
  return response;
}

v1::PrefillResponse KvSender::MakeCompletion(const PrefillResult& result) const {
  v1::Completed completed = ToCompleted(manifest_, result, Instant::Now());
  completed.set_num_chunks(static_cast<uint32_t>(reader_->num_chunks()));
  completed.set_kv_bytes(static_cast<uint64_t>(reader_->kv_bytes()));
  v1::PrefillResponse response;
  v1::CheckedCompletion* checked = response.mutable_completed();
  checked->set_completed(completed.SerializeAsString());
  checked->set_crc32c(Crc32c(checked->completed()));
  return response;
}

void KvSender::Push(StreamMessage message, bool is_last) {
  MutexLock lock(&mutex_);
  if (ended_) return;
  queue_.push_back(std::move(message));
  ready_ = reader_ != nullptr;
  ended_ = is_last;
}

void KvSender::Wake() {
  struct Waking {
    grpc::Alarm alarm;
    std::shared_ptr<KvSender> sender;
  };
  auto* waking = new Waking{{}, shared_from_this()};
  waking->alarm.Set(gpr_inf_past(GPR_CLOCK_MONOTONIC), [waking](bool) {
    const std::shared_ptr<KvSender> sender = std::move(waking->sender);
    delete waking;
    sender->OnWoken();
  });
}

void KvSender::OnWoken() {
  {
    MutexLock lock(&mutex_);
    woken_ = true;
  }
  Pump();
}

// ---- writes

void KvSender::OnWriteDone(bool ok) {
  if (ok) NoteSent(in_flight_);
  absl::Status pace;
  {
    MutexLock lock(&mutex_);
    pace = CheckPace();
    in_flight_ = StreamMessage();
    writing_ = false;
    if (!ok) {  // nothing more will arrive; a completion may have been lost with it
      queue_.clear();
      if (!ended_ || status_.ok()) status_ = call_.WhyCancelled();
      ended_ = true;
    }
  }
  if (!pace.ok()) End(std::move(pace));
  Pump();
}

absl::Status KvSender::CheckPace() {
  offered_ += Instant::Now() - write_began_;
  taken_bytes_ += in_flight_.kv_bytes;
  if (offered_ < service_.options->write_stall_timeout) return absl::OkStatus();
  const absl::Duration offered = std::exchange(offered_, absl::ZeroDuration());
  const int64_t taken = std::exchange(taken_bytes_, 0);
  const auto wanted =
      static_cast<double>(service_.options->min_kv_rate) * absl::ToDoubleSeconds(offered);
  if (static_cast<double>(taken) >= wanted) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kCancelled, ErrorReason::kClientStalled,
      absl::StrCat("the client took ", taken, " bytes of KV in ", absl::FormatDuration(offered),
                   "; the least is ", service_.options->min_kv_rate, " a second"));
}

void KvSender::NoteSent(const StreamMessage& message) {
  if (message.kv_bytes == 0) return;
  record_.last_chunk_at = Instant::Now();
  if (record_.chunks == 0) record_.first_chunk_at = record_.last_chunk_at;
  ++record_.chunks;
  record_.kv_bytes += message.kv_bytes;
  if (!reader_->computed()) record_.kv_bytes_before_computed = record_.kv_bytes;
  service_.metrics->RecordChunkSent(message.kv_bytes, part_.stripe_count);
}

Instant KvSender::WriteLimit() const {
  if (status_.ok()) return write_began_ + service_.options->write_stall_timeout;
  return IsStall(status_) ? ended_at_ : ended_at_ + kErrorGrace;
}

void KvSender::Watch(Timer::Id KvSender::*timer) {
  this->*timer = service_.timer->Schedule(WriteLimit(), [this, timer] { CheckWrite(timer); });
}

void KvSender::CheckWrite(Timer::Id KvSender::*timer) {
  absl::Status why;
  {
    MutexLock lock(&mutex_);
    this->*timer = Timer::kNone;
    if (!writing_) return;
    if (Instant::Now() < WriteLimit()) return Watch(timer);
    if (status_.ok()) {
      status_ =
          MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientStalled,
                    absl::StrCat("the client took no KV for ",
                                 absl::FormatDuration(service_.options->write_stall_timeout)));
    }
    ended_ = true;
    ended_at_ = Instant::Now();
    queue_.clear();
    why = status_;
  }
  call_.Cut(why);  // OnWriteDone goes on
}

// ---- the end

void KvSender::End(absl::Status status) {
  {
    MutexLock lock(&mutex_);
    if (ended_ && !status_.ok()) return;
    if (ended_ && !writing_ && queue_.empty()) return;
    ended_ = true;
    status_ = std::move(status);
    ended_at_ = Instant::Now();
    queue_.clear();
    if (writing_) Watch(&KvSender::grace_timer_);
  }
  Pump();
}

void KvSender::Finish() {
  std::unique_ptr<ShipmentReader> reader;
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    reader = std::move(reader_);
    status = status_;
  }
  reader.reset();
  call_.OnEnded(status);
}

void KvSender::StopTimers() {
  Timer::Id stall = Timer::kNone, grace = Timer::kNone;
  {
    MutexLock lock(&mutex_);
    stall = stall_timer_;
    grace = grace_timer_;
  }
  service_.timer->Cancel(stall);
  service_.timer->Cancel(grace);
}

}  // namespace headstart
