#include "client/response_stream.h"

#include "absl/strings/str_cat.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

grpc::ByteBuffer ToBytes(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace

ResponseStream::ResponseStream(const std::shared_ptr<grpc::Channel>& channel,
                               const std::string& method, grpc::ClientContext* context)
    : stub_(channel) {
  call_ =
      stub_.PrepareCall(context, absl::StrCat("/headstart.v1.PrefillService/", method), &queue_);
  call_->StartCall(Start(&write_));
  while (write_ == Operation::kUnderWay) Wait();
}

ResponseStream::~ResponseStream() {
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

void* ResponseStream::Start(Operation* state) {
  *state = Operation::kUnderWay;
  return state;
}

bool ResponseStream::Wait(Instant until) {
  void* tag;
  bool ok = false;
  const auto status = queue_.AsyncNext(&tag, &ok, until);
  if (status != grpc::CompletionQueue::GOT_EVENT) return false;
  *static_cast<Operation*>(tag) = ok ? Operation::kDone : Operation::kFailed;
  return true;
}

void ResponseStream::Send(const google::protobuf::MessageLite& message, bool last) {
  if (write_ == Operation::kFailed) return;
  const grpc::ByteBuffer bytes = ToBytes(message);
  if (last) {
    call_->WriteLast(bytes, grpc::WriteOptions(), Start(&write_));
  } else {
    call_->Write(bytes, Start(&write_));
  }
  while (write_ == Operation::kUnderWay) Wait();
}

ResponseStream::Event ResponseStream::Read(grpc::ByteBuffer* message, Instant until) {
  if (read_ == Operation::kNone) call_->Read(&incoming_, Start(&read_));
  while (read_ == Operation::kUnderWay) {
    if (!Wait(until)) return Event::kTimeout;
  }
  if (read_ == Operation::kFailed) return Event::kEnd;
  message->Swap(&incoming_);
  incoming_.Clear();  // gives gRPC its memory back before more comes
  call_->Read(&incoming_, Start(&read_));
  return Event::kMessage;
}

grpc::Status ResponseStream::Finish() {
  grpc::Status status;
  Operation finish = Operation::kNone;
  call_->Finish(&status, Start(&finish));
  while (finish == Operation::kUnderWay) Wait();
  return status;
}

}  // namespace headstart
