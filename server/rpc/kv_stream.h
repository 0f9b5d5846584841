// One Prefill call from its request to its status: reactor of gRPC and sink of the engine.
//
// Life. PrefillService makes the stream. OnReadDone takes the request, accepts it (ticket, Accepted
// message, worker's queue) or ends it. The worker's thread runs OnStart, Reserve and Commit, then
// OnComputed. Messages wait in `queue_`; one at a time is being written. End() is called exactly
// once, by whoever owns the request at that time: the thread that refuses it, or the worker's
// `done`. When the last message has been written, Settle() gives back the ticket, counts, logs and
// sends the status. gRPC calls OnDone after that and after every other reaction has returned:
// there, and only there, the stream goes. So the worker may hold a plain pointer to it.
//
// Backwards run only signals: OnCancel and the timer set flags and wake whoever waits.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/ship/kv_sink.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/mutex.h"
#include "server/rpc/call_record.h"
#include "server/rpc/send_window.h"
#include "server/rpc/service_context.h"

namespace headstart {

class KvStream final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                       public KvSink {
 public:
  // `service` and `call` outlive the stream.
  KvStream(ServiceContext* service, grpc::CallbackServerContext* call);

  // Reactions, on gRPC's threads; they never wait for the engine or the client.
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  // KvSink, on the worker's thread.
  absl::Status OnStart() override;
  absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo& chunk, int64_t bytes) override;
  absl::Status Commit() override;

 private:
  struct Message {
    grpc::ByteBuffer bytes;
    int64_t kv_bytes = 0;  // of the chunk in it; held in the send window
  };

  ~KvStream() override = default;

  void OnFirstMessageTimeout();
  void EndWithoutMessage();
  // True for the first caller: the request, or its absence, is his to deal with.
  bool Claim();
  // Checks and queues the request.
  absl::Status Accept();
  absl::Status ParseRequest(v1::PrefillRequest* request);
  void SendAccepted(const v1::PrefillRequest& request);
  void PushToWorker();

  void OnComputeStart();
  void OnComputed(absl::StatusOr<PrefillResult> result);
  void SendCompleted(const PrefillResult& result);
  // Why the call was cancelled: by the client, by its deadline, or by a server that shuts down.
  absl::Status WhyCancelled() const;

  void Send(const v1::PrefillResponse& response);
  void Send(Message message);
  void NoteSent(const Message& message);
  // Ends the call: OK when everything queued has been written, an error as soon as the write in
  // flight is over. A client that does not take that write in time is cut.
  void End(absl::Status status);
  // When the call is cut if the write in flight is not over.
  absl::Time TailLimit() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ScheduleTailCheck() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CheckTail();
  // The one place where a call ends: gives back what it held, counts it, logs it, sends the status.
  void Settle();

  ServiceContext& service_;
  grpc::CallbackServerContext& call_;
  const absl::Time came_at_ = absl::Now();
  grpc::ByteBuffer request_bytes_;
  Timer::Id first_message_timer_ = Timer::kNone;

  // Set by Accept; then the worker's.
  PrefillJob job_;
  Ticket ticket_;
  const ServedModel* model_ = nullptr;
  absl::Time accepted_at_ = absl::InfiniteFuture();
  v1::KvManifest manifest_;
  CallRecord record_;

  // The worker's: chunks.
  SendWindow window_;
  KvChunkInfo chunk_;
  grpc::Slice payload_;
  uint32_t num_chunks_ = 0;
  int64_t kv_bytes_ = 0;

  Mutex mutex_;
  bool claimed_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<Message> queue_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;  // a write failed: nothing more will arrive
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);       // once ending
  absl::Time last_progress_ ABSL_GUARDED_BY(mutex_);  // of the tail: End, or a write since
  Timer::Id tail_timer_ ABSL_GUARDED_BY(mutex_) = Timer::kNone;
  Message in_flight_;  // of whoever set writing_, until OnWriteDone
};

}  // namespace headstart
