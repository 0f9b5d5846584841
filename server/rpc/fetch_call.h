// One FetchKv call: a reader of KV that a Prefill call left behind, or is making.
#pragma once

#include <string>

#include "server/rpc/call_record.h"
#include "server/rpc/kv_call.h"

namespace headstart {

class FetchCall final : public KvCall {
 public:
  FetchCall(ServiceContext* service, grpc::CallbackServerContext* call);

 private:
  absl::Status Begin(const grpc::ByteBuffer& message) override;
  absl::Status OnMessage(const grpc::ByteBuffer& message) override;
  void Settle(const absl::Status& status) override;

  FetchRecord record_;
  Engine* engine_ = nullptr;
  std::string fetch_id_;
  std::string owner_;
};

}  // namespace headstart
