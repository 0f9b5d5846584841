#include "client/response_stream.h"

#include "headstart/v1/prefill.grpc.pb.h"

namespace headstart {

ResponseStream::ResponseStream(const std::shared_ptr<grpc::Channel>& channel,
                               const v1::PrefillRequest& request, grpc::ClientContext* context)
    : stub_(channel) {
  call_ = stub_.PrepareCall(context, "/headstart.v1.PrefillService/Prefill", &queue_);
  call_->StartCall(nullptr);
  if (!Wait()) return;
  call_->WriteLast(request, grpc::WriteOptions(), nullptr);
  Wait();
}

ResponseStream::~ResponseStream() {
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool ResponseStream::Wait() {
  void* tag;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool ResponseStream::Read(grpc::ByteBuffer* message) {
  call_->Read(message, nullptr);
  return Wait();
}

grpc::Status ResponseStream::Finish() {
  grpc::Status status;
  call_->Finish(&status, nullptr);
  Wait();
  return status;
}

}  // namespace headstart
