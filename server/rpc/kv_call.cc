#include "server/rpc/kv_call.h"

#include <grpc/grpc.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"
#include "server/rpc/rich_status.h"

namespace headstart {
namespace {

// Cancels this close before the client's deadline were its deadline.
constexpr absl::Duration kDeadlineSlack = absl::Milliseconds(50);

// gRPC may say that there is no message before it says that the call was cancelled. Both come from
// the same frame, so they are close.
constexpr absl::Duration kCancelNotice = absl::Milliseconds(200);

}  // namespace

absl::StatusOr<const ServedModel*> LoadedModel(const ServiceContext& context) {
  const absl::Status closed = context.lifecycle->WhyClosed();  // first: serving means loaded
  const ServedModel* model = context.model.load();
  if (model == nullptr) return closed;
  return model;
}

KvCall::KvCall(ServiceContext* service, grpc::CallbackServerContext* call)
    : service_(*service),
      context_(*call),
      sender_(std::make_shared<KvSender>(service, static_cast<SendingCall*>(this))) {
  first_message_timer_ =
      service_.timer->Schedule(came_at_ + service_.options->first_message_timeout, [this] {
        if (!Claim()) return;
        EndWith(
            MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                      absl::StrCat("no request message within ",
                                   absl::FormatDuration(service_.options->first_message_timeout))));
      });
  service_.ledger->OnCall(peer_);
  ReadNext();
}

// ---- messages

void KvCall::OnReadDone(bool ok) {
  if (ok) CountMessage();
  if (!Claim()) {
    if (!ok) return;
    if (absl::Status status = OnMessage(message_); !status.ok()) return sender_->End(status);
    return ReadNext();
  }
  service_.timer->Cancel(first_message_timer_);
  if (!ok) {
    first_message_timer_ = service_.timer->Schedule(Instant::Now() + kCancelNotice, [this] {
      EndWith(MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest,
                        "the call brought no request message"));
    });
    return;
  }
  if (absl::Status status = Begin(message_); !status.ok()) sender_->End(std::move(status));
  sender_->Start();
}

void KvCall::CountMessage() {
  const auto bytes = static_cast<int64_t>(message_.Length());
  if (std::exchange(has_message_, true)) {
    service_.ledger->OnMessage(peer_, bytes);
  } else {
    service_.ledger->OnFirstMessage(peer_, bytes);
  }
}

void KvCall::EndWith(absl::Status status) {
  sender_->End(std::move(status));
  sender_->Start();
}

// ---- the end

void KvCall::OnCancel() {
  sender_->End(WhyCancelled());
  if (Claim()) sender_->Start();
}

absl::Status KvCall::WhyCancelled() const {
  if (service_.cancelling_all.load()) {
    return MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                     "the server shut down before the request ended");
  }
  // A client whose time is up resets the call, and that may come before our own clock says so: gRPC
  // rounds a timeout up by as much as a hundredth on the wire.
  const Instant deadline = FromGrpcTime(context_.raw_deadline());
  if (Instant::Now() >= deadline - std::max(kDeadlineSlack, (deadline - came_at_) / 50)) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the client's deadline passed");
  }
  return MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientCancelled,
                   "the client cancelled");
}

// Unlike Finish, this status needs no room in the client's flow-control window.
void KvCall::Cut(const absl::Status& why) {
  grpc_call_cancel_with_status(context_.c_call(), static_cast<grpc_status_code>(why.code()),
                               std::string(why.message()).c_str(), nullptr);
}

void KvCall::OnEnded(const absl::Status& status) {
  Settle(status);
  Finish(ToGrpcStatus(status));
}

void KvCall::OnDone() {
  service_.timer->Cancel(first_message_timer_);
  sender_->StopTimers();
  if (!has_message_) service_.ledger->OnCallWithoutMessage(peer_);
  delete this;
}

}  // namespace headstart
