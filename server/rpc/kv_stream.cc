#include "server/rpc/kv_stream.h"

#include <grpc/grpc.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/error.h"
#include "server/rpc/call_metadata.h"
#include "server/rpc/chunk_frame.h"
#include "server/rpc/rich_status.h"

namespace headstart {
namespace {

// How long an error waits for the write in flight, so that its details reach the client.
constexpr absl::Duration kErrorGrace = absl::Milliseconds(500);

// Cancels this close before the client's deadline were its deadline.
constexpr absl::Duration kDeadlineSlack = absl::Milliseconds(50);

// gRPC may say that there is no message before it says that the call was cancelled. Both come from
// the same frame, so they are close.
constexpr absl::Duration kCancelNotice = absl::Milliseconds(200);

bool IsStall(const absl::Status& status) { return ReasonOf(status) == ErrorReason::kClientStalled; }

}  // namespace

// ---- the request

KvStream::KvStream(ServiceContext* service, grpc::CallbackServerContext* call)
    : service_(*service),
      call_(*call),
      window_(service->options->send_buffer_bytes, service->options->write_stall_timeout) {
  record_.peer = call->peer();
  record_.trace_id = TraceId(*call);
  first_message_timer_ = service_.timer->Schedule(
      absl::Now() + service_.options->first_message_timeout, [this] { OnFirstMessageTimeout(); });
  StartRead(&request_bytes_);
}

bool KvStream::Claim() {
  MutexLock lock(&mutex_);
  return !std::exchange(claimed_, true);
}

void KvStream::OnFirstMessageTimeout() {
  if (!Claim()) return;
  End(MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                absl::StrCat("no request message within ",
                             absl::FormatDuration(service_.options->first_message_timeout))));
}

void KvStream::OnReadDone(bool ok) {
  if (!Claim()) return;
  service_.timer->Cancel(first_message_timer_);
  if (!ok) {
    first_message_timer_ =
        service_.timer->Schedule(absl::Now() + kCancelNotice, [this] { EndWithoutMessage(); });
    return;
  }
  if (const absl::Status status = Accept(); !status.ok()) End(status);
}

void KvStream::EndWithoutMessage() {
  End(call_.IsCancelled()
          ? WhyCancelled()
          : MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest,
                      "the call brought no request message"));
}

absl::Status KvStream::Accept() {
  v1::PrefillRequest request;
  HEADSTART_RETURN_IF_ERROR(ParseRequest(&request));
  HEADSTART_RETURN_IF_ERROR(service_.admission->CheckOpen());
  model_ = service_.model.load();
  HEADSTART_RETURN_IF_ERROR(FillJob(request, *model_, &job_));
  record_.num_tokens = static_cast<int64_t>(job_.token_ids.size());
  job_.deadline = EffectiveDeadline(call_, *service_.options);
  HEADSTART_ASSIGN_OR_RETURN(
      ticket_, service_.admission->Admit(job_.request_id, record_.num_tokens, job_.deadline));
  accepted_at_ = absl::Now();
  record_.accepted = true;
  SendAccepted(request);
  PushToWorker();  // from here on the worker may end the call
  return absl::OkStatus();
}

absl::Status KvStream::ParseRequest(v1::PrefillRequest* request) {
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call_, service_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request_bytes_, request));
  request_bytes_.Clear();
  HEADSTART_ASSIGN_OR_RETURN(job_.request_id, ChooseRequestId(request->request_id(), call_));
  record_.request_id = job_.request_id;
  call_.AddInitialMetadata("x-request-id", job_.request_id);
  const absl::Status known = CheckModelName(request->model(), service_.model_name);
  record_.unknown_model = !known.ok();
  return known;
}

void KvStream::SendAccepted(const v1::PrefillRequest& request) {
  v1::PrefillResponse response;
  v1::Accepted* accepted = response.mutable_accepted();
  accepted->set_request_id(job_.request_id);
  accepted->set_queue_requests(static_cast<uint32_t>(ticket_.requests_ahead()));
  accepted->set_queue_tokens(ticket_.tokens_ahead());
  accepted->set_transfer_params(request.transfer_params());
  Send(response);
}

void KvStream::PushToWorker() {
  service_.worker->Push(
      {.job = &job_,
       .sink = this,
       .on_start = [this] { OnComputeStart(); },
       .done = [this](absl::StatusOr<PrefillResult> result) { OnComputed(std::move(result)); }});
}

// ---- the worker's thread

void KvStream::OnComputeStart() {
  ticket_.Start();
  record_.queue = absl::Now() - accepted_at_;
  service_.metrics->RecordComputeStart(*record_.queue);
}

absl::Status KvStream::OnStart() {
  manifest_ = ToManifest(job_, *model_);
  record_.below_dense_limit = !manifest_.attention().dense_reason().empty();
  v1::PrefillResponse response;
  *response.mutable_manifest() = manifest_;
  Send(response);
  return absl::OkStatus();
}

absl::StatusOr<absl::Span<std::byte>> KvStream::Reserve(const KvChunkInfo& chunk, int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(const absl::Duration waited, window_.Take(bytes, job_.deadline));
  if (waited > absl::ZeroDuration()) service_.metrics->RecordChunkStall(waited);
  chunk_ = chunk;
  grpc_slice memory = grpc_slice_malloc(bytes);
  payload_ = grpc::Slice(memory, grpc::Slice::STEAL_REF);
  return absl::MakeSpan(reinterpret_cast<std::byte*>(GRPC_SLICE_START_PTR(memory)), bytes);
}

absl::Status KvStream::Commit() {
  const auto bytes = static_cast<int64_t>(payload_.size());
  ChunkHeader header;
  header.index = num_chunks_++;
  header.layer = static_cast<uint32_t>(chunk_.layer);
  header.token_begin = static_cast<uint32_t>(chunk_.token_begin);
  header.token_count = static_cast<uint32_t>(chunk_.token_count);
  header.kv_head_count = manifest_.layout().num_kv_heads();
  const auto* data = reinterpret_cast<const std::byte*>(payload_.begin());
  const uint32_t crc32c = ChunkCrc32c(header, absl::MakeConstSpan(data, bytes));
  const grpc::Slice slices[] = {grpc::Slice(ChunkFramePrefix(header, crc32c, bytes)),
                                std::move(payload_)};
  payload_ = grpc::Slice();
  kv_bytes_ += bytes;
  Send(Message{grpc::ByteBuffer(slices, 2), bytes});
  return absl::OkStatus();
}

void KvStream::OnComputed(absl::StatusOr<PrefillResult> result) {
  if (!result.ok()) {
    const bool cancelled = result.status().code() == absl::StatusCode::kCancelled;
    End(cancelled && !IsStall(result.status()) ? WhyCancelled() : result.status());
    return;
  }
  service_.admission->AddMeasurement(record_.num_tokens,
                                     absl::Seconds(result->total_seconds - result->sink_seconds));
  SendCompleted(*result);
  record_.result = *std::move(result);
  End(absl::OkStatus());
}

void KvStream::SendCompleted(const PrefillResult& result) {
  v1::PrefillResponse response;
  v1::Completed* completed = response.mutable_completed();
  *completed = ToCompleted(manifest_, result);
  completed->set_num_chunks(num_chunks_);
  completed->set_kv_bytes(kv_bytes_);
  const absl::Duration total = absl::Now() - accepted_at_;
  const TimeShares shares = ShareTime(*record_.queue, result, total);
  v1::PrefillStatistics* statistics = completed->mutable_statistics();
  SetDuration(shares.queue, statistics->mutable_queue());
  SetDuration(shares.selection, statistics->mutable_selection());
  SetDuration(shares.attention, statistics->mutable_attention());
  SetDuration(shares.other_compute, statistics->mutable_other_compute());
  SetDuration(shares.exposed_transfer, statistics->mutable_exposed_transfer());
  SetDuration(total, statistics->mutable_total());
  completed->set_crc32c(CompletedCrc32c(*completed));
  Send(response);
}

// ---- writing

void KvStream::Send(const v1::PrefillResponse& response) {
  Send(Message{SerializeMessage(response), 0});
}

void KvStream::Send(Message message) {
  {
    MutexLock lock(&mutex_);
    if (broken_) return;
    if (writing_) {
      queue_.push_back(std::move(message));
      return;
    }
    writing_ = true;
    in_flight_ = std::move(message);
  }
  StartWrite(&in_flight_.bytes);
}

void KvStream::OnWriteDone(bool ok) {
  if (ok) NoteSent(in_flight_);
  if (!ok) window_.Break(WhyCancelled());
  window_.GiveBack(in_flight_.kv_bytes);
  bool more = false;
  bool over = false;
  {
    MutexLock lock(&mutex_);
    last_progress_ = absl::Now();
    if (!ok) {
      broken_ = true;
      queue_.clear();
      if (ending_ && status_.ok()) status_ = WhyCancelled();
    }
    in_flight_ = Message();
    writing_ = more = !queue_.empty();
    if (more) {
      in_flight_ = std::move(queue_.front());
      queue_.pop_front();
    }
    over = ending_ && !more;
  }
  if (more) StartWrite(&in_flight_.bytes);
  if (over) Settle();
}

void KvStream::NoteSent(const Message& message) {
  if (message.kv_bytes == 0) return;
  if (record_.chunks_sent == 0) record_.first_chunk = absl::Now() - accepted_at_;
  ++record_.chunks_sent;
  record_.kv_bytes_sent += message.kv_bytes;
  service_.metrics->RecordChunkSent(message.kv_bytes);
}

// ---- the end

void KvStream::OnCancel() {
  job_.cancelled.store(true);
  window_.Break(WhyCancelled());
  service_.worker->Cancel(&job_);
}

absl::Status KvStream::WhyCancelled() const {
  if (service_.cancelling_all.load()) {
    return MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                     "the server shut down before the request ended");
  }
  // A client whose time is up resets the call, and that may come before our own clock says so: gRPC
  // rounds a timeout up by as much as a hundredth on the wire.
  const absl::Time deadline = absl::FromChrono(call_.deadline());
  if (absl::Now() >= deadline - std::max(kDeadlineSlack, (deadline - came_at_) / 50)) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the client's deadline passed");
  }
  return MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientCancelled,
                   "the client cancelled");
}

void KvStream::End(absl::Status status) {
  {
    MutexLock lock(&mutex_);
    HEADSTART_CHECK(!ending_);
    ending_ = true;
    // A write that failed took the completion with it.
    status_ = broken_ && status.ok() ? WhyCancelled() : std::move(status);
    last_progress_ = absl::Now();
    if (!status_.ok()) queue_.clear();
    if (writing_) {  // OnWriteDone settles; the stream may be gone as soon as the lock is
      ScheduleTailCheck();
      return;
    }
  }
  Settle();
}

absl::Time KvStream::TailLimit() const {
  if (IsStall(status_)) return last_progress_;
  if (!status_.ok()) return last_progress_ + kErrorGrace;
  return std::min(last_progress_ + service_.options->write_stall_timeout, job_.deadline);
}

void KvStream::ScheduleTailCheck() {
  tail_timer_ = service_.timer->Schedule(TailLimit(), [this] { CheckTail(); });
}

void KvStream::CheckTail() {
  absl::Status why;
  {
    MutexLock lock(&mutex_);
    if (!writing_) return;
    if (absl::Now() < TailLimit()) return ScheduleTailCheck();
    if (status_.ok()) {
      status_ = absl::Now() >= job_.deadline
                    ? MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                                "the deadline passed while the client did not take KV")
                    : MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientStalled,
                                "the client did not take the last of its KV");
    }
    queue_.clear();
    why = status_;
  }
  // Fails the write in flight, so OnWriteDone settles. Unlike Finish, this status needs no room in
  // the client's flow-control window.
  grpc_call_cancel_with_status(call_.c_call(), static_cast<grpc_status_code>(why.code()),
                               std::string(why.message()).c_str(), nullptr);
}

void KvStream::Settle() {
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    status = status_;
  }
  if (record_.accepted) record_.total = absl::Now() - accepted_at_;
  ticket_ = Ticket();
  service_.metrics->RecordCall(record_, status);
  LogCall(record_, status);
  Finish(ToGrpcStatus(status));
}

void KvStream::OnDone() {
  Timer::Id tail_timer = Timer::kNone;
  {
    MutexLock lock(&mutex_);
    tail_timer = tail_timer_;
  }
  service_.timer->Cancel(first_message_timer_);
  service_.timer->Cancel(tail_timer);
  delete this;
}

}  // namespace headstart
