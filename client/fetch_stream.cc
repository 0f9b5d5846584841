#include "client/fetch_stream.h"

#include "client/grpc_status.h"
#include "client/retry.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

// The server keeps chunks until they are acknowledged: what came is acknowledged when it is this
// much, or when nothing follows it, so that a server without room does not wait for us.
constexpr int64_t kAcknowledgeBytes = 8 << 20;
constexpr absl::Duration kAcknowledgePause = absl::Milliseconds(10);

}  // namespace

FetchStream::FetchStream(const FetchCall& call, const v1::KvPart& part,
                         const std::shared_ptr<grpc::Channel>& channel, std::atomic<int>* resumes)
    : call_(call),
      part_(part),
      channel_(channel),
      resumes_(resumes),
      receiver_(StreamKind::kFetch, call.assembly) {}

absl::Status FetchStream::Run() {
  for (int failures = 0;;) {
    const int64_t before = receiver_.num_chunks();
    bool broke = false;
    const absl::Status status = RunCall(&broke);
    if (!broke) return status;
    failures = receiver_.num_chunks() > before ? 1 : failures + 1;
    if (const absl::Status end =
            PauseBeforeRetry(status, failures, call_.retry, call_.deadline, *call_.cancel);
        !end.ok()) {
      return StatusAfterChunks(end, call_.assembly->num_chunks());
    }
    receiver_.OnResume();
    ++*resumes_;
  }
}

absl::Status FetchStream::RunCall(bool* broke) {
  grpc::ClientContext context;
  context.set_deadline(call_.deadline);
  const CancelScope scope(*call_.cancel, context);
  ResponseStream stream(channel_, "FetchKv", &context);
  v1::FetchKvRequest request;
  request.mutable_fetch()->set_fetch_id(call_.fetch_id);
  *request.mutable_fetch()->mutable_part() = part_;
  request.mutable_fetch()->set_from_chunk(static_cast<uint32_t>(receiver_.num_chunks()));
  acknowledged_chunks_ = receiver_.num_chunks();
  acknowledged_bytes_ = receiver_.kv_bytes();
  stream.Send(request, /*last=*/false);
  const absl::Status received = Receive(stream);
  if (!received.ok()) context.TryCancel();
  const absl::Status ended = ToAbslStatus(stream.Finish());
  HEADSTART_RETURN_IF_ERROR(received);
  if (ended.ok()) return receiver_.OnEnd();
  *broke = absl::IsUnavailable(ended);
  return *broke ? ended : StatusAfterChunks(ended, call_.assembly->num_chunks());
}

absl::Status FetchStream::Receive(ResponseStream& stream) {
  grpc::ByteBuffer message;
  for (;;) {
    const bool all_known = acknowledged_chunks_ == receiver_.num_chunks();
    switch (stream.Read(
        &message, all_known ? Instant::InfiniteFuture() : Instant::Now() + kAcknowledgePause)) {
      case ResponseStream::Event::kEnd:
        return absl::OkStatus();
      case ResponseStream::Event::kTimeout:
        Acknowledge(stream, /*last=*/false);
        break;
      case ResponseStream::Event::kMessage:
        HEADSTART_RETURN_IF_ERROR(receiver_.OnMessage(message));
        if (receiver_.completed()) {
          Acknowledge(stream, /*last=*/true);
        } else if (receiver_.kv_bytes() - acknowledged_bytes_ >= kAcknowledgeBytes) {
          Acknowledge(stream, /*last=*/false);
        }
    }
  }
}

void FetchStream::Acknowledge(ResponseStream& stream, bool last) {
  acknowledged_chunks_ = receiver_.num_chunks();
  acknowledged_bytes_ = receiver_.kv_bytes();
  v1::FetchKvRequest request;
  request.mutable_ack()->set_num_chunks(static_cast<uint32_t>(acknowledged_chunks_));
  stream.Send(request, last);
}

}  // namespace headstart
