#include "client/cancel_token.h"

#include "grpcpp/client_context.h"

namespace headstart {

CancelToken::CancelToken(CancelToken* parent) : parent_(parent) {
  if (parent_ == nullptr) return;
  MutexLock lock(&parent_->mutex_);
  parent_->children_.insert(this);
  MutexLock own(&mutex_);
  cancelled_ = parent_->cancelled_;
}

CancelToken::~CancelToken() {
  if (parent_ == nullptr) return;
  MutexLock lock(&parent_->mutex_);
  parent_->children_.erase(this);
}

void CancelToken::Cancel() {
  MutexLock lock(&mutex_);
  cancelled_ = true;
  changed_.SignalAll();
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
  for (CancelToken* child : children_) child->Cancel();
}

bool CancelToken::cancelled() const {
  MutexLock lock(&mutex_);
  return cancelled_;
}

bool CancelToken::SleepUntil(Instant time) const {
  MutexLock lock(&mutex_);
  while (!cancelled_ && Instant::Now() < time) changed_.WaitUntil(&mutex_, time);
  return !cancelled_;
}

CancelScope::CancelScope(CancelToken& token, grpc::ClientContext& context)
    : token_(token), context_(context) {
  MutexLock lock(&token_.mutex_);
  token_.contexts_.insert(&context_);
  if (token_.cancelled_) context_.TryCancel();
}

CancelScope::~CancelScope() {
  MutexLock lock(&token_.mutex_);
  token_.contexts_.erase(&context_);
}

}  // namespace headstart
