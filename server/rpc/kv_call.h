// A call that ships KV, from its opening to its status: what Prefill and FetchKv have in common.
//
// Life. PrefillService makes the call, which waits for its first message, though not for ever.
// OnReadDone hands the message to Begin, which gives the sender something to send or says why not.
// From then on the sender (kv_sender.h) drives the call; when everything has been written, or an
// error has come instead, it calls OnEnded: there the call gives back what it held, counts, logs
// and sends its status. gRPC calls OnDone after that and after every other reaction has returned:
// there, and only there, the call goes.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/instant.h"
#include "server/rpc/kv_sender.h"
#include "server/rpc/service_context.h"

namespace headstart {

// The model, or why there is none.
absl::StatusOr<const ServedModel*> LoadedModel(const ServiceContext& context);

class KvCall : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
               protected SendingCall {
 public:
  // Reactions, on gRPC's threads; they never wait for the engine or the client.
  void OnReadDone(bool ok) final;
  void OnWriteDone(bool ok) final { sender().OnWriteDone(ok); }
  void OnCancel() final;
  void OnDone() final;

 protected:
  // Both outlive the call.
  KvCall(ServiceContext* service, grpc::CallbackServerContext* call);
  ~KvCall() override = default;

  // Takes the first message. An error ends the call.
  virtual absl::Status Begin(const grpc::ByteBuffer& message) = 0;
  // Takes another one, where Begin called ReadNext. An error ends the call.
  virtual absl::Status OnMessage(const grpc::ByteBuffer& message) = 0;
  // The end: gives back, counts, logs.
  virtual void Settle(const absl::Status& status) = 0;

  void ReadNext() { StartRead(&message_); }

  // By the client, by its deadline, or by a server that shuts down.
  absl::Status WhyCancelled() const final;

  ServiceContext& service() const { return service_; }
  grpc::CallbackServerContext& context() const { return context_; }
  KvSender& sender() const { return *sender_; }

 private:
  void Write(const grpc::ByteBuffer& message) final { StartWrite(&message); }
  void Cut(const absl::Status& why) final;
  void OnEnded(const absl::Status& status) final;

  // True for the first caller: the first message, or its absence, is his to deal with.
  bool Claim() { return !claimed_.exchange(true); }
  void CountMessage();
  // Ends a call that was claimed and has no message.
  void EndWith(absl::Status status);

  ServiceContext& service_;
  grpc::CallbackServerContext& context_;
  const Instant came_at_ = Instant::Now();
  const std::shared_ptr<KvSender> sender_;
  std::atomic<bool> claimed_{false};
  Timer::Id first_message_timer_ = Timer::kNone;
  const std::string peer_ = context_.peer();
  bool has_message_ = false;
  grpc::ByteBuffer message_;
};

}  // namespace headstart
