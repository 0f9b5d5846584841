// One server stream, read message by message on the calling thread, without decoding.
#pragma once

#include <memory>

#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// The context must outlive the stream; cancelling it ends every call below soon.
class ResponseStream {
 public:
  // Opens PrefillService.Prefill and sends the request. Failures show in Finish.
  ResponseStream(const std::shared_ptr<grpc::Channel>& channel, const v1::PrefillRequest& request,
                 grpc::ClientContext* context);
  ResponseStream(const ResponseStream&) = delete;
  ResponseStream& operator=(const ResponseStream&) = delete;
  ~ResponseStream();

  // False when the stream has ended; then ask Finish.
  bool Read(grpc::ByteBuffer* message);

  // The status of the call. REQUIRES: Read returned false, or the context was cancelled. Called
  // once.
  grpc::Status Finish();

 private:
  // Waits for the one operation that is under way.
  bool Wait();

  grpc::CompletionQueue queue_;
  grpc::TemplatedGenericStub<v1::PrefillRequest, grpc::ByteBuffer> stub_;
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::PrefillRequest, grpc::ByteBuffer>> call_;
};

}  // namespace headstart
