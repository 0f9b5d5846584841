// One part of detached KV on one connection: receives, acknowledges, goes on when the stream broke.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "client/kv_receiver.h"
#include "client/part_fetch.h"
#include "client/response_stream.h"
#include "grpcpp/channel.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

class FetchStream {
 public:
  // `call` outlives this object. Every resumed stream adds to `resumes`.
  FetchStream(const FetchCall& call, const v1::KvPart& part,
              const std::shared_ptr<grpc::Channel>& channel, std::atomic<int>* resumes);

  // Returns when all of the part is in its place.
  //   UNAVAILABLE   the stream broke call.retry.max_attempts times without a chunk in between
  //   DATA_LOSS     what came was wrong
  //   CANCELLED, DEADLINE_EXCEEDED, the server's status, or what a callback returned
  absl::Status Run();

 private:
  // One gRPC call, from the chunk after the last one received. `*broke` when another may go on.
  absl::Status RunCall(bool* broke);
  // Until the stream ends, or something in it is wrong.
  absl::Status Receive(ResponseStream& stream);
  void Acknowledge(ResponseStream& stream, bool last);

  const FetchCall& call_;
  const v1::KvPart part_;
  const std::shared_ptr<grpc::Channel> channel_;
  std::atomic<int>* const resumes_;
  KvReceiver receiver_;
  // Of the receiver's, those that the server knows of.
  int64_t acknowledged_chunks_ = 0;
  int64_t acknowledged_bytes_ = 0;
};

}  // namespace headstart
