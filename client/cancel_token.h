// Ends a call of the client from another thread.
#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace grpc {
class ClientContext;
}  // namespace grpc

namespace headstart {

// Thread-safe. Cancelled once, a token stays it.
class CancelToken {
 public:
  // A token is cancelled with its parent, not the other way round. The parent may be null, and
  // outlives this token.
  explicit CancelToken(CancelToken* parent = nullptr);
  ~CancelToken();
  CancelToken(const CancelToken&) = delete;
  CancelToken& operator=(const CancelToken&) = delete;

  void Cancel();
  bool cancelled() const;
  // False when the token was cancelled meanwhile.
  bool SleepUntil(Instant time) const;

 private:
  friend class CancelScope;

  CancelToken* const parent_;
  mutable Mutex mutex_;  // a parent's is taken before its children's
  mutable CondVar changed_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  absl::flat_hash_set<CancelToken*> children_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mutex_);
};

// While it lives, the token reaches the gRPC call of `context`. Made before the call starts:
// opening it may take a connection.
class CancelScope {
 public:
  CancelScope(CancelToken& token, grpc::ClientContext& context);
  ~CancelScope();
  CancelScope(const CancelScope&) = delete;
  CancelScope& operator=(const CancelScope&) = delete;

 private:
  CancelToken& token_;
  grpc::ClientContext& context_;
};

}  // namespace headstart
