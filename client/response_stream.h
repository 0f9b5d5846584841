// One call that answers with a stream of PrefillResponse, read message by message on the calling
// thread, without decoding.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "google/protobuf/message_lite.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "kernels/base/instant.h"

namespace headstart {

// The context must outlive the stream; cancelling it ends every call below soon. One thread.
class ResponseStream {
 public:
  // Opens a method of PrefillService. Failures show in Finish.
  ResponseStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                 grpc::ClientContext* context);
  ResponseStream(const ResponseStream&) = delete;
  ResponseStream& operator=(const ResponseStream&) = delete;
  ~ResponseStream();

  // Returns when the message is on its way. Nothing is sent after the `last` one, or a failure.
  void Send(const google::protobuf::MessageLite& message, bool last);

  enum class Event : uint8_t { kMessage, kEnd, kTimeout };
  // Waits for the next message, and lets gRPC receive the one after it meanwhile. kEnd: ask Finish;
  // kTimeout: none came until then.
  Event Read(grpc::ByteBuffer* message, Instant until = Instant::InfiniteFuture());

  // The status of the call. REQUIRES: Read returned kEnd, or the context was cancelled. Called
  // once.
  grpc::Status Finish();

 private:
  enum class Operation : uint8_t { kNone, kUnderWay, kDone, kFailed };
  // Waits until one of the operations is no longer under way; false when none was until then.
  bool Wait(Instant until = Instant::InfiniteFuture());
  // Starts an operation whose end `*state` will tell, and gives its tag.
  void* Start(Operation* state);

  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  grpc::ByteBuffer incoming_;
  Operation read_ = Operation::kNone;
  Operation write_ = Operation::kNone;  // also the start of the call, and its end
};

}  // namespace headstart
