#include "tests/server/raw_call.h"

#include <grpcpp/generic/generic_stub.h>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"

namespace headstart::testing {
namespace {

// Runs a generic call's steps one after the other.
class BlockingCall {
 public:
  BlockingCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method)
      : stub_(channel) {
    context_.set_deadline(Instant::Now() + absl::Seconds(30));
    call_ = stub_.PrepareCall(&context_, method, &queue_);
    call_->StartCall(this);
    Wait();
  }

  bool Write(const std::string& bytes) {
    const grpc::Slice slice(bytes);
    call_->Write(grpc::ByteBuffer(&slice, 1), this);
    return Wait();
  }
  void WritesDone() {
    call_->WritesDone(this);
    Wait();
  }
  bool Read() {
    grpc::ByteBuffer ignored;
    call_->Read(&ignored, this);
    return Wait();
  }
  grpc::Status Finish() {
    grpc::Status status;
    call_->Finish(&status, this);
    Wait();
    return status;
  }

 private:
  bool Wait() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

}  // namespace

CallResult RawCallOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::vector<std::string>& messages) {
  BlockingCall call(channel, method);
  for (const std::string& message : messages) {
    if (!call.Write(message)) break;
  }
  call.WritesDone();
  CallResult result;
  while (call.Read()) result.responses.emplace_back();
  result.status = call.Finish();
  return result;
}

CallResult RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                   const std::vector<std::string>& messages) {
  return RawCallOf(channel, absl::StrCat("/headstart.v1.PrefillService/", method), messages);
}

}  // namespace headstart::testing
