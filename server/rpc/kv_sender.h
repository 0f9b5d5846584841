// The writing half of a call that ships KV: follows a ShipmentReader to its end. One write is in
// flight; the next message is framed and summed meanwhile, on whatever thread of gRPC's the last
// write ended on or the reader's wake came to, so that neither the compute thread nor another
// connection does it.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <deque>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "engine/ship/shipment.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"
#include "server/rpc/call_record.h"
#include "server/rpc/chunk_frame.h"
#include "server/rpc/service_context.h"

namespace headstart {

// What a KvSender needs of its call.
class SendingCall {
 public:
  // Begins a write; KvSender::OnWriteDone ends it. `message` stays until then.
  virtual void Write(const grpc::ByteBuffer& message) = 0;
  // Ends the call without waiting for the write in flight, which fails. May let the call go.
  virtual void Cut(const absl::Status& why) = 0;
  // Why a write can have failed.
  virtual absl::Status WhyCancelled() const = 0;
  virtual void OnComputeStart() {}
  // The last that the sender does: nothing is in flight, the reader is gone. May let the call go.
  virtual void OnEnded(const absl::Status& status) = 0;

 protected:
  ~SendingCall() = default;
};

// Thread-safe. Lives as long as its call, and a moment longer where a wake is under way.
class KvSender : public std::enable_shared_from_this<KvSender> {
 public:
  KvSender(ServiceContext* service, SendingCall* call) : service_(*service), call_(*call) {}

  // ---- before Start
  void Send(const v1::PrefillResponse& response);
  // Everything that `reader` gives is to be sent, and its end is the end. `part`: the reader's, if
  // it has one.
  void Ship(std::unique_ptr<ShipmentReader> reader, const KvPart& part);
  // Nothing is written, and nothing ends, before. Once.
  void Start();

  // ---- at any time

  // ShipmentReader::Acknowledge, until the end.
  absl::Status Acknowledge(int64_t num_chunks);
  // Ends with an error, as soon as the write in flight is over. A client that does not take that
  // write in time is cut. What comes first counts.
  void End(absl::Status status);
  void OnWriteDone(bool ok);

  // Once the call is done: no timer of this runs any more.
  void StopTimers();
  // Once it has ended.
  const SendRecord& record() const { return record_; }

 private:
  enum class Step : uint8_t { kNone, kWrite, kPull, kFinish };

  // Does what there is to do, unless another thread is at it: that one looks again.
  void Pump();
  Step NextStep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Asks the reader for the next message.
  void Pull();
  v1::PrefillResponse MakeManifest();
  v1::PrefillResponse MakeCompletion(const PrefillResult& result) const;
  void Push(StreamMessage message, bool is_last = false);
  void Finish();
  // Pumps soon, on a thread of gRPC's. Takes no lock of this.
  void Wake();
  void OnWoken();

  void NoteSent(const StreamMessage& message);
  // Of the write that has ended. Not OK when the client takes KV all the time, but hardly any.
  absl::Status CheckPace() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // When the call is cut if the write in flight is not over.
  Instant WriteLimit() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Watch(Timer::Id KvSender::*timer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CheckWrite(Timer::Id KvSender::*timer);

  ServiceContext& service_;
  SendingCall& call_;

  // Of the thread that pumps, but for Acknowledge under the lock.
  std::unique_ptr<ShipmentReader> reader_;
  KvPart part_;
  v1::KvManifest manifest_;
  SendRecord record_;

  Mutex mutex_;
  bool pumping_ ABSL_GUARDED_BY(mutex_) = true;  // until Start: held back
  bool ready_ ABSL_GUARDED_BY(mutex_) = false;   // the reader has not said that it waits
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;   // it waited, or was closed
  std::deque<StreamMessage> queue_ ABSL_GUARDED_BY(mutex_);
  StreamMessage in_flight_;  // of whoever set writing_, until OnWriteDone
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  Instant write_began_ ABSL_GUARDED_BY(mutex_);
  // Since the pace was last looked at: time in which something was there to take, and what was
  // taken.
  absl::Duration offered_ ABSL_GUARDED_BY(mutex_);
  int64_t taken_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;   // nothing more is asked for
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // once ended
  Instant ended_at_ ABSL_GUARDED_BY(mutex_);
  Timer::Id stall_timer_ ABSL_GUARDED_BY(mutex_) = Timer::kNone;
  Timer::Id grace_timer_ ABSL_GUARDED_BY(mutex_) = Timer::kNone;
};

}  // namespace headstart
