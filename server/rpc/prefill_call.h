// One Prefill call: a request to the engine, and what comes of it.
#pragma once

#include "server/rpc/call_record.h"
#include "server/rpc/kv_call.h"

namespace headstart {

class PrefillCall final : public KvCall {
 public:
  PrefillCall(ServiceContext* service, grpc::CallbackServerContext* call);

 private:
  absl::Status Begin(const grpc::ByteBuffer& message) override;
  absl::Status OnMessage(const grpc::ByteBuffer& message) override;
  absl::Status Parse(const grpc::ByteBuffer& message, v1::PrefillRequest* request);
  void SendAccepted(const v1::PrefillRequest& request, const Submission& submission);
  void OnComputeStart() override;
  void Settle(const absl::Status& status) override;

  CallRecord record_;
  Engine* engine_ = nullptr;  // that has the request
  uint64_t key_ = 0;
};

}  // namespace headstart
