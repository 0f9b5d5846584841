#include "client/part_fetch.h"

#include "client/fetch_stream.h"

namespace headstart {

PartFetch::~PartFetch() {
  if (!started()) return;
  call_.cancel->Cancel();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void PartFetch::Start(const FetchCall& call, const std::vector<v1::KvPart>& stripes,
                      Connections& connections) {
  call_ = call;
  for (const v1::KvPart& stripe : stripes) {
    const auto index = static_cast<int>(threads_.size());
    threads_.emplace_back(&PartFetch::Run, this, stripe, connections.ForFetch(call.target, index));
  }
}

void PartFetch::Run(const v1::KvPart& stripe, const std::shared_ptr<grpc::Channel>& channel) {
  FetchStream stream(call_, stripe, channel, &resumes_);
  const absl::Status status = stream.Run();
  if (status.ok()) return;
  {
    absl::MutexLock lock(&mutex_);
    first_error_.Update(status);
  }
  call_.cancel->Cancel();
}

absl::Status PartFetch::Join() {
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
  absl::MutexLock lock(&mutex_);
  return first_error_;
}

}  // namespace headstart
