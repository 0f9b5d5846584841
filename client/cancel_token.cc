#include "client/cancel_token.h"

#include "grpcpp/client_context.h"

namespace headstart {

CancelToken::CancelToken(CancelToken* parent) : parent_(parent) {
  if (parent_ == nullptr) return;
  absl::MutexLock lock(&parent_->mutex_);
  parent_->children_.insert(this);
  absl::MutexLock own(&mutex_);
  cancelled_ = parent_->cancelled_;
}

CancelToken::~CancelToken() {
  if (parent_ == nullptr) return;
  absl::MutexLock lock(&parent_->mutex_);
  parent_->children_.erase(this);
}

void CancelToken::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
  for (CancelToken* child : children_) child->Cancel();
}

bool CancelToken::cancelled() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_;
}

bool CancelToken::SleepUntil(absl::Time time) const {
  absl::MutexLock lock(&mutex_);
  return !mutex_.AwaitWithDeadline(absl::Condition(&cancelled_), time);
}

CancelScope::CancelScope(CancelToken& token, grpc::ClientContext& context)
    : token_(token), context_(context) {
  absl::MutexLock lock(&token_.mutex_);
  token_.contexts_.insert(&context_);
  if (token_.cancelled_) context_.TryCancel();
}

CancelScope::~CancelScope() {
  absl::MutexLock lock(&token_.mutex_);
  token_.contexts_.erase(&context_);
}

}  // namespace headstart
