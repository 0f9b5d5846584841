#include "client/prefill_attempt.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "client/fetch_address.h"
#include "client/grpc_status.h"
#include "client/response_stream.h"
#include "client/retry.h"
#include "client/unary_call.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

// A release that fails is no error of the call: the lease ends the KV.
constexpr absl::Duration kReleaseTimeout = absl::Seconds(1);

KvReceiverOptions WithoutKv(KvReceiverOptions receive) {
  receive.on_manifest = nullptr;
  return receive;
}

}  // namespace

PrefillAttempt::PrefillAttempt(const PrefillClientOptions& options, Connections& connections,
                               const v1::PrefillRequest& request, const KvReceiverOptions& receive,
                               int num_connections, Instant deadline, CancelToken& cancel)
    : options_(options),
      connections_(connections),
      num_connections_(num_connections),
      start_(Instant::Now()),
      deadline_(deadline),
      cancel_(&cancel),
      request_(request),
      assembly_(request.has_detached() ? WithoutKv(receive) : receive),
      receiver_(request.has_detached() || fetches() ? StreamKind::kDetached : StreamKind::kPrefill,
                &assembly_) {
  if (!fetches()) return;
  for (v1::KvPart& stripe : StripesOf({}, num_connections_))
    *request_.mutable_detached()->add_readers() = std::move(stripe);
}

absl::Status PrefillAttempt::Run() {
  absl::Status status = ReceivePrefill();
  if (fetches()) {
    status = JoinFetch(status);
    ReleaseKv();
  }
  HEADSTART_RETURN_IF_ERROR(status);
  const bool elsewhere = request_.has_detached() && !fetches();
  return elsewhere ? absl::OkStatus() : assembly_.CheckWhole();
}

absl::Status PrefillAttempt::ReceivePrefill() {
  grpc::ClientContext context;
  context.set_deadline(deadline_);
  context.set_wait_for_ready(options_.wait_for_ready);
  const CancelScope scope(cancel_, context);
  ResponseStream stream(connections_.main(), "Prefill", &context);
  stream.Send(request_, /*last=*/true);
  absl::Status status;
  grpc::ByteBuffer message;
  while (status.ok() && stream.Read(&message) == ResponseStream::Event::kMessage) {
    status = receiver_.OnMessage(message);
    if (!server_.empty()) continue;
    // The first message: accepted, or wrong.
    server_ = context.peer();
    accepted_at_ = Instant::Now();
    if (status.ok() && fetches()) status = StartFetch();
  }
  if (!status.ok()) context.TryCancel();
  const absl::Status end = ToAbslStatus(stream.Finish());
  HEADSTART_RETURN_IF_ERROR(status);
  if (end.ok()) return receiver_.OnEnd();
  return fetches() ? end : StatusAfterChunks(end, assembly_.num_chunks());
}

absl::Status PrefillAttempt::StartFetch() {
  const v1::Accepted& accepted = receiver_.accepted();
  HEADSTART_ASSIGN_OR_RETURN(server_, FetchTarget(options_, accepted.fetch_address(), server_));
  const auto& readers = request_.detached().readers();
  fetch_.Start({.fetch_id = accepted.fetch_id(),
                .target = server_,
                .deadline = deadline_,
                .retry = options_.retry,
                .cancel = &cancel_,
                .assembly = &assembly_},
               {readers.begin(), readers.end()}, connections_);
  return absl::OkStatus();
}

absl::Status PrefillAttempt::JoinFetch(const absl::Status& prefill) {
  // The fetches bring everything that Prefill's stream does: where only its connection broke,
  // nothing is lost.
  const bool only_broke =
      fetch_.started() && absl::IsUnavailable(prefill) && !ErrorInfoOf(prefill).has_value();
  if (!prefill.ok() && !only_broke) cancel_.Cancel();
  const absl::Status fetched = fetch_.Join();
  const bool cancelled_by_fetch = absl::IsCancelled(prefill) && !fetched.ok();
  return prefill.ok() || only_broke || cancelled_by_fetch ? fetched : prefill;
}

void PrefillAttempt::ReleaseKv() {
  const std::string& fetch_id = receiver_.accepted().fetch_id();
  if (fetch_id.empty()) return;
  v1::ReleaseKvRequest request;
  request.set_fetch_id(fetch_id);
  (void)UnaryCall(connections_.ForFetch(server_, 0), &v1::PrefillService::Stub::ReleaseKv, request,
                  {.deadline = Instant::Now() + kReleaseTimeout});
}

PrefillOutcome PrefillAttempt::Outcome() const {
  const KvTimes times = assembly_.times();
  // Of prompts whose KV does not come there is no chunk.
  const auto since_start = [this](Instant time) {
    return std::max(time - start_, absl::ZeroDuration());
  };
  return {.accepted = receiver_.accepted(),
          .completed = assembly_.completed(),
          .timing = {.accepted = since_start(accepted_at_),
                     .manifest = since_start(times.manifest),
                     .first_chunk = since_start(times.first_chunk),
                     .last_chunk = since_start(times.last_chunk),
                     .first_token = since_start(times.first_token),
                     .completed = since_start(times.completed)},
          .attempts = 1,
          .connections = num_connections_,
          .resumes = fetch_.resumes()};
}

}  // namespace headstart
